"""Ways for a rank to get its shards of a checkpoint in a bucket: this loader's, and what is done without it.

Each fills `state` (DTensors by key) in place, or puts its own there. The peers are written as somebody would who knows
s3fs: connection pools raised, requests side by side, memory bounded.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import s3fs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from loader import load  # loads the loader's modules: `import loader` alone leaves that to the first load
from loader.report import Report

PIECE_BYTES = 16 << 20
"""A larger slice is read in several ranges, else one connection reads the embedding while the others are done."""

IN_FLIGHT = 16
"""Requests side by side, as many as this loader's default."""


class Job(NamedTuple):
    """What a rank is to load, from where. `scratch` is an empty directory of the host, `budget` bytes of memory,
    `read` settings of this loader alone."""

    uri: str
    storage_options: Mapping[str, Any]
    budget: int
    scratch: Path
    read: Mapping[str, Any]


def shared(job: Job, state: Mapping[str, DTensor]) -> Report:
    return _load(job, state, "world")


def by_node(job: Job, state: Mapping[str, DTensor]) -> Report:
    return _load(job, state, "node")


def alone(job: Job, state: Mapping[str, DTensor]) -> Report:
    return _load(job, state, "none")


def _load(job: Job, state: Mapping[str, DTensor], share: str) -> Report:
    options = {"storage_options": job.storage_options, "memory_budget": job.budget}
    return load(state, job.uri, share=share, **options, **job.read)


def slices(job: Job, state: Mapping[str, DTensor]) -> None:
    """Each rank reads the rows that it has a part of, with s3fs, in batches of half the budget.

    (s3fs holds a range twice for a moment: its chunks, and what it joins them to.)
    """
    fs = s3_of(job)
    _fill_slices(job, state, lambda *ranges: fs.cat_ranges(*ranges, batch_size=IN_FLIGHT, on_error="raise"))


def obstore_slices(job: Job, state: Mapping[str, DTensor]) -> None:
    """The same with obstore, in threads."""
    import obstore

    store = obstore.store.S3Store(
        job.uri.removeprefix("s3://").partition("/")[0],
        endpoint=job.storage_options["client_kwargs"]["endpoint_url"],
        access_key_id=job.storage_options["key"],
        secret_access_key=job.storage_options["secret"],
        region="us-east-1",
        client_options={"allow_http": True},
    )

    def read(path: str, start: int, stop: int) -> Any:
        return obstore.get_range(store, path.partition("/")[2], start=start, end=stop)

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        _fill_slices(job, state, lambda *ranges: list(pool.map(read, *ranges)))


def download(job: Job, state: Mapping[str, DTensor]) -> None:
    """Download to the host; then every rank loads from the local disk."""
    get(job)
    dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(job.scratch), thread_count=4))


def get(job: Job) -> None:
    """The host's ranks share the files out and download them with s3fs."""
    fs = s3_of(job)
    mine = fs.ls(job.uri, detail=False)[int(os.environ["LOCAL_RANK"]) :: int(os.environ["LOCAL_WORLD_SIZE"])]
    fs.get(mine, [str(job.scratch / Path(path).name) for path in mine], batch_size=IN_FLIGHT)
    dist.barrier()


def s3_of(job: Job) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(**job.storage_options, skip_instance_cache=True)


def part_of(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Where this rank's shard stands in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(map(slice, tensor.shape))
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))


Contender = Callable[[Job, MutableMapping[str, Any]], Report | None]


class _Piece(NamedTuple):
    """Whole rows of a key at bytes `[start, stop)` of a file; `columns` of them belong in `view`."""

    path: str
    start: int
    stop: int
    columns: tuple[slice, ...]
    shape: tuple[int, ...]
    view: torch.Tensor

    def fill(self, data: Any) -> None:
        with warnings.catch_warnings(action="ignore"):  # bytes cannot be written to, and are not
            rows = torch.frombuffer(data, dtype=self.view.dtype).view(self.shape)
        self.view.copy_(rows[(slice(None), *self.columns)])


def _fill_slices(job: Job, state: Mapping[str, DTensor], fetch: Callable[..., list[Any]]) -> None:
    """`fetch(paths, starts, stops)` gives the bytes of some ranges."""
    for batch in _batches(_pieces(s3_of(job), job.uri, state), job.budget // 2):
        found = fetch(*([getattr(piece, name) for piece in batch] for name in ("path", "start", "stop")))
        for piece in batch:
            piece.fill(found.pop(0))


def _pieces(fs: Any, uri: str, state: Mapping[str, DTensor]) -> Iterator[_Piece]:
    places = _places(fs, uri)
    for key, tensor in sorted(state.items(), key=lambda item: places[item[0]]):
        path, begin = places[key]
        rows, *columns = part_of(tensor)
        local, inner = tensor.to_local(), tuple(tensor.shape[1:])
        row_bytes = math.prod(inner) * tensor.dtype.itemsize
        step = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, len(local), step):
            view = local[first : first + step]
            start = begin + (rows.start + first) * row_bytes
            yield _Piece(path, start, start + len(view) * row_bytes, tuple(columns), (len(view), *inner), view)


def _batches(pieces: Iterator[_Piece], limit: int) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + piece.stop - piece.start > limit:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.stop - piece.start
    if batch:
        yield batch


def _places(fs: Any, uri: str) -> dict[str, tuple[str, int]]:
    """Every key's file and first byte, from the files' headers."""
    files = _files(fs, uri)
    lengths = [int.from_bytes(head, "little") for head in fs.cat_ranges(files, 0, 8, on_error="raise")]
    headers = fs.cat_ranges(files, 8, [8 + length for length in lengths], on_error="raise")
    return {
        key: (path, 8 + length + entry["data_offsets"][0])
        for path, length, header in zip(files, lengths, headers, strict=True)
        for key, entry in json.loads(header).items()
        if key != "__metadata__"
    }


def _files(fs: Any, uri: str) -> list[str]:
    return sorted(path for path in fs.ls(uri, detail=False) if path.endswith(".safetensors"))
