"""What torch.save writes since 1.6: a zip archive whose records are stored, not compressed.

    archive/data.pkl, archive/byteorder, archive/.format_version, archive/data/0, archive/data/1, ..., archive/version

Where a record's bytes begin is said in its local header, which torch pads so that they are aligned to 64 bytes. The
directory at the end says where that header is, and how long the record.
"""

from __future__ import annotations

import itertools
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import NamedTuple

from loader.errors import CatalogError
from loader.formats.strict_json import advice, quote
from loader.formats.torch_file.pickled import MAX_PICKLE
from loader.formats.torch_file.ranges import Ranges, Span
from loader.formats.torch_file.storages import RESAVE, Storage
from loader.ground.crc import crc

TAIL = 16 * 1024
"""Bytes of the file's end to read before its directory's size is known: a record takes about 100."""

_LOCAL = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of name and extra field
_ENCRYPTED, _UTF8 = 0x1, 0x800

_BAD = (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, RuntimeError, struct.error)
"""What `zipfile` raises for what is no zip archive. A range that cannot be read is none of these."""


class Record(NamedTuple):
    """A record: its header begins at `header`, its bytes at `start`. Their CRC-32 is `crc`, as the directory says;
    `found` is what it was, where they were read."""

    name: str
    header: int
    start: int
    stop: int
    crc: int = 0
    found: int | None = None


class Archive:
    """The directory of `ranges`, which is the checkpoint's `file`. Raises CatalogError for what is no such archive."""

    def __init__(self, ranges: Ranges, file: str) -> None:
        self.file = file
        self._ranges = ranges
        try:
            with zipfile.ZipFile(ranges) as archive:
                self._infos = archive.infolist()
                self._end = archive.start_dir
        except _BAD as error:
            raise self._refused(f"its directory cannot be read: {quote(str(error))}. {advice()}") from error
        self._by_name = {info.orig_filename: info for info in self._infos}
        if len(self._by_name) < len(self._infos):
            raise self._refused(f"two records of its directory have one name. {advice()}")
        self._prefix = self._infos[0].orig_filename.partition("/")[0] if self._infos else ""
        self._check_kind()

    def pickle(self) -> bytes:
        """The pickle, whose record is then `read`; the byte order was found to be little before. Files from before
        torch 2.1 do not say it."""
        name, order = self._name("data.pkl"), self._name("byteorder")
        small = [each for each in (name, order) if each in self._by_name]
        if self._by_name[name].file_size > MAX_PICKLE:
            raise self._refused(f"its pickle has more than {MAX_PICKLE} bytes. Is it a checkpoint?")
        headers = sorted(info.header_offset for info in self._infos)
        self._ranges.want([self._whole(self._by_name[each], headers) for each in small])
        records = self._locate(small)
        if order in records:
            told = self._ranges.get(records[order].start, min(records[order].stop, records[order].start + 16))
            if told != b"little":
                raise self._refused(f"its byte order is {quote(told)}, and little is what can be loaded. {RESAVE}")
        data = self._ranges.get(records[name].start, records[name].stop)
        self.read = records[name]._replace(found=crc("CRC32", data))
        return data

    def locate(self, storages: Collection[Storage]) -> dict[str, Record]:
        """The record of each of the storages, by its key.

        Raises CatalogError for one that is missing, compressed, of another size, or overlaps another record.
        """
        names = {storage.key: self._name(f"data/{storage.key}") for storage in storages}
        for key, nbytes, _ in storages:
            info = self._by_name.get(names[key])
            if info is None:
                told = f"storage {quote(key)}, but there is no record {quote(names[key])}"
                raise self._refused(f"its pickle refers to {told}. {advice()}")
            if info.file_size != nbytes:
                told = f"record {quote(names[key])} has {info.file_size} bytes, and its pickle says {nbytes}"
                raise self._refused(f"{told}. {advice()}")
        records = self._locate(list(names.values()))
        return {key: records[name] for key, name in names.items()}

    def _whole(self, info: zipfile.ZipInfo, headers: Sequence[int]) -> Span:
        """From a record's header to the next's: its local header need not be read before its bytes."""
        after = bisect_right(headers, info.header_offset)
        end = headers[after] if after < len(headers) else self._end
        most = info.header_offset + info.file_size + 2 * 65536  # the most that name and extra field can be
        return max(0, min(info.header_offset, self._end)), max(0, min(end, most, self._end))

    def _name(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _check_kind(self) -> None:
        if self._name("constants.pkl") in self._by_name:
            raise self._refused("it is a TorchScript archive. Save torch.jit.load(path).state_dict() with torch.save")
        if self._name("data.pkl") not in self._by_name:
            raise self._refused(
                f"it has no record {quote(self._name('data.pkl'))}, which torch.save writes. {advice()}"
            )

    def _locate(self, names: Sequence[str]) -> dict[str, Record]:
        """Where the records' bytes are, by their names, from their local headers; without overlaps."""
        infos = [self._by_name[name] for name in names]
        for info in infos:
            self._check_stored(info)
        heads = [(info.header_offset, info.header_offset + _LOCAL.size + len(_raw_name(info))) for info in infos]
        try:
            self._ranges.want(heads)
            records = [self._record(info, self._ranges.get(*head)) for info, head in zip(infos, heads, strict=True)]
        except ValueError as error:
            raise self._refused(f"its directory points elsewhere: {error}. {advice()}") from error
        records.sort(key=lambda record: record.header)
        for one, other in itertools.pairwise([*records, Record("the directory", self._end, self._end, self._end)]):
            if one.stop > other.header:
                raise self._refused(f"record {quote(one.name)} overlaps {quote(other.name)}. {advice()}")
        return {record.name: record for record in records}

    def _check_stored(self, info: zipfile.ZipInfo) -> None:
        name = quote(info.orig_filename)
        if info.flag_bits & _ENCRYPTED:
            raise self._refused(f"record {name} is encrypted. {RESAVE}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise self._refused(
                f"record {name} is compressed ({info.compress_size} of {info.file_size} bytes): ranges of it cannot be "
                "read. Save it again with torch.save, which stores, or unpack it and zip it with `zip -0`"
            )

    def _record(self, info: zipfile.ZipInfo, head: bytes) -> Record:
        """The local header must say what the directory says; only it tells how long its extra field is."""
        told = quote(info.orig_filename)
        signature, flags, method, name, extra = _LOCAL.unpack_from(head)
        if signature != b"PK\x03\x04" or method != info.compress_type or flags & _ENCRYPTED:
            raise ValueError(f"no local header of {told} begins at byte {info.header_offset}")
        if name != len(head) - _LOCAL.size or head[_LOCAL.size :] != _raw_name(info):
            raise ValueError(f"the local header at byte {info.header_offset} has another name than {told}")
        start = info.header_offset + _LOCAL.size + name + extra
        return Record(info.orig_filename, info.header_offset, start, start + info.file_size, info.CRC)

    def _refused(self, what: str) -> CatalogError:
        return CatalogError(f"{self.file}: {what}.")


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
