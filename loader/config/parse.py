"""One YAML file, then dotted overrides, checked together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loader.config.document import Document, read_yaml
from loader.config.explain import explain
from loader.config.model import Config
from loader.errors import ConfigError


@dataclass(frozen=True)
class Override:
    """`a.b=value`: the keys, the value, and what to call it in an error."""

    path: tuple[str, ...]
    value: Any
    place: str


def parse(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read the config at `path` and apply `overrides` ("read.share=node") in order.

    Raises ConfigError with a line for every fault: `file:line:`, or the override, then the dotted key.
    """
    document = _read_file(path)
    parsed = [_parse_override(text) for text in overrides]
    # What an override may add to though the file does not name it.
    data = {"source": {}, "mesh": Config.model_fields["mesh"].default, **(document.data or {})}
    for override in parsed:
        data = _apply(data, override)

    def place(keys: tuple[str | int, ...]) -> str:
        for override in reversed(parsed):
            common = min(len(keys), len(override.path))
            if override.path[:common] == keys[:common]:
                return override.place
        return f"{path}:{document.line(keys)}"

    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise explain(error, Config, place) from None


def _read_file(path: str) -> Document:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the config cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the config is not UTF-8 text") from None
    document = read_yaml(text, lambda line: f"{path}:{line}")
    if not isinstance(document.data, dict | None):
        raise ConfigError(f"{path}:1: the config should be a mapping: source, model, mesh, …")
    return document


def _parse_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if equals:
        shown = f"{key}={value if _may_be_shown(path, value) else '…'}"
    else:
        shown = key if _may_be_shown(path, "") else "…"
    place = f"override '{shown}'"
    if not equals or not all(path):
        raise ConfigError(f"{place}: should have the form section.key=value, such as read.share=node")
    return Override(path, read_yaml(value, lambda _: place).data, place)


def _may_be_shown(path: Sequence[str], value: str) -> bool:
    """Whether `value` cannot be a secret, even where the key is misspelt: storage_options lie deeper, and in source."""
    section, *rest = path
    return section in Config.model_fields.keys() - {"source"} and len(rest) < 2 and not value.startswith(("{", "["))


def _apply(data: dict[str, Any], override: Override) -> dict[str, Any]:
    """`data` with the override's value in it; `data` stays as it is, since an alias may lead to parts of it twice."""
    result = inner = dict(data)
    for depth, key in enumerate(override.path[:-1], 1):
        child = inner.get(key)
        if not isinstance(child, dict | None):
            parent = ".".join(override.path[:depth])
            raise ConfigError(f"{override.place}: {parent} is not a mapping: override it whole, as {parent}=value")
        inner[key] = dict(child or {})
        inner = inner[key]
    inner[override.path[-1]] = override.value
    return result
