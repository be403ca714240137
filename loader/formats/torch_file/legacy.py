"""What torch.save wrote before 1.6, and writes with _use_new_zipfile_serialization=False.

Five pickles: a magic number, the protocol, what wrote it, the object, the storages' keys. Then the storages in the
order of those keys, each its number of items (8 bytes, little-endian) and its bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from loader.errors import CatalogError
from loader.formats.strict_json import advice, quote
from loader.formats.torch_file.machine import Dict
from loader.formats.torch_file.pickled import PickleStream, Unpickled, unpickle
from loader.formats.torch_file.ranges import Ranges
from loader.formats.torch_file.storages import RESAVE, Storage

STARTS = (b"\x80", b"L119547037146038801333356L\n")
"""What such a file begins with: pickle protocol 2 or later, or the magic number in protocol 1."""

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_COUNT = 8


class Pickles(NamedTuple):
    """The object, the storages' keys in the file's order, and the byte where the first storage begins."""

    found: Unpickled
    keys: list[str]
    end: int


def read_pickles(ranges: Ranges, file: str) -> Pickles:
    """Raises CatalogError for what is no such file."""
    ranges.seek(0)
    stream = PickleStream(ranges)
    if (magic := _next(stream, file)) != _MAGIC:
        raise CatalogError(f"{file}: a pickle, but not of torch.save: it begins with {quote(magic)}. {advice()}.")
    if (protocol := _next(stream, file)) != _PROTOCOL:
        raise CatalogError(
            f"{file}: torch.save's protocol {_PROTOCOL} was expected, found {quote(protocol)}. {RESAVE}."
        )
    wrote = _next(stream, file)
    if not isinstance(wrote, Dict) or ("little_endian", True) not in wrote.pairs:
        raise CatalogError(f"{file}: it is not said to be little-endian, which is what can be loaded. {RESAVE}.")
    found = unpickle(stream, file=file)
    keys = _next(stream, file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len({*keys}) < len(keys):
        raise CatalogError(f"{file}: the list of its storages is none. {advice()}.")
    return Pickles(found, keys, stream.tell())


def _next(stream: PickleStream, file: str) -> Any:
    return unpickle(stream, file=file).value


def locate(ranges: Ranges, file: str, pickles: Pickles, storages: dict[str, Storage]) -> dict[str, int]:
    """The byte where each storage begins. Raises CatalogError where the file is not as long as the pickles say, or
    a storage's number of items is another."""
    starts: dict[str, int] = {}
    at = pickles.end
    if {*pickles.keys} != {*storages}:
        raise CatalogError(f"{file}: the list of its storages is not that of its pickle. {advice()}.")
    for key in pickles.keys:
        starts[key] = at + _COUNT
        at += _COUNT + storages[key].nbytes
    if at != ranges.size:
        raise CatalogError(f"{file}: its storages end at byte {at}, but it has {ranges.size} bytes. {advice()}.")
    ranges.want([(start - _COUNT, start) for start in starts.values()])
    for key, start in starts.items():
        count = int.from_bytes(ranges.get(start - _COUNT, start), "little")
        if count * storages[key].itemsize != storages[key].nbytes:
            raise CatalogError(
                f"{file}: storage {quote(key)} at byte {start} has {count} items of {storages[key].itemsize} bytes, "
                f"and its pickle says {storages[key].nbytes} bytes. {advice()}."
            )
    return starts
