"""Reused host memory: a round's buffers are cut from one slot, whose pages are touched once."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype needs."""


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
            self._memory = torch.empty(need, dtype=torch.uint8)
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
    """Bytes (uint8, contiguous) as a tensor to read from: a view, or a copy where they are not aligned for `dtype`."""
    if memory.data_ptr() % dtype.itemsize or memory.storage_offset() % dtype.itemsize:
        memory = memory.clone()
    return memory.view(dtype).view(shape)


def put(values: Tensor, memory: Tensor) -> None:
    """Write the elements of `values`, row-major, to bytes (uint8, contiguous) of any alignment."""
    if memory.data_ptr() % values.dtype.itemsize or memory.storage_offset() % values.dtype.itemsize:
        memory.copy_(values.contiguous().flatten().view(torch.uint8))
    else:
        memory.view(values.dtype).view(values.shape).copy_(values)
