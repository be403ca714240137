"""One module for each storage scheme; `SCHEMES` in it lists the URI schemes it serves.

To add one, add a module here with `SCHEMES` and `open_scheme(access: Access) -> Scheme`. What no module serves goes
through `other`, by fsspec's generic interface.
"""

from __future__ import annotations

import importlib
import pkgutil

from loader.store.base import Access, Scheme


def open_scheme(access: Access) -> Scheme:
    """Open `access.uri` with the module that serves its scheme."""
    scheme = access.uri.partition("://")[0] if "://" in access.uri else "file"
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if scheme in module.SCHEMES:
            return module.open_scheme(access)  # type: ignore[no-any-return]
    other = importlib.import_module(f"{__name__}.other")
    return other.open_scheme(access)  # type: ignore[no-any-return]
