"""Filled tensors as a torch.distributed.checkpoint (DCP): flat FQNs, which `dcp.load` reads back in any world size."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from loader.errors import LoaderError, SinkError
from loader.ground.uri import public_uri
from loader.plan.geometry import Box, whole
from loader.sinks import directory

PIECE_BYTES = 32 << 20
"""A larger shard is written in pieces, for DCP copies what it writes unless it is a whole storage in host memory."""
FILE_BYTES = 128 << 20
"""A rank begins another file then, for DCP keeps those copies until the file is written."""
PART_BYTES = 8 << 20
"""What fsspec uploads at once. Of s3fs's own 50 MB, several were held: 480 MiB at the worst, where this takes 175."""


class Filled(Protocol):
    """What is saved, as `loader.place` makes it: the local `tensor` of a global one of `shape`, under each of `names`.

    `boxes` are the regions held, each with its offsets in `tensor`; none where this rank holds nothing.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def tensor(self) -> Tensor: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def boxes(self) -> Sequence[tuple[Box, tuple[int, ...]]]: ...


class Saving:
    """One rank's part in writing `targets` of all ranks to the directory `url`, after `directory.prepare` on one rank.

    Its steps are DCP's own; what goes between ranks is the caller's to carry (`loader.stream.save`), so that no rank
    waits in a collective for one that is lost. Rank 0 joins the ranks' plans, and finishes. What several ranks hold is
    written by one of them, a tied tensor under each of its names. `.metadata` is written when all else is.

    Each step raises SinkError, or what `go_on` does: it is called before anything appears at `url`. Where any did,
    `directory.discard` is to be called.
    """

    def __init__(
        self, targets: Iterable[Filled], url: str, rank: int, go_on: Callable[[], None] = lambda: None
    ) -> None:
        self._url = url
        self._go_on = go_on
        self._rank = rank
        self._targets = tuple(targets)
        self._planner = _Planner(self._targets)
        self._metadata: Metadata | None = None

    def plan(self) -> SavePlan:
        """What this rank could write."""
        with self._told():
            self._writer = _Writer(self._url, self._go_on)
            self._writer.reset()
            first = self._rank == 0
            self._planner.set_up_planner({}, self._writer.storage_meta(), is_coordinator=first)
            self._writer.set_up_storage_writer(first)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def join(self, plans: list[SavePlan]) -> list[SavePlan]:
        """What each rank is to write, of what each could: on rank 0."""
        with self._told():
            joined, self._metadata = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(joined)

    def write(self, plan: SavePlan) -> list[WriteResult]:
        """Write this rank's plan."""
        with self._told(), self._on_the_shards_device():
            return self._writer.write_data(self._planner.finish_plan(plan), self._planner).value()

    def finish(self, results: list[list[WriteResult]]) -> None:
        """All that any rank was to write is written: on rank 0."""
        assert self._metadata is not None, "it has joined the plans"
        with self._told():
            self._writer.finish(self._metadata, results)
            directory.finish(self._url)

    def _on_the_shards_device(self) -> AbstractContextManager[object]:
        """DCP's streams are of the thread's current device."""
        devices = (target.tensor.device for target in self._targets if target.tensor.is_cuda)
        device = next(devices, None)
        return torch.cuda.device(device) if device else nullcontext()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except LoaderError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".replace(self._url, public_uri(self._url))
            raise SinkError(
                f"{public_uri(self._url)}: rank {self._rank} could not write the checkpoint: {reason}", rank=self._rank
            ) from error


class _Planner(DefaultSavePlanner):
    """Plans pieces of boxes, where DCP takes a DTensor's shard for one box: under `_StridedShard` it can be several."""

    def __init__(self, targets: Sequence[Filled]) -> None:
        super().__init__()
        self._targets = targets
        self._pieces: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for target in self._targets:
            properties = TensorProperties.create_from_tensor(target.tensor)
            for box, piece in _pieces(target):
                chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
                data = TensorWriteData(chunk, properties, torch.Size(target.shape))
                for name in target.names:
                    index = MetadataIndex(name, chunk.offsets)
                    self._pieces[index] = piece
                    items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        names = {name: (name,) for target in self._targets for name in target.names}
        return SavePlan(items, planner_data=names)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._pieces[index]


def _pieces(target: Filled) -> Iterator[tuple[Box, Tensor]]:
    """What this rank holds: boxes of at most PIECE_BYTES, with views of the local tensor. An empty tensor has one."""
    if 0 in target.shape:
        yield whole(target.shape), target.tensor.new_empty(target.shape)
    for box, local_offsets in target.boxes:
        origin = [offset - local for offset, local in zip(box.offsets, local_offsets, strict=True)]
        for part in _cut(box, PIECE_BYTES // target.tensor.element_size()):
            yield part, target.tensor[part.slices(origin)]


def _cut(box: Box, most: int) -> Iterator[Box]:
    """`box` in boxes of at most `most` elements, cut along the first dim, and deeper where one row is more.

    Sizes (3, 4), most 8: rows 0-1, row 2. Most 2: columns 0-1 and 2-3 of each row.
    """
    if box.numel <= most:
        yield box
        return
    dim = next(d for d, size in enumerate(box.sizes) if size > 1)
    offset, size = box.offsets[dim], box.sizes[dim]
    step = max(1, most * size // box.numel)
    for start in range(0, size, step):
        part = (offset + start, min(step, size - start))
        offsets, sizes = ((*old[:dim], new, *old[dim + 1 :]) for old, new in zip(box, part, strict=True))
        yield from _cut(Box(offsets, sizes), most)


class _Files(FileSystem):
    fs: Any

    def __init__(self, go_on: Callable[[], None]) -> None:
        super().__init__()
        self._go_on = go_on

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        self._go_on()
        with self.fs.open(os.fspath(path), mode, block_size=PART_BYTES) as stream:
            yield stream

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._go_on()
        super().rename(path, new_path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        directory.make(self.fs, os.fspath(path))


class _Writer(FsspecWriter):
    """Writes files of about FILE_BYTES, and makes no buckets."""

    def __init__(self, url: str, go_on: Callable[[], None]) -> None:
        super().__init__(url)
        files = _Files(go_on)
        self.path = files.init_path(url)
        # Elsewhere DCP would `os.sync` the whole machine for want of a file descriptor.
        self.sync_files = isinstance(files.fs, LocalFileSystem)
        self.fs = files  # type: ignore[assignment]  # as FsspecWriter itself does

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_by_file(plan.items)):
            prefix: Any = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(replace(plan, items=items, storage_data=prefix), planner).value()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _by_file(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    file: list[WriteItem] = []
    size = 0
    for item in items:
        size += item.tensor_storage_size() or 0
        if file and size > FILE_BYTES:
            yield file
            file, size = [], item.tensor_storage_size() or 0
        file.append(item)
    if file:
        yield file
