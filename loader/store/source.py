"""What is at the source: its catalog, its config, and what else lies beside. Rank 0 alone looks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from loader.errors import CatalogError
from loader.formats.hf_config import parse_config
from loader.formats.index import MAX_INDEX, parse_index
from loader.formats.layout import FORMATS, Layout, assemble, choose, is_torch, weight_files
from loader.formats.safetensors import HEAD, header_length, parse_header
from loader.formats.torch_file import read_torch_file
from loader.formats.torch_file.ranges import Span
from loader.formats.torch_file.zipped import Record
from loader.ground.crc import crc
from loader.plan.catalog import Catalog, Contents, File
from loader.plan.claims import Claim, Claims
from loader.store.base import Stat
from loader.store.store import Store

CONFIG = "config.json"
MAX_CODE = 1 << 20
"""Bytes of a Python module: transformers' own largest has a quarter of it."""
_GUESSES = [name for form in FORMATS for name in (form.index, form.one)]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """`hf_config` is the parsed `config.json`, None where there is none; `names` are the directory's files; `claims`
    are what is to be checked of the catalog's, None where nothing is; `code` the sources that `config.json` names, and
    those beside them, by module, where they are trusted."""

    catalog: Catalog
    hf_config: dict[str, Any] | None
    names: tuple[str, ...]
    claims: Claims | None
    code: dict[str, str]


class _Catalogued(NamedTuple):
    """A file, what is in it, and what it or the bucket claims of its bytes, or why that is nothing."""

    file: File
    contents: Contents
    claims: list[Claim] | str


def read_source(store: Store, concurrency: int, *, checksums: bool = False, code: bool = False) -> Source:
    """Read config, index and all headers, `concurrency` files side by side, and pin every file; with `checksums` find
    what these are claimed to be, with `code` read what comes with them.

    Raises CatalogError for whatever is missing or contradicts itself; StoreError.
    """
    listed = store.names()
    names = listed if listed is not None else [name for name in _GUESSES if store.stat(name) is not None]
    layout = Layout(None, tuple(names)) if store.only is not None else choose(names, store.uri)
    if layout.passed_over:
        chosen = layout.index or ", ".join(layout.files[:3]) + (", ..." if len(layout.files) > 3 else "")
        _log.warning("%s: %s is loaded, and not %s", store.uri, chosen, ", ".join(layout.passed_over[:10]))
    weight_map = None
    if layout.index is not None:
        weight_map = parse_index(read_whole(store, layout.index, MAX_INDEX), file=layout.index)
        layout = Layout(layout.index, tuple(weight_files(weight_map, listed, index=layout.index, uri=store.uri)))
    with (
        ThreadPoolExecutor(concurrency, thread_name_prefix="loader-catalog") as pool,
        ThreadPoolExecutor(concurrency, thread_name_prefix="loader-headers") as headers_pool,
    ):
        reader = _Reader(store, headers_pool, checksums=checksums)
        read = list(pool.map(lambda numbered: reader.read(*numbered), enumerate(layout.files)))
    files, headers = [each.file for each in read], [each.contents for each in read]
    catalog = assemble(files, headers, weight_map=weight_map, index=layout.index)
    config = _read_config(store, listed)
    claims = _claims(read) if checksums else None
    return Source(catalog, config, tuple(names), claims, _read_code(store, listed, config or {}) if code else {})


def _claims(read: Sequence[_Catalogued]) -> Claims:
    claimed = [each for file in read if not isinstance(file.claims, str) for each in file.claims]
    return Claims(tuple(claimed), {n: file.claims for n, file in enumerate(read) if isinstance(file.claims, str)})


def read_whole(store: Store, name: str, limit: int) -> bytes:
    """A small file of the directory. Raises CatalogError where it is not there, or over `limit` bytes; StoreError."""
    stat = _stat(store, name)
    if stat.size > limit:
        raise CatalogError(f"{name}: {stat.size} bytes; a checkpoint's has at most {limit}. Is it the right file?")
    return store.read_small(name, stat)


