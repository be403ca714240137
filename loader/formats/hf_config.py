"""`config.json`: what the loader itself looks at in it is of the kind that it takes it for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loader.errors import CatalogError
from loader.formats.strict_json import parse_object, quote

_KINDS: dict[str, tuple[type, str]] = {
    "architectures": (list, "a list of names"),
    "model_type": (str, "a name"),
    "auto_map": (dict, "an object"),
    "text_config": (dict, "an object"),
    "quantization_config": (dict, "an object"),
    "compression_config": (dict, "an object"),
}
"""What may be null or missing too. The rest is for transformers to judge."""


def parse_config(data: bytes, *, file: str) -> dict[str, Any]:
    """The fields of a `config.json`. Raises CatalogError for what is none, naming the field."""
    fields = parse_object(data, file=file, what="the config")
    _check(fields, file)
    _check(fields.get("text_config") or {}, f"{file}: text_config")
    return fields


def vocab_size(fields: Mapping[str, Any]) -> int | None:
    """The checkpoint's, or its text tower's; None where the config tells none."""
    found = fields.get("vocab_size") or (fields.get("text_config") or {}).get("vocab_size")
    return found if type(found) is int else None


def _check(fields: Mapping[str, Any], where: str) -> None:
    for name, (kind, words) in _KINDS.items():
        found = fields.get(name)
        names = found if name == "architectures" and isinstance(found, list) else []
        if not isinstance(found, kind | None) or not all(isinstance(each, str) for each in names):
            raise CatalogError(f"{where}: {name} should be {words}, found {quote(found)}. Correct it, or get it again")
