"""What pydantic found wrong, as one line an error: the place, the dotted key, what is allowed, what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from loader.config.values import show
from loader.errors import ConfigError

Path = tuple[str | int, ...]

# Pydantic's words for these speak of Python.
ALLOWED = {
    "string_type": "should be a string",
    "string_too_short": "should not be empty",
    "int_type": "should be a whole number",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
}


def explain(error: ValidationError, root: type[BaseModel], place: Callable[[Path], str] | None = None) -> ConfigError:
    """The ConfigError for what `root` refused. `place` tells where a path of keys was written: "cfg.yaml:7"."""
    lines = []
    for fault in error.errors(include_url=False):
        path = fault["loc"]
        where = f"{place(path)}: " if place else ""
        lines.append(f"{where}{'.'.join(map(str, path))}: {_complaint(fault, root)}")
    return ConfigError("\n".join(lines))


def _complaint(fault: Any, root: type[BaseModel]) -> str:
    path, kind = fault["loc"], fault["type"]
    if kind == "extra_forbidden":
        return f"unknown key; {_nearest(path, root)}"
    if kind == "missing":
        field = _section_at(root, path[:-1]).model_fields[path[-1]]
        return f"missing, and it has no default: add it ({field.description})"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    allowed = ALLOWED.get(kind, fault["msg"].removeprefix("Input "))
    found = "a value that is kept secret" if "storage_options" in path else show(fault["input"])
    return f"{allowed}, found {found}"


def _nearest(path: Sequence[str | int], root: type[BaseModel]) -> str:
    """What an unknown key may have been meant to be: a neighbour, or else a key of another section."""
    neighbours = {name: name for name in _section_at(root, path[:-1]).model_fields}
    anywhere = {name: name for name in root.model_fields}
    for name, field in root.model_fields.items():
        if isinstance(section := field.annotation, type) and issubclass(section, BaseModel):
            anywhere |= {inner: f"{name}.{inner}" for inner in section.model_fields}
    for names in (neighbours, anywhere):
        if near := get_close_matches(str(path[-1]), names, n=1):
            return f"did you mean '{names[near[0]]}'?"
    return f"known here: {', '.join(neighbours)}"


def _section_at(root: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The model that validates the mapping at `path`."""
    section: Any = root
    for part in path:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next(iter(get_args(annotation)), annotation)  # a section, or tuple[section, ...]
    return section  # type: ignore[no-any-return]
