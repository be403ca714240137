"""The conversions that come with the loader: each is one module here, which `convert:` names, with `convert` in it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from loader.convert.lazy import Convert

NAMED = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))


def named(name: str) -> Convert:
    """The function `convert(checkpoint, hf_config)` of module `loader.convert.named.<name>`."""
    return cast("Convert", importlib.import_module(f"{__name__}.{name}").convert)
