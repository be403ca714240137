"""What a pickle says of storages: the bytes that tensors are views of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from loader.errors import CatalogError
from loader.formats.strict_json import quote
from loader.formats.torch_file.machine import Call, Global, Persistent

RESAVE = "Load it with torch.load where it was made, and save its state dict again"

MAX = 2**63 - 1  # torch counts elements, strides and bytes in int64

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
}
"""By the class that a pickle names."""

_SIZES = {
    "UntypedStorage": 1,  # counts bytes, and the tensor has the dtype
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
} | {name: dtype.itemsize for name, dtype in _STORAGES.items()}
"""Bytes of an item, also of storages whose tensors cannot be loaded: they may lie between others."""

DTYPES = {
    str(dtype): dtype
    for dtype in (
        *_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
        torch.float4_e2m1fn_x2,
    )
}  # fmt: skip


class Storage(NamedTuple):
    """What a pickle says of a storage: its key in the file, and its bytes; a legacy file counts items of `itemsize`."""

    key: str
    nbytes: int
    itemsize: int


def storages_of(persistent: Sequence[Persistent], file: str) -> dict[str, Storage]:
    """Every storage that a pickle mentions, by its key. Raises CatalogError where it contradicts itself."""
    found: dict[str, Storage] = {}
    for each in persistent:
        storage, _, _ = storage_of(each, file)
        known = found.setdefault(storage.key, storage)
        if known.nbytes != storage.nbytes:
            raise CatalogError(
                f"{file}: storage {quote(storage.key)} has {known.nbytes} bytes in one place of the pickle and "
                f"{storage.nbytes} in another. {RESAVE}."
            )
    return found


def storage_of(stored: Persistent, file: str) -> tuple[Storage, torch.dtype | None, int]:
    """The storage, its dtype, and the byte of it where a legacy view of it begins.

    ("storage", class, key, device, items), and in legacy files (key of the view, first item, items) or None.
    """
    parts = stored.id if isinstance(stored.id, tuple) else ()
    kind, key = (text_of(parts[0]), text_of(parts[2])) if len(parts) in (5, 6) else (None, None)
    if kind != "storage" or key is None or not isinstance(parts[1], Global) or not naturals(parts[4:5]):
        raise CatalogError(f"{file}: its pickle refers to what is no storage: {kind_of(stored.id)}. {RESAVE}.")
    name = parts[1].name.rpartition(".")[2]
    if name not in _SIZES:
        raise CatalogError(f"{file}: storage {quote(key)} is a {quote(name)}, of an unknown dtype. {RESAVE}.")
    size = _SIZES[name]
    view = parts[5] if len(parts) == 6 else None
    if view is not None and not (isinstance(view, tuple) and len(view) == 3 and naturals(view[1:])):
        raise CatalogError(f"{file}: storage {quote(key)} is viewed in an unknown way. {RESAVE}.")
    if parts[4] * size > MAX:
        raise CatalogError(f"{file}: storage {quote(key)} has 2**63 bytes or more. {RESAVE}.")
    return Storage(key, parts[4] * size, size), _STORAGES.get(name), view[1] * size if view else 0


def naturals(values: Any) -> bool:
    # `type`, not `isinstance`: True is an int to Python.
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v <= MAX for v in values)


def text_of(value: Any) -> str | None:
    """Text, which Python 2 wrote as bytes. Half of a surrogate pair is none: it could not be printed or sent."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        return text if isinstance(text, str) and text.encode() is not None else None
    except UnicodeError:
        return None


def kind_of(value: Any) -> str:
    return quote(value.name) if isinstance(value, Global | Call) else f"a {type(value).__name__}"
