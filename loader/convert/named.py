"""The conversions that come with the loader, by the name that `convert:` gives them: each is one module here."""

from __future__ import annotations

import importlib
from typing import cast

from loader.convert.lazy import Convert

NAMED = ("olmo_core", "torchtitan", "transformers")


def named(name: str) -> Convert:
    """The function `convert(checkpoint, hf_config)` of module `loader.convert.<name>`."""
    return cast("Convert", importlib.import_module(f"loader.convert.{name}").convert)
