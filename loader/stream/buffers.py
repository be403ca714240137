"""Reused host memory: a round's buffers are cut from one slot, whose pages are touched once."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype needs."""

_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}


def own_memory(size: int) -> Tensor:
    """`size` bytes (uint8) that go back to the system when they are let go.

    Not from malloc, which keeps what is freed, for other sizes than are asked for next.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANON), dtype=torch.uint8)


class Slot:
    """The memory of one round at a time. It grows to the largest round and is never given back before the end."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def prepare(self, size: int, takes: int) -> None:
        """Make room for `takes` buffers of `size` bytes together, discarding all earlier ones."""
        need = size + 2 * ALIGNMENT * takes
        if need > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old one before the new one exists
            self._memory = own_memory(need)
        self._used = 0

    def take(self, size: int, phase: int = 0) -> Tensor:
        """The next `size` bytes (uint8), at an address congruent to `phase` modulo the alignment.

        A range that starts at byte `phase` of a file so has its tensors aligned in memory where they are in the file.
        """
        base = self._memory.data_ptr()
        start = self._used + (phase - base - self._used) % ALIGNMENT
        self._used = start + size
        assert self._used <= self._memory.numel(), "a round is larger than its plan"
        return self._memory[start : self._used]


def as_tensor(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """View bytes (uint8, contiguous, of any alignment) as a tensor, to be copied from or to.

    torch views only what is aligned; numpy views the rest, and the CPUs that torch knows copy it as well. A copy in
    between would double a round.
    """
    if memory.data_ptr() % dtype.itemsize or memory.storage_offset() % dtype.itemsize:
        memory = torch.from_numpy(np.frombuffer(memory.numpy().data, _INTEGERS[dtype.itemsize]))
    return memory.view(dtype).view(shape)
