"""What of a URI may be shown: credentials can hide in its user information and in its query string."""

from __future__ import annotations

import re
from urllib.parse import quote

_USERINFO = re.compile(r"://[^/?#]*@")


def public_uri(uri: str) -> str:
    """`uri` without user information and query string; a plain path, where "?" is a letter, stays as it is.

    https://me:word@host/a.safetensors?X-Amz-Signature=5f3 -> https://host/a.safetensors
    """
    if "://" not in uri:
        return uri
    return _USERINFO.sub("://", uri).partition("?")[0]


def at_revision(uri: str, revision: str) -> str:
    """An hf:// URI of a model with its revision: hf://org/name/sub, refs/pr/3 -> hf://org/name@refs%2Fpr%2F3/sub"""
    org, _, rest = uri.removeprefix("hf://").partition("/")
    name, slash, path = rest.partition("/")
    return f"hf://{org}/{name}@{quote(revision, safe='')}{slash}{path}"
