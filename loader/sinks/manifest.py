"""What a directory of rank-local shards holds.

rank-00003.bin    the shards of rank 3, row-major, one after the other
rank-00003.json   its manifest: what lies where in it, and how it was laid out
complete.json     which run wrote them: it comes last, when every rank of the job has written
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from loader.errors import CatalogError

VERSION = 1
AGAIN = "run the init step again, with output.if_exists: overwrite where it finds these"

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Shard(_Part):
    """One tensor of a rank under all its `names`: `start` is its first byte in the file, the others its layout."""

    names: tuple[str, ...]
    start: int
    shape: list[int]
    dtype: str
    mesh: dict[str, int]
    coordinate: list[int] | None
    placements: list[str]
    local_shape: list[int]

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in _DTYPES:
            raise ValueError("torch has no such dtype")
        return name

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.local_shape) * self.torch_dtype.itemsize

    @property
    def layout(self) -> dict[str, Any]:
        return self.model_dump(exclude={"names", "start"})


class Complete(_Part):
    """The run that wrote the shards, by a number of its own."""

    run: str
    world_size: int


class Manifest(_Part):
    """One rank's shards: `size` is their file's in bytes, `uri`, `pins` and `fingerprint` are the report's."""

    version: int
    run: str
    rank: int
    world_size: int
    uri: str
    pins: dict[str, str]
    fingerprint: str | None
    size: int
    shards: tuple[Shard, ...]


def data_path(directory: str, rank: int) -> Path:
    return Path(directory, f"rank-{rank:05}.bin")


def manifest_path(directory: str, rank: int) -> Path:
    return Path(directory, f"rank-{rank:05}.json")


def complete_path(directory: str) -> Path:
    return Path(directory, "complete.json")


def read_complete(directory: str) -> Complete | None:
    """None where the shards in `directory` are not complete, or there are none. Raises CatalogError."""
    path = complete_path(directory)
    try:
        return Complete.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise CatalogError(f"{path} cannot be read: {_reason(error)}; {AGAIN}") from error


def read_manifest(directory: str, rank: int, world_size: int) -> Manifest:
    """This rank's manifest, held against its file and against what the directory says of itself.

    Raises CatalogError where there are no complete shards, or they are of another world size, damaged or cut short.
    """
    complete = read_complete(directory)
    if complete is None:
        found = "an output that was not finished" if Path(directory).is_dir() else "no such directory"
        raise CatalogError(
            f"{directory}: found {found}, expected rank-local shards: run the init step on this node, "
            f"with output.local: {directory}, and start the trainer when it has ended well"
        )
    if complete.world_size != world_size:
        raise CatalogError(
            f"{directory} holds the shards of {complete.world_size} ranks, and this job has {world_size}: "
            f"start {complete.world_size}, or {AGAIN}"
        )
    path = manifest_path(directory, rank)
    try:
        content = path.read_bytes()
        if (version := json.loads(content).get("version")) != VERSION:
            raise CatalogError(f"{path} is of version {version}, expected {VERSION}: {AGAIN}")
        manifest = Manifest.model_validate_json(content)
        size = data_path(directory, rank).stat().st_size
    except FileNotFoundError as error:
        raise CatalogError(
            f"{directory}: found no {Path(error.filename).name}, the shards of rank {rank}: start the same ranks on "
            f"the same nodes as the init step had, or {AGAIN}"
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise CatalogError(f"{path} cannot be read: {_reason(error)}; {AGAIN}") from error
    _check(manifest, path, complete.run, size)
    return manifest


def _check(manifest: Manifest, path: Path, run: str, size: int) -> None:
    if manifest.run != run:
        raise CatalogError(f"{path} is of another run than the rest of its directory: {AGAIN}")
    if size != manifest.size:
        raise CatalogError(
            f"{path.with_suffix('.bin')}: found {size} bytes, expected {manifest.size}: it was cut short or written "
            f"to; {AGAIN}"
        )
    for shard in manifest.shards:
        if min(shard.start, *shard.local_shape, 0) < 0 or shard.start + shard.size > size:
            end = shard.start + shard.size
            raise CatalogError(
                f"{path}: {shard.names[0]} is said to be bytes {shard.start} to {end} of {size}: {AGAIN}"
            )


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3])
    return f"{type(error).__name__}: {error}"
