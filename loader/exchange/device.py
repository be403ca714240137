"""A transport from device to device, over the device's own backend: NCCL for CUDA.

All of a round's messages are one group: on NCCL's one communicator they would else run one after another, and two ranks
that both send first would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from loader.exchange.transport import Batch, Work, connected, corrupted

_PIECE = 1 << 20
"""Words whose check is computed at a time: three times 8 MiB of the device."""

_MASK = (1 << 64) - 1


def check_of(memory: Tensor) -> Tensor:
    """A check of a contiguous uint8 tensor, on its device: int64[1].

    Each of its words of 8 bytes times an odd number of its own, summed modulo 2^64: no change of one word leaves the
    sum as it is, for an odd number has an inverse.
    """
    whole = memory.numel() // 8 * 8
    total = torch.zeros(1, dtype=torch.int64, device=memory.device)
    for words, first in _words(memory[:whole]):
        at = torch.arange(first, first + words.numel(), dtype=torch.int64, device=memory.device)
        total += (words * _odd(at)).sum()
    rest = memory[whole:].to(torch.int64)
    return total + (rest * _odd(-1 - torch.arange(rest.numel(), dtype=torch.int64, device=memory.device))).sum()


def _words(memory: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Words of 8 bytes, a piece at a time, and the number of each piece's first."""
    for first in range(0, memory.numel() // 8, _PIECE):
        piece = memory[8 * first : 8 * (first + _PIECE)]
        aligned = piece.data_ptr() % 8 == piece.storage_offset() % 8 == 0
        yield (piece if aligned else piece.clone()).view(torch.int64), first


def _odd(at: Tensor) -> Tensor:
    """An odd number for each position, far from its neighbours': splitmix64's increment times it, lowest bit set."""
    return at * -0x61C8864680B583EB | 1


class DeviceWork:
    """A message to or from rank `peer`: its bytes, and behind them their check. `wait` holds up the current stream, not
    the thread."""

    def __init__(self, batch: DeviceBatch, peer: int, check: Tensor) -> None:
        self._batch = batch
        self._peer = peer
        self._check = check

    def wait(self) -> None:
        with connected(self._peer):
            self._batch.wait()

    def check(self, memory: Tensor, what: Callable[[], str]) -> None:
        sent, found = torch.cat([self._check, check_of(memory)]).tolist()  # here the thread waits for the message
        if found != sent:
            raise corrupted(what(), memory.numel(), self._peer, "the check", sent & _MASK, found & _MASK)


class DeviceBatch:
    """The messages of one round, which are under way once it is started."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._works: list[dist.Work] = []
        self._group = group
        self._messages: list[tuple[int, list[dist.P2POp]]] = []

    def send(self, number: int, view: Tensor, ranks: Sequence[int]) -> Sequence[Work]:
        check = check_of(view)
        return [self._add(number, dist.isend, view, to, check) for to in ranks]

    def receive(self, number: int, view: Tensor, sender: int) -> Work:
        return self._add(number, dist.irecv, view, sender, torch.empty(1, dtype=torch.int64, device=view.device))

    def start(self) -> None:
        """Between two ranks messages have no tags: they are told apart by their order."""
        in_order = [op for _, ops in sorted(self._messages, key=itemgetter(0)) for op in ops]
        if in_order:
            self._works = dist.batch_isend_irecv(in_order)

    def wait(self) -> None:
        """Let the current stream wait for all of them: once, for it is the same stream that needs them all."""
        while self._works:
            self._works.pop().wait()

    def _add(self, number: int, way: Callable[..., dist.Work | None], view: Tensor, peer: int, check: Tensor) -> Work:
        ops = [dist.P2POp(way, each, peer, group=self._group) for each in (view, check)]
        self._messages.append((number, ops))
        return DeviceWork(self, peer, check)


class DeviceTransport:
    """A group of the loader's own, beside the trainer's, for ranks that each have a device of their own."""

    on_device = True

    def __init__(self, timeout: float, device: torch.device) -> None:
        """`timeout` (seconds) bounds a round's messages: longer than a load takes, since NCCL then ends the process."""
        backend = dist.get_default_backend_for_device(device)
        self._group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))
        first = torch.zeros(1, device=device)
        dist.all_reduce(first, group=self._group)  # makes the communicator, in which every rank must take part
        first.item()

    def batch(self) -> Batch:
        return DeviceBatch(self._group)

    def close(self) -> None:
        dist.destroy_process_group(self._group)
