"""What is in a checkpoint: every key's dtype, shape, file and byte range, and each file's size and pin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Catalog:
    """The files, and the keys by name in checkpoint order (file by file, by offset)."""

    files: tuple[File, ...]
    entries: Mapping[str, Entry]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)
