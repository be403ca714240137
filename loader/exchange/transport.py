"""Bytes between ranks, point to point, with actual peers only.

One thread owns the process group: whoever makes the transport is the only one to use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from loader.errors import CorruptionError, LostRankError


class Sent(Protocol):
    """Something that is under way to other ranks."""

    def wait(self) -> None:
        """Wait for its end. Raises LostRankError where the connection broke."""


class Work(Sent, Protocol):
    """A message that is under way."""

    def check(self, memory: Tensor, what: Callable[[], str]) -> None:
        """Raise CorruptionError where `memory`, what was received, is not what was sent; `what()` tells what it is."""


class Batch(Protocol):
    """The messages of one round, in any order: both ends know a message by its `number`, its own in the whole load."""

    def send(self, number: int, view: Tensor, ranks: Sequence[int]) -> Sequence[Work]:
        """Send a contiguous uint8 tensor, which must stay as it is until the works are done.

        Raises LostRankError where the connection broke.
        """

    def receive(self, number: int, view: Tensor, sender: int) -> Work:
        """Receive into a contiguous uint8 tensor. Raises LostRankError where the connection broke."""

    def start(self) -> None:
        """All the round's messages have been given. Before this none need be under way. Rounds start in their order."""


class Transport(Protocol):
    """All ranks make it together. `on_device`: messages are from and to tensors on the CUDA device, else on the CPU."""

    on_device: bool

    def batch(self) -> Batch: ...

    def close(self) -> None: ...


@contextmanager
def connected(peer: int) -> Iterator[None]:
    """Whatever a backend raises, at a transfer's start or its end, is a connection that broke."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise lost(peer, reason) from error


def lost(peer: int, reason: str) -> LostRankError:
    return LostRankError(
        f"the connection to rank {peer} broke ({reason}): it ended, was killed (for its memory?), or its host or "
        "network is gone. Its own log, or its host's, may tell; then start again",
        rank=peer,
    )


def corrupted(what: str, size: int, peer: int, check: str, sent: int, found: int) -> CorruptionError:
    return CorruptionError(
        f"{what}: a message of {size} bytes from rank {peer} has {check} {found:08x}, and was sent with {sent:08x}: a "
        "bit flipped between the two ranks, or in the memory of one. Start again; where it comes back with one host, "
        "take that host out"
    )
