"""Bytes between ranks, point to point, with actual peers only.

One thread owns the process group: whoever makes the transport is the only one to use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from loader.crc import crc
from loader.errors import CorruptionError, LostRankError


@contextmanager
def _with(peer: int) -> Iterator[None]:
    """Whatever gloo raises, at a transfer's start or its end, is a connection that broke."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostRankError(f"the connection to rank {peer} broke: {reason}", rank=peer) from error


def crc32c(memory: Tensor) -> int:
    """The CRC-32C of a contiguous uint8 tensor."""
    return crc("CRC32C", memory.numpy().data)


class Work:
    """A message to or from rank `peer` that is under way: its bytes, and behind them, 8 bytes, their CRC."""

    def __init__(self, works: Sequence[dist.Work | None], peer: int, check: Tensor) -> None:
        self._works = works
        self._peer = peer
        self._crc = check

    def wait(self) -> None:
        """Wait for its end. Raises LostRankError where the connection broke."""
        with _with(self._peer):
            for work in self._works:
                assert work is not None, "every rank is in the group"
                work.wait()

    def check(self, memory: Tensor, what: Callable[[], str]) -> None:
        """Raise CorruptionError where `memory`, what was received, is not what was sent; `what()` tells what it is."""
        sent, found = int(self._crc), crc32c(memory)
        if found != sent:
            raise CorruptionError(
                f"{what()}: a message of {memory.numel()} bytes from rank {self._peer} has CRC-32C {found:08x}, and "
                f"was sent with {sent:08x}: a bit flipped between the two ranks, or in the memory of one. Start again; "
                "where it comes back with one host, take that host out"
            )


class Transport:
    """A gloo group of the loader's own, beside the trainer's. All ranks make it together."""

    def __init__(self, timeout: float) -> None:
        """`timeout` (seconds) bounds a single transfer: longer than the load may take, since a wait that times out
        leaves gloo's connections unusable."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def send(self, view: Tensor, ranks: Sequence[int]) -> list[Work]:
        """Start sending a contiguous uint8 tensor, which must stay as it is until the works are done.

        Raises LostRankError where the connection broke.
        """
        check = torch.tensor([crc32c(view)])
        works = []
        for to in ranks:
            with _with(to):
                works.append(Work([dist.isend(each, to, group=self._group) for each in (view, check)], to, check))
        return works

    def receive(self, view: Tensor, sender: int) -> Work:
        """Start receiving into a contiguous uint8 tensor. Messages from one sender arrive in the order sent.

        Raises LostRankError where the connection broke.
        """
        check = torch.zeros(1, dtype=torch.int64)
        with _with(sender):
            return Work([dist.irecv(each, sender, group=self._group) for each in (view, check)], sender, check)

    def close(self) -> None:
        dist.destroy_process_group(self._group)
