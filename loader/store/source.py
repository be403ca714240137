"""What is at the source: its catalog, its config, and what else lies beside. Rank 0 alone looks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from loader.errors import CatalogError
from loader.formats.index import MAX_INDEX, parse_index
from loader.formats.layout import Layout, assemble, choose, weight_files
from loader.formats.safetensors import HEAD, header_length, parse_header
from loader.formats.strict_json import parse_object
from loader.plan.catalog import Catalog, Entry, File
from loader.store.base import Stat
from loader.store.store import Store

CONFIG = "config.json"
_GUESSES = ("model.safetensors.index.json", "model.safetensors")


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
    weight_map = None
    if layout.index is not None:
        weight_map = parse_index(read_whole(store, layout.index, MAX_INDEX), file=layout.index)
        layout = Layout(layout.index, tuple(weight_files(weight_map, listed, index=layout.index, uri=store.uri)))
    with ThreadPoolExecutor(concurrency, thread_name_prefix="loader-catalog") as pool:
        read = list(pool.map(lambda numbered: _read_file(store, *numbered), enumerate(layout.files)))
    files, headers = [file for file, _ in read], [header for _, header in read]
    catalog = assemble(files, headers, weight_map=weight_map, index=layout.index)
    return Source(catalog, _read_config(store, listed), tuple(names))


def read_whole(store: Store, name: str, limit: int) -> bytes:
    """A small file of the directory. Raises CatalogError where it is not there, or over `limit` bytes; StoreError."""
    stat = _stat(store, name)
    if stat.size > limit:
        raise CatalogError(f"{name}: {stat.size} bytes; a checkpoint's has at most {limit}. Is it the right file?")
    return store.read_small(name, stat)


def _read_file(store: Store, number: int, name: str) -> tuple[File, dict[str, Entry]]:
    stat = _stat(store, name)
    head = bytearray(min(HEAD, stat.size))
    store.read(name, stat.pin, 0, memoryview(head))
    length = header_length(bytes(head), name, stat.size)
    if length > len(head):
        early = len(head)
        head.extend(bytes(length - early))
        store.read(name, stat.pin, early, memoryview(head)[early:])
    entries = parse_header(bytes(head[:length]), file=name, file_number=number, size=stat.size)
    return File(name, stat.size, stat.pin, length), entries


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
