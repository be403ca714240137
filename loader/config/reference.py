"""The reference of the YAML's keys, as a Markdown table made of the config's types: it is README's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from loader.config.model import Config
from loader.config.section import Proof
from loader.config.values import BYTE_UNITS, SECOND_UNITS

Schema = dict[str, Any]
"""A JSON schema, as pydantic makes it of a section or of one key."""

WORDS = {"string": "text", "integer": "number", "boolean": "true, false", "object": "mapping", "null": "null"}
"""The reference's words for JSON's types."""

UNITS: Mapping[str, Mapping[str, float]] = {"size": BYTE_UNITS, "duration": SECOND_UNITS}
"""By the format of a key: the units that its default may be told in."""


class Key(NamedTuple):
    """A line of the reference. `default` is empty where the key must be given."""

    name: str
    type: str
    default: str
    description: str


def reference() -> str:
    """The table, with a line for each key of the YAML by its dotted name; "[]" stands for each item of a list."""
    schema = Config.model_json_schema()
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key in _keys(schema, "", schema["$defs"]):
        default = f"`{key.default}`" if key.default else "*needed*"
        lines.append(f"| `{key.name}` | {key.type} | {default} | {key.description} |")
    return "\n".join(lines)


def _keys(section: Schema, prefix: str, sections: dict[str, Schema]) -> Iterator[Key]:
    """The keys of a section and of those in it. What is to be proved, which the library has too, comes last."""
    properties: dict[str, Schema] = section["properties"]
    for name in sorted(properties, key=lambda name: name in Proof.model_fields):
        key, dotted = properties[name], f"{prefix}{name}"
        inner = _section(key, sections)
        if inner is None or "items" in key:
            default = "" if name in section.get("required", ()) else _default(key)
            yield Key(dotted, _type(key), default, key["description"])
        if inner is not None:
            yield from _keys(inner, f"{dotted}[]." if "items" in key else f"{dotted}.", sections)


def _section(key: Schema, sections: dict[str, Schema]) -> Schema | None:
    """The section that the key is, or that each of its items is."""
    name = key.get("items", key).get("$ref", "").rpartition("/")[2]
    return sections[name] if name else None


def _type(key: Schema) -> str:
    if "anyOf" in key:
        return " or ".join(_type(each) for each in key["anyOf"])
    if "enum" in key or "const" in key:
        return ", ".join(f"`{value}`" for value in key.get("enum", [key.get("const")]))
    if "items" in key:
        return "list of mappings" if "$ref" in key["items"] else "list of text"
    return str(key.get("format") or WORDS[key["type"]])


def _default(key: Schema) -> str:
    """As one writes it in YAML."""
    value, form = key["default"], key.get("format", "")
    if form in UNITS:
        return _quantity(value, UNITS[form])
    text = json.dumps(value)
    return text.replace('"', "") if value else text


def _quantity(value: float, units: Mapping[str, float]) -> str:
    """In the largest unit of which it is a whole number: 1800.0 seconds are 30min."""
    unit = max((unit for unit in units if unit and value % units[unit] == 0), key=units.__getitem__)
    return f"{value / units[unit]:.0f}{unit}"
