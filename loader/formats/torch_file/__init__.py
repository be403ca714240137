"""A file of torch.save (`.bin`, `.pt`, `.pth`) to catalog entries: its pickle is read, and not run."""

from __future__ import annotations

import io
from typing import NamedTuple

from loader.errors import CatalogError
from loader.formats.strict_json import advice, quote
from loader.formats.torch_file import legacy
from loader.formats.torch_file.pickled import MAX_PICKLE, unpickle
from loader.formats.torch_file.ranges import Fetch, Ranges
from loader.formats.torch_file.regions import lay_out
from loader.formats.torch_file.state_dict import state_dict
from loader.formats.torch_file.storages import RESAVE, storages_of
from loader.formats.torch_file.zipped import TAIL, Archive, Record
from loader.plan.catalog import Contents

_HEAD = 512
"""Bytes to tell what a file is that is no zip archive."""

_END = 22
"""Bytes of a zip archive's last record."""

_TAR = (b"sys_info", b"pickle", b"tensors", b"storages")


class TorchFile(NamedTuple):
    """What is in it; what of it is no tensor, in words; how many of its bytes had to be read for that; and, of
    an archive, the records of its pickle and its tensors."""

    contents: Contents
    left_out: list[str]
    header_bytes: int
    records: tuple[Record, ...] = ()


def read_torch_file(fetch: Fetch, *, file: str, file_number: int, size: int) -> TorchFile:
    """Find the tensors of `file`, of `size` bytes. `fetch` is asked for little else than directory, pickle and headers.

    Raises CatalogError, naming file and key, for what cannot be loaded by ranges, and what it lies about.
    """
    ranges = Ranges(fetch, size, MAX_PICKLE)
    records: list[Record] = []
    ranges.guess(size - TAIL, size)
    head = b"PK" if _ends_as_zip(ranges) else ranges.get(0, min(_HEAD, size))
    if head.startswith(b"PK"):
        archive = Archive(ranges, file)
        found = unpickle(io.BytesIO(archive.pickle()), file=file)
        saved = state_dict(found.value, file)
        storages = storages_of(found.persistent, file)
        located = archive.locate([storages[key] for key in dict.fromkeys(t.storage for t in saved.tensors)])
        starts = {key: record.start for key, record in located.items()}
        records = [archive.read, *located.values()]
    elif head.startswith(legacy.STARTS):
        pickles = legacy.read_pickles(ranges, file)
        saved = state_dict(pickles.found.value, file)
        storages = storages_of(pickles.found.persistent, file)
        starts = legacy.locate(ranges, file, pickles, storages)
    else:
        raise CatalogError(f"{file}: not a file of torch.save: {_told(head)}.")
    contents = lay_out(saved.tensors, starts, storages, file_number)
    return TorchFile(contents, saved.left_out, ranges.asked, tuple(records))


def _ends_as_zip(ranges: Ranges) -> bool:
    """Torch's archives have no comment behind the end of the directory: the file's first bytes need not be read."""
    return ranges.get(max(0, ranges.size - _END), ranges.size).startswith(b"PK\x05\x06")


def _told(head: bytes) -> str:
    if head[257:262] == b"ustar" or head.partition(b"\0")[0] in _TAR:
        return f"a tar archive, which torch wrote before 0.1.13, and which cannot be loaded by ranges. {RESAVE}"
    return f"it begins with {quote(head[:16])}. {advice(head)}"
