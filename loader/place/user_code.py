"""The user's own functions: found by name, called with their errors told as theirs."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from loader.errors import BuilderError, ConfigError, LoaderError


def resolve(spec: str) -> Callable[..., Any]:
    """The callable that "package.module:function" names, from the working directory or PYTHONPATH.

    Raises ConfigError, with the nearest names, where the module or the attribute is missing, and with the traceback
    where importing the module fails.
    """
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute):
        raise ConfigError(f"{spec!r} does not name a function: write package.module:function")
    value: Any = _import(module_name, spec)
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"{spec}: {module_name} has no {part!r}{_nearest(part, dir(value))}")
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError(f"{spec} is a {type(value).__name__}, not a function")
    return value  # type: ignore[no-any-return]


def call_builder(builder: Callable[..., Any], hf_config: Any, mesh: Any) -> nn.Module:
    """`builder(hf_config, mesh)`, which must be a module. Raises BuilderError with the traceback of what it raises."""
    name = f"{getattr(builder, '__module__', '')}:{getattr(builder, '__qualname__', builder)}"
    try:
        module = builder(hf_config, mesh)
    except LoaderError:
        raise
    except Exception as error:
        raise BuilderError(f"model.builder {name} failed\n{told(error)}") from error
    if not isinstance(module, nn.Module):
        raise BuilderError(f"model.builder {name} returned a {type(module).__name__}; it must return an nn.Module")
    return module


def told(error: BaseException) -> str:
    """The traceback as text, for it must reach the other ranks."""
    return "".join(traceback.format_exception(error)).rstrip()


def _import(name: str, spec: str) -> Any:
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.append(os.getcwd())  # noqa: PTH109
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{spec}: importing {name} failed\n{told(error)}") from error
        parent, _, last = error.name.rpartition(".")
        path = getattr(sys.modules.get(parent), "__path__", None)
        siblings = [module.name for module in pkgutil.iter_modules(path)]
        place = f"in {parent}" if parent else "in the working directory or on PYTHONPATH"
        raise ConfigError(f"{spec}: no module {last!r} {place}{_nearest(last, siblings)}") from error
    except Exception as error:
        raise ConfigError(f"{spec}: importing {name} failed\n{told(error)}") from error


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
