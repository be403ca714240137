"""A safetensors file's header to catalog entries. Whatever it claims is checked before anyone relies on it.

The layout: 8 bytes with the length n of the JSON that follows (little-endian), n bytes of JSON, the data.
    {"key": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {"format": "pt"}}
The data offsets count from the end of the JSON; the tensors follow each other without holes up to the file's end.
"""

from __future__ import annotations

from typing import Any

import torch

from loader.errors import CatalogError, InternalError
from loader.formats.strict_json import advice, parse_object, quote
from loader.plan.catalog import Entry

# Bytes of a file to read before its header's length is known: one GET is then enough for most files (a key takes about
# 120 bytes), and no more than 64 KiB of what follows the header are read early.
HEAD = 64 * 1024

# As safetensors itself: MAX_HEADER_SIZE in safetensors/src/tensor.rs.
MAX_HEADER = 100_000_000

_LENGTH = 8
_MAX = 2**63 - 1  # torch counts elements, strides and bytes in int64

# Every dtype of safetensors 0.8 (`Dtype` in tensor.rs), None where torch has no such dtype.
_DTYPES: dict[str, torch.dtype | None] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "F6_E2M3": None,
    "F6_E3M2": None,
}


def header_length(head: bytes, file: str, size: int) -> int:
    """Bytes of the header with its length field: the data begins there.

    `head` holds the first bytes of `file`, 8 or more; `size` is the whole file's size in bytes.

    Raises CatalogError where that is no safetensors file.
    """
    if min(len(head), size) < _LENGTH:
        raise CatalogError(
            f"{file}: not a safetensors file: it has {size} bytes, and even an empty one has more than {_LENGTH}. "
            f"{advice(head)}."
        )
    n = int.from_bytes(head[:_LENGTH], "little")
    if n > MAX_HEADER:
        raise CatalogError(
            f"{file}: not a safetensors file: its first {_LENGTH} bytes {quote(head[:_LENGTH])} stand for a header of "
            f"{n} bytes, and safetensors allows {MAX_HEADER}. {advice(head)}."
        )
    if _LENGTH + n > size:
        raise CatalogError(
            f"{file}: its header should end at byte {_LENGTH + n}, but the file has {size} bytes. {advice(head)}."
        )
    return _LENGTH + n


def parse_header(header: bytes, *, file: str, file_number: int, size: int) -> dict[str, Entry]:
    """The keys of a file in the order of their offsets, as entries with absolute byte ranges.

    `header` holds at least the first `header_length` bytes of `file`; `size` is the whole file's size in bytes.

    Raises CatalogError, naming file and key, where the header contradicts itself or `size`.
    """
    data = header_length(header, file, size)
    if len(header) < data:
        raise InternalError(f"{file}: {len(header)} bytes of a header of {data} bytes were given")
    infos = parse_object(header[_LENGTH:data], file=file, what="its header")
    _check_metadata(infos.pop("__metadata__", None), file)
    entries = {key: _entry(key, info, file, file_number, data) for key, info in infos.items()}
    # An empty tensor stands before the one that begins at the same byte.
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(entries, file, data, size)
    return entries


def _check_metadata(metadata: Any, file: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CatalogError(
            f"{file}: __metadata__ in its header should map strings to strings, but is {quote(metadata)}. {advice()}."
        )


def _entry(key: str, info: Any, file: str, file_number: int, data: int) -> Entry:
    """One key's claims, each checked by itself; `data` is the byte where the file's data begins."""
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        # A field that we do not know could change what the bytes mean.
        raise _lie(file, key, f"expected dtype, shape and data_offsets and nothing else, found {quote(info)}")
    name, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    dtype = _torch_dtype(name, file, key)
    if not _naturals(shape):
        raise _lie(file, key, f"expected a shape of integers from 0 to 2**63 - 1, found {quote(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise _lie(
            file, key, f"expected data_offsets [start, stop] with 0 <= start <= stop < 2**63, found {quote(offsets)}"
        )
    stored = _packed(shape, file, key) if name == "F4" else shape
    expected, found = _nbytes(stored, dtype, file, key), offsets[1] - offsets[0]
    if expected != found:
        raise _lie(
            file, key, f"{name} of shape {quote(shape)} takes {expected} bytes, but data_offsets {offsets} hold {found}"
        )
    return Entry(dtype, tuple(stored), file_number, data + offsets[0], data + offsets[1])


def _torch_dtype(name: Any, file: str, key: str) -> torch.dtype:
    known = isinstance(name, str) and name in _DTYPES
    dtype = _DTYPES[name] if known else None
    if dtype is None:
        what = f"torch {torch.__version__} has no dtype for" if known else "unknown dtype"
        usable = ", ".join(sorted(name for name, dtype in _DTYPES.items() if dtype))
        raise CatalogError(
            f"{file}: key {quote(key)}: {what} {quote(name)}. Export the tensor in one of these: {usable}."
        )
    return dtype


def _naturals(value: Any) -> bool:
    # `type`, not `isinstance`: JSON's true is an int to Python.
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX for v in value)


def _packed(shape: list[int], file: str, key: str) -> list[int]:
    """Torch's shape of F4, two elements a byte: safetensors counts elements, (4, 16); torch counts pairs, (4, 8)."""
    if not shape or shape[-1] % 2:
        raise _lie(
            file, key, f"F4 packs two elements in a byte, so its last dim must be even; found shape {quote(shape)}"
        )
    return [*shape[:-1], shape[-1] // 2]


def _nbytes(shape: list[int], dtype: torch.dtype, file: str, key: str) -> int:
    """Bytes of a tensor. Beside a dim of 0, too, the other dims must multiply to an int64: torch strides over them."""
    span = dtype.itemsize
    for size in shape:
        span *= max(size, 1)
        if span > _MAX:
            raise _lie(file, key, f"shape {quote(shape)} overflows: 2**63 bytes or more")
    return 0 if 0 in shape else span


def _check_cover(entries: dict[str, Entry], file: str, data: int, size: int) -> None:
    """Without holes and overlaps from the first byte of data to the file's last."""
    before, position = None, data
    for key, entry in entries.items():
        if entry.start != position:
            where = f"the end of key {quote(before)}" if before is not None else "the end of the header"
            what = "leaves a hole" if entry.start > position else "overlaps"
            raise _lie(
                file,
                key,
                f"its bytes [{entry.start}, {entry.stop}) should begin at byte {position}, {where}: this {what}",
            )
        before, position = key, entry.stop
    if position != size:
        what = "is cut short" if size < position else "has bytes after its last tensor that no key describes"
        raise CatalogError(
            f"{file}: its tensors end at byte {position}, but the file has {size} bytes: it {what}. {advice()}."
        )


def _lie(file: str, key: str, what: str) -> CatalogError:
    return CatalogError(f"{file}: key {quote(key)}: {what}. {advice()}.")
