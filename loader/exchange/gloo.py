"""A transport from host memory to host memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # the stubs hide it

from loader.exchange.transport import Batch, Work, connected, corrupted
from loader.ground.crc import crc
from loader.ground.files import make_room


def crc32c(memory: Tensor) -> int:
    """The CRC-32C of a contiguous uint8 tensor."""
    return crc("CRC32C", memory.numpy().data)


def _tagged(number: int, view: Tensor, check: Tensor) -> tuple[tuple[int, Tensor], ...]:
    """A message's two parts under gloo's tags: 6 and 7 for message number 3."""
    return (2 * number, view), (2 * number + 1, check)


class GlooWork:
    """A message to or from rank `peer`: its bytes, and behind them, 8 bytes, their CRC."""

    def __init__(self, works: Sequence[dist.Work | None], peer: int, check: Tensor) -> None:
        self._works = works
        self._peer = peer
        self._crc = check

    def wait(self) -> None:
        with connected(self._peer):
            for work in self._works:
                assert work is not None, "every rank is in the group"
                work.wait()

    def check(self, memory: Tensor, what: Callable[[], str]) -> None:
        sent, found = int(self._crc), crc32c(memory)
        if found != sent:
            raise corrupted(what(), memory.numel(), self._peer, "CRC-32C", sent, found)


_HELLO = (1 << 31) - 1
"""The tag of what partners first send each other: the largest, which no message has."""


_GLOO: Any = dist.ProcessGroupGloo
"""Of which the stubs know neither devices nor options."""


def _options(timeout: float) -> Any:
    """Ranks connect when they first talk: a mesh of thousands would take a socket each for all of them. `timeout` is in
    seconds."""
    try:
        devices = _devices(lazy=True)
    except RuntimeError:  # over TLS, and on macOS, gloo has nothing but the mesh
        devices = _devices(lazy=False)
    options = _GLOO._Options()  # noqa: SLF001 - the only way in
    options._devices = devices  # noqa: SLF001
    options._timeout = timedelta(seconds=timeout)  # noqa: SLF001
    options._threads = 2 * len(devices)  # noqa: SLF001
    return options


def _devices(*, lazy: bool) -> list[Any]:
    """For the network interfaces of GLOO_SOCKET_IFNAME, as for the groups that torch makes."""
    names = filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))
    named = [_GLOO.create_device(interface=name, lazy_init=lazy) for name in names]
    return named or [_GLOO.create_default_device(lazy_init=lazy)]


class GlooTransport:
    """A gloo group of the loader's own, beside the trainer's. What is sent and received is under way at once.

    It is not made with `new_group`: of some of the ranks that finds, the second time, what the first one left in the
    store.
    """

    on_device = False

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float, partners: Sequence[int]) -> None:
        """`store` is the load's own. With `partners`, ascending, messages will be exchanged: each of them names this
        rank too. `timeout` (seconds) bounds a single transfer: longer than the load may take, since a wait that times
        out leaves gloo's connections unusable. Raises UserError where this process may not open as many sockets."""
        make_room(len(partners), f"rank {rank} connects with each rank that it exchanges bytes with")
        self._group: Any = _GLOO(store, rank, world_size, _options(timeout))
        self._meet(partners)

    def _meet(self, partners: Sequence[int]) -> None:
        """Connect with them. Of two ranks one dials, and the other's first message waits until it has: in the midst of
        rounds three could wait for each other. In ascending order the lowest pair that is left has both its ranks."""
        memory, works = torch.zeros(2, dtype=torch.int64), []
        for peer in partners:
            with connected(peer):
                works += [
                    (peer, dist.isend(memory[:1], group=self._group, group_dst=peer, tag=_HELLO)),
                    (peer, dist.irecv(memory[1:], group=self._group, group_src=peer, tag=_HELLO)),
                ]
        for peer, work in works:
            assert work is not None, "every rank is in the group"
            with connected(peer):
                work.wait()

    def batch(self) -> Batch:
        return self

    def start(self) -> None:
        pass

    def send(self, number: int, view: Tensor, ranks: Sequence[int]) -> Sequence[Work]:
        check = torch.tensor([crc32c(view)])
        works = []
        for to in ranks:
            with connected(to):
                sent = [
                    dist.isend(each, group=self._group, group_dst=to, tag=tag)
                    for tag, each in _tagged(number, view, check)
                ]
            works.append(GlooWork(sent, to, check))
        return works

    def receive(self, number: int, view: Tensor, sender: int) -> Work:
        check = torch.zeros(1, dtype=torch.int64)
        with connected(sender):
            coming = [
                dist.irecv(each, group=self._group, group_src=sender, tag=tag)
                for tag, each in _tagged(number, view, check)
            ]
        return GlooWork(coming, sender, check)

    def close(self) -> None:
        del self._group
