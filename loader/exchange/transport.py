"""Bytes between ranks, point to point, with actual peers only.

One thread owns the process group: whoever makes the transport is the only one to use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from loader.errors import LostRankError


@contextmanager
def _with(peer: int) -> Iterator[None]:
    """Whatever gloo raises, at a transfer's start or its end, is a connection that broke."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostRankError(f"the connection to rank {peer} broke: {reason}", rank=peer) from error


class Work:
    """A transfer with rank `peer` that is under way."""

    def __init__(self, work: dist.Work | None, peer: int) -> None:
        assert work is not None, "every rank is in the group"
        self._work = work
        self._peer = peer

    def wait(self) -> None:
        """Wait for its end. Raises LostRankError where the connection broke."""
        with _with(self._peer):
            self._work.wait()


class Transport:
    """A gloo group of the loader's own, beside the trainer's. All ranks make it together."""

    def __init__(self, timeout: float) -> None:
        """`timeout` (seconds) bounds a single transfer: longer than the load may take, since a wait that times out
        leaves gloo's connections unusable."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def send(self, view: Tensor, to: int) -> Work:
        """Start sending a contiguous uint8 tensor, which must stay as it is until the work is done.

        Raises LostRankError where the connection broke.
        """
        with _with(to):
            return Work(dist.isend(view, to, group=self._group), to)

    def receive(self, view: Tensor, sender: int) -> Work:
        """Start receiving into a contiguous uint8 tensor. Messages from one sender arrive in the order sent.

        Raises LostRankError where the connection broke.
        """
        with _with(sender):
            return Work(dist.irecv(view, sender, group=self._group), sender)

    def close(self) -> None:
        dist.destroy_process_group(self._group)
