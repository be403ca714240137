"""JSON that strangers wrote: parsed without the forgiveness of `json.loads`, quoted without flooding a terminal."""

from __future__ import annotations

import json
import reprlib
from typing import Any

from loader.errors import CatalogError

# What people most often have in place of the file they meant, by its first bytes.
_MISTAKEN = {
    b"version https://git-lfs": "This is a Git LFS pointer, not the file itself: run `git lfs pull` and upload again",
    b"PK\x03\x04": "This is a zip archive, as torch.save writes (`.bin`), not safetensors",
    b"GGUF": "This is a GGUF file, not safetensors",
    b"<": "This looks like a web page or an XML reply, not the file itself: check the URI and the access rights",
}

_quoter = reprlib.Repr()
_quoter.maxstring = _quoter.maxother = 200
_quoter.maxdict = _quoter.maxlist = 10


def quote(value: object) -> str:
    """`value` as Python writes it: unprintable characters escaped, cut in the middle where it is long."""
    return _quoter.repr(value)


def advice(head: bytes = b"") -> str:
    """What to do about a file that begins with `head` and is not what it should be."""
    known = (text for start, text in _MISTAKEN.items() if head.startswith(start))
    return next(known, "The file is damaged or was written wrongly: copy or export it again")


def parse_object(data: bytes, *, file: str, what: str) -> dict[str, Any]:
    """Parse a JSON object; `what` names it in errors, as in "the header".

    Stricter than `json.loads`: no name twice in one object, no NaN or Infinity, no half of a surrogate pair.

    Raises CatalogError for anything else than such an object.
    """
    try:
        parsed = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_parse_int
        )
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{file}: {what} cannot be read as JSON: {error}. {advice(data)}.") from error
    if not isinstance(parsed, dict):
        raise CatalogError(f"{file}: {what} is not a JSON object but {quote(parsed)}. {advice(data)}.")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {quote(name)} occurs twice")
        name.encode()  # an escape like "\ud800" alone is no text: it could be neither printed nor sent
        if isinstance(value, str):
            value.encode()
        found[name] = value
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _parse_int(text: str) -> float:
    # Other parsers, safetensors' own among them, read -0 as a float: it must not pass for a size here.
    return -0.0 if text == "-0" else int(text)
