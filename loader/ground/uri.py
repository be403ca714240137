"""URIs: what one names, and what of it may be shown: credentials can hide in its user information and its query."""

from __future__ import annotations

import re
from urllib.parse import quote

_USERINFO = re.compile(r"://[^/?#]*@")

FILES = (".safetensors", ".bin", ".pt", ".pth")
"""What a URI that names one file ends with."""


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


def split_uri(uri: str) -> tuple[str, str | None]:
    """Directory and file name of a source: the name is None where the URI names a directory.

    s3://b/llama/model.safetensors -> (s3://b/llama, model.safetensors); s3://b/llama/ -> (s3://b/llama, None)
    The name of a file has one of the endings FILES.
    """
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    if path.endswith(FILES):
        directory, _, name = path.rpartition("/")
        return (directory or ".") + mark + query, name
    return (path.rstrip("/") or "/") + mark + query, None
