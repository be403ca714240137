"""What is at the source: its catalog, its config, and what else lies beside. Rank 0 alone looks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from loader.errors import CatalogError
from loader.formats.index import MAX_INDEX, parse_index
from loader.formats.layout import FORMATS, Layout, assemble, choose, is_torch, weight_files
from loader.formats.safetensors import HEAD, header_length, parse_header
from loader.formats.strict_json import parse_object
from loader.formats.torch_file import read_torch_file
from loader.formats.torch_file.ranges import Span
from loader.plan.catalog import Catalog, Contents, File
from loader.store.base import Stat
from loader.store.store import Store

CONFIG = "config.json"
_GUESSES = [name for form in FORMATS for name in (form.index, form.one)]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """`hf_config` is the parsed `config.json`, None where there is none; `names` are the directory's files."""

    catalog: Catalog
    hf_config: dict[str, Any] | None
    names: tuple[str, ...]


def read_source(store: Store, concurrency: int) -> Source:
    """Read config, index and all headers, `concurrency` files side by side, and pin every file.

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
        reader = _Reader(store, headers_pool)
        read = list(pool.map(lambda numbered: reader.read(*numbered), enumerate(layout.files)))
    files, headers = [file for file, _ in read], [header for _, header in read]
    catalog = assemble(files, headers, weight_map=weight_map, index=layout.index)
    return Source(catalog, _read_config(store, listed), tuple(names))


def read_whole(store: Store, name: str, limit: int) -> bytes:
    """A small file of the directory. Raises CatalogError where it is not there, or over `limit` bytes; StoreError."""
    stat = _stat(store, name)
    if stat.size > limit:
        raise CatalogError(f"{name}: {stat.size} bytes; a checkpoint's has at most {limit}. Is it the right file?")
    return store.read_small(name, stat)


class _Reader:
    """Reads what says where a file's tensors are. `pool` reads ranges of one file side by side."""

    def __init__(self, store: Store, pool: ThreadPoolExecutor) -> None:
        self._store = store
        self._pool = pool

    def read(self, number: int, name: str) -> tuple[File, Contents]:
        stat = _stat(self._store, name)
        read = self._torch_file if is_torch(name) else self._safetensors
        contents, header_bytes = read(number, name, stat)
        return File(name, stat.size, stat.pin, header_bytes), contents

    def _safetensors(self, number: int, name: str, stat: Stat) -> tuple[Contents, int]:
        head = self._range(name, stat, (0, min(HEAD, stat.size)))
        length = header_length(head, name, stat.size)
        if length > len(head):
            head += self._range(name, stat, (len(head), length))
        return Contents(parse_header(head[:length], file=name, file_number=number, size=stat.size)), length

    def _torch_file(self, number: int, name: str, stat: Stat) -> tuple[Contents, int]:
        def fetch(spans: Sequence[Span]) -> list[bytes]:
            return list(self._pool.map(lambda span: self._range(name, stat, span), spans))

        found = read_torch_file(fetch, file=name, file_number=number, size=stat.size)
        if found.left_out:
            _log.warning("%s: left out, for it is no tensor: %s", name, ", ".join(found.left_out[:10]))
        return found.contents, found.header_bytes

    def _range(self, name: str, stat: Stat, span: Span) -> bytes:
        buffer = bytearray(span[1] - span[0])
        self._store.read(name, stat.pin, span[0], memoryview(buffer))
        return bytes(buffer)


def _read_config(store: Store, listed: Sequence[str] | None) -> dict[str, Any] | None:
    if listed is not None and CONFIG not in listed and store.only is None:
        return None
    if store.stat(CONFIG) is None:
        return None
    return parse_object(read_whole(store, CONFIG, MAX_INDEX), file=CONFIG, what="the config")


def _stat(store: Store, name: str) -> Stat:
    stat = store.stat(name)
    if stat is None:
        there = store.beside()
        beside = "" if there is None else f"; there are {', '.join(there[:20]) or 'no files'}"
        raise CatalogError(f"{store.uri}: no file {name}{beside}. Check the URI, or upload what is missing")
    return stat
