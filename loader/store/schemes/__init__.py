"""One module for each kind of storage, imported only where it is used.

To add one, add a module with `CLIENT_BYTES` and `open_scheme(access: Access) -> Scheme`, and its URI schemes to
`MODULES`. What no module serves goes through `other`, by fsspec's generic interface.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import fsspec

from loader.store.base import Access, Scheme
from loader.store.direct import Direct

MODULES = {
    "file": "local", "local": "local", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs",
    "http": "web", "https": "web", "hf": "hf",
}  # fmt: skip
"""URI schemes, and the modules that serve them."""


def open_scheme(access: Access) -> Scheme:
    """Open `access.uri` with the module that serves its scheme, to be read as `access.backend` says.

    Raises ValueError where that cannot be done.
    """
    scheme = _module(access.uri).open_scheme(access)
    if access.backend != "fsspec" and getattr(scheme, "direct", False):
        return Direct(scheme, timeout=access.timeout, until=access.until)
    if access.backend == "direct":
        raise ValueError("read.backend direct does not serve this scheme with these storage_options: set it to auto")
    return scheme  # type: ignore[no-any-return]


def import_scheme(access: Access) -> None:
    """Import all that `open_scheme` would, and open nothing. What cannot be imported, opening it tells.

    A module may have a `before_import(access)`, for a client that reads its environment once.
    """
    getattr(_module(access.uri), "before_import", lambda _: None)(access)
    with suppress(ImportError, ValueError):
        fsspec.get_filesystem_class(_scheme(access.uri))


def client_bytes(uri: str) -> int:
    """Host memory that an open client takes beside what it reads, as measured for its module."""
    return int(_module(uri).CLIENT_BYTES)


def _scheme(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else "file"


def _module(uri: str) -> Any:
    return importlib.import_module(f"{__name__}.{MODULES.get(_scheme(uri), 'other')}")