class _Reader:
    """Reads what says where a file's tensors are. `pool` reads ranges of one file side by side."""

    def __init__(self, store: Store, pool: ThreadPoolExecutor, *, checksums: bool) -> None:
        self._store = store
        self._pool = pool
        self._checksums = checksums

    def read(self, number: int, name: str) -> _Catalogued:
        stat = _stat(self._store, name)
        self._store.expect(stat.size)
        return (self._torch_file if is_torch(name) else self._safetensors)(number, name, stat)

    def _safetensors(self, number: int, name: str, stat: Stat) -> _Catalogued:
        head = self._range(name, stat, (0, min(HEAD, stat.size)))
        length = header_length(head, name, stat.size)
        if length > len(head):
            head += self._range(name, stat, (len(head), length))
        contents = Contents(parse_header(head[:length], file=name, file_number=number, size=stat.size))
        claims: list[Claim] | str = []
        if self._checksums:
            told = self._store.checksum(name, stat.pin)
            claims = (
                told
                if isinstance(told, str)
                else [Claim(number, 0, stat.size, *told, known=length, crc=crc(told.algorithm, head[:length]))]
            )
        return _Catalogued(File(name, stat.size, stat.pin, length), contents, claims)

    def _torch_file(self, number: int, name: str, stat: Stat) -> _Catalogued:
        def fetch(spans: Sequence[Span]) -> list[bytes]:
            return list(self._pool.map(lambda span: self._range(name, stat, span), spans))

        found = read_torch_file(fetch, file=name, file_number=number, size=stat.size)
        if found.left_out:
            _log.warning("%s: left out, for it is no tensor: %s", name, ", ".join(found.left_out[:10]))
        file = File(name, stat.size, stat.pin, found.header_bytes)
        return _Catalogued(file, found.contents, _records(number, found.records))

    def _range(self, name: str, stat: Stat, span: Span) -> bytes:
        buffer = bytearray(span[1] - span[0])
        self._store.read(name, stat.pin, span[0], memoryview(buffer))
        return bytes(buffer)


def _records(number: int, records: Sequence[Record]) -> list[Claim] | str:
    """What an archive's directory claims of the records, with those that were read as known."""
    if not any(record.crc for record in records):
        return (
            "it was saved without CRCs (torch.serialization.set_crc32_options)"
            if records
            else ("torch's older format has no checksums of its tensors")
        )
    return sorted(
        Claim(number, each.start, each.stop, "CRC32", each.crc, known, each.found or 0)
        for each in records
        for known in [each.start if each.found is None else each.stop]
        if each.stop > each.start
    )


def _read_config(store: Store, listed: Sequence[str] | None) -> dict[str, Any] | None:
    if listed is not None and CONFIG not in listed and store.only is None:
        return None
    if store.stat(CONFIG) is None:
        return None
    return parse_config(read_whole(store, CONFIG, MAX_INDEX), file=CONFIG)


def _read_code(store: Store, listed: Sequence[str] | None, config: Mapping[str, Any]) -> dict[str, str]:
    """The directory's Python modules, or those that the config names where it cannot be listed; none where it names
    none."""
    named = {str(each).rpartition(".")[0] for each in (config.get("auto_map") or {}).values()}
    there = {name.removesuffix(".py") for name in listed if name.endswith(".py")} if listed is not None else named
    modules = sorted(each for each in there if each.isidentifier()) if named else []
    try:
        return {each: read_whole(store, f"{each}.py", MAX_CODE).decode() for each in modules}
    except UnicodeDecodeError as error:
        raise CatalogError(f"{store.uri}: a .py file beside config.json is no text: {error}") from error


def _stat(store: Store, name: str) -> Stat:
    stat = store.stat(name)
    if stat is None:
        there = store.beside()
        beside = "" if there is None else f"; there are {', '.join(there[:20]) or 'no files'}"
        raise CatalogError(f"{store.uri}: no file {name}{beside}. Check the URI, or upload what is missing")
    return stat
