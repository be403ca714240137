"""What is in a checkpoint: every key's dtype, shape, file and byte range, and each file's size and pin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class File:
    """One `.safetensors` or `.bin` object.

    `name` is relative to the source directory; `size` is in bytes; `pin` fixes the object's version (an ETag, a
    generation, …: only the store that made it can read it); `header_bytes` is how much was read to catalogue it.
    """

    name: str
    size: int
    pin: str
    header_bytes: int


class Entry(NamedTuple):
    """One key: elements of `dtype` in row-major order at bytes `[start, stop)` of file number `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class View(NamedTuple):
    """A key that is stored otherwise than it is seen: not row-major, or with others in one entry.

    Its element (i, j, ...) is element `offset + i * strides[0] + j * strides[1] + ...` of the row-major entry that has
    the name `entry`.
    """

    entry: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


class Contents(NamedTuple):
    """What is in one file, as in a Catalog."""

    entries: Mapping[str, Entry]
    views: Mapping[str, View] = {}


@dataclass(frozen=True, slots=True)
class Catalog:
    """The files, and what is stored by name in checkpoint order (file by file, by offset).

    Every entry is a key as it stands, unless `views` has its name, or other names for it.
    """

    files: tuple[File, ...]
    entries: Mapping[str, Entry]
    views: Mapping[str, View] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, Entry | View]:
        """Every key, by its name: an entry that is a key by itself has the same number here as among the entries."""
        return {**self.entries, **self.views}

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)
