"""Reused memory: a round's buffers are cut from one slot, whose pages are touched once."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

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


class Buffer(NamedTuple):
    """Bytes of a round, as two tensors (uint8): what ranges are read into, and what goes on from there. They are one
    and the same but for shards on a device."""

    host: Tensor
    there: Tensor


class Memory(Protocol):
    """What a slot's buffers are cut from: `host` and `there` (uint8) of one size, at addresses that are multiples of
    the alignment."""

    @property
    def host(self) -> Tensor: ...

    @property
    def there(self) -> Tensor: ...

    def free(self) -> None:
        """Nothing uses it any more."""


class HostMemory:
    """Host memory alone."""

    def __init__(self, size: int) -> None:
        self.host = self.there = own_memory(size)

    def free(self) -> None:
        self.host = self.there = own_memory(0)


class Slot:
    """The memory of one round at a time. It grows to the largest round and is never given back before `close`."""

    def __init__(self, allocate: Callable[[int], Memory] = HostMemory) -> None:
        """`allocate(size)` gives so many bytes."""
        self._allocate = allocate
        self._memory = allocate(0)
        self._used = 0

    def prepare(self, size: int, takes: int) -> None:
        """Make room for `takes` buffers of `size` bytes together, discarding all earlier ones."""
        need = size + 2 * ALIGNMENT * takes
        if need > self._memory.host.numel():
            self._memory.free()  # before the new one exists
            self._memory = self._allocate(need)
        self._used = 0

    def take(self, size: int, phase: int = 0) -> Buffer:
        """The next `size` bytes, at an address congruent to `phase` modulo the alignment.

        A range that starts at byte `phase` of a file so has its tensors aligned in memory where they are in the file.
        """
        start = self._used + (phase - self._used) % ALIGNMENT
        self._used = start + size
        assert self._used <= self._memory.host.numel(), "a round is larger than its plan"
        return Buffer(self._memory.host[start : self._used], self._memory.there[start : self._used])

    def close(self) -> None:
        self._memory.free()


def as_tensor(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """View bytes (uint8, contiguous, of any alignment) as a tensor, to be copied from.

    torch views only what is aligned; numpy views the rest of host memory, and the CPUs that torch knows copy it as
    well: a copy in between would double a round. On a device such bytes, which are rare, are copied first.
    """
    if memory.data_ptr() % dtype.itemsize or memory.storage_offset() % dtype.itemsize:
        if memory.device.type == "cpu":
            memory = torch.from_numpy(np.frombuffer(memory.numpy().data, _INTEGERS[dtype.itemsize]))
        else:
            memory = memory.clone()
    return memory.view(dtype).view(shape)


def joined(runs: Sequence[Tensor]) -> Tensor | None:
    """Runs of memory (uint8) as one; None where they do not stand one behind the other in one storage."""
    first, end = runs[0], runs[0].data_ptr()
    storage = first.untyped_storage()
    for run in runs:
        if run.data_ptr() != end or run.untyped_storage().data_ptr() != storage.data_ptr():
            return None
        end += run.numel()
    return first.as_strided((end - first.data_ptr(),), (1,))


def put(values: Tensor, memory: Tensor) -> None:
    """Copy the elements of `values`, in order, to bytes (uint8, contiguous, of any alignment) on the same device."""
    if memory.device.type == "cpu":
        as_tensor(memory, values.dtype, tuple(values.shape)).copy_(values)
    else:
        memory.copy_(values.contiguous().flatten().view(torch.uint8))
