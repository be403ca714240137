"""Filled tensors as files of the node: each rank its own shards, for the process that comes after it."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from loader.errors import ConfigError, SinkError
from loader.plan.geometry import portions, whole
from loader.sinks.manifest import VERSION, Complete, Manifest, Shard, complete_path, data_path, manifest_path

ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype needs."""
PIECE_BYTES = 8 << 20
"""What is copied at once of what is not row-major in host memory; between pieces the caller may end it."""


class Local(Protocol):
    """What is saved: this rank's `local` tensor, under each of `names`."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def local(self) -> Tensor: ...


def size_of(shards: Iterable[Local]) -> int:
    """Bytes of the file that they make."""
    return sum(_padded(shard.local.nbytes) for shard in shards)


def check_room(directory: str, needed: int) -> None:
    """Raise ConfigError where `directory`, which exists, has no room for `needed` bytes, of all ranks of the node."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"output.local: {directory} has {free / 1e9:.3f} GB free, and the shards of this node's ranks take "
            f"{needed / 1e9:.3f} GB: free some, make it larger (of /dev/shm, which is memory: mount -o remount,size=…; "
            "on Kubernetes the emptyDir's sizeLimit), or name another directory"
        )


def save(
    shards: Sequence[tuple[Local, Mapping[str, Any]]],
    directory: str,
    *,
    rank: int,
    world_size: int,
    about: Mapping[str, Any],
    spend: bool,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Write this rank's `shards`, each with its layout, and their manifest into `directory`, which exists.

    `about` are the manifest's `run`, `uri`, `pins` and `fingerprint`. With `spend` a tensor's memory is given back as
    soon as it is written: where the directory is memory too, both would not fit. `go_on` is called between pieces, and
    may raise. Raises SinkError, naming the file. What is written counts when `finish` was called on each node.
    """
    path = data_path(directory, rank)
    uses = Counter(_storage(shard) for shard, _ in shards)
    listed: list[Shard] = []
    try:
        with path.open("wb") as file:
            for shard, layout in shards:
                listed.append(Shard(names=shard.names, start=file.tell(), **layout))
                _write(file, shard.local, go_on)
                uses[_storage(shard)] -= 1
                storage = shard.local.untyped_storage()
                if spend and not uses[_storage(shard)] and storage.resizable():
                    storage.resize_(0)
            size = file.tell()
            _to_disk(file)
        manifest = Manifest(version=VERSION, rank=rank, world_size=world_size, size=size, shards=tuple(listed), **about)
        _put(manifest_path(directory, rank), manifest.model_dump_json().encode())
    except OSError as error:
        raise SinkError(f"output.local: {path} cannot be written: {type(error).__name__}: {error}") from error


def finish(directory: str, run: str, *, rank: int, world_size: int) -> None:
    """Say that the shards are complete, for one rank of each node, once all ranks of the job have saved. Raises
    SinkError. `directory.finish` is to be called when that was said on every node."""
    path = complete_path(directory)
    try:
        unfinished = path.with_suffix(f".json.{rank}.tmp")  # nodes may share the directory
        _put(unfinished, Complete(run=run, world_size=world_size).model_dump_json().encode())
        unfinished.replace(path)
    except OSError as error:
        raise SinkError(f"output.local: {path} cannot be written: {type(error).__name__}: {error}") from error


def _write(file: BinaryIO, local: Tensor, go_on: Callable[[], None]) -> None:
    """The tensor's elements in row-major order, and zeros up to the next shard's place."""
    staging = None
    for part in portions(whole(local.shape), PIECE_BYTES // local.element_size()):
        go_on()
        piece = local[part.slices()].contiguous().flatten().view(torch.uint8)
        if piece.device.type != "cpu":
            if staging is None:
                staging = torch.empty(min(PIECE_BYTES, local.nbytes), dtype=torch.uint8, pin_memory=True)
            piece = staging[: piece.numel()].copy_(piece)
        # Not through numpy: a storage that it has seen cannot be given back.
        file.write((ctypes.c_uint8 * piece.numel()).from_address(piece.data_ptr()))
    file.write(bytes(_padded(local.nbytes) - local.nbytes))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _storage(shard: Local) -> object:
    return shard.local.untyped_storage()._cdata  # noqa: SLF001 - the storage's identity; an empty one has no address


def _put(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _to_disk(file)


def _to_disk(file: BinaryIO) -> None:
    """So that after a power failure no file is there that only says it is whole. In memory it is no work."""
    file.flush()
    os.fsync(file.fileno())
