"""A rank's ways to the others: the memory of those on its node, and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from loader.errors import LostRankError
from loader.exchange.control import Control
from loader.exchange.device import DeviceTransport
from loader.exchange.gloo import GlooTransport
from loader.exchange.neighbours import Neighbours
from loader.exchange.transport import Transport
from loader.stream.planning import differs_on_all_ranks, on_any_rank
from loader.stream.watched import watched

_LEFT: list[Transport] = []
"""Whose end would wait for a lost rank."""


class Ways(NamedTuple):
    """Each is None where it is not needed, or not to be had."""

    transport: Transport | None
    neighbours: Neighbours | None


@contextmanager
def connected(
    control: Control,
    partners: Sequence[int],
    on_node: Sequence[int],
    timeout: float,
    device: torch.device | None,
    *,
    in_host_memory: bool,
) -> Iterator[Ways]:
    """With those that this rank exchanges bytes with, its `partners`: those `on_node` share memory where all of them
    have their shards `in_host_memory`; where any rank has other partners, all ranks of the job make a transport
    together: on their `device`, where each has one. It is closed by the thread that uses it (see `leaving`); `timeout`
    (seconds) is for one of its messages. Collective.
    """
    made: list[Transport] = []
    with ExitStack() as ways:
        with control.phase("connect"):
            neighbours = Neighbours.meet(control, on_node, willing=in_host_memory)
            far = [rank for rank in partners if neighbours is None or rank not in neighbours.ranks]
            if neighbours is not None:
                ways.callback(neighbours.close)
            if on_any_rank(control, "messages", bool(far)):
                make = _transport_of(control, far, timeout, device)
                watched(lambda: made.append(make()), control, "loader-connect")
        yield Ways(made[0] if made else None, neighbours)


@contextmanager
def leaving(transport: Transport | None, control: Control) -> Iterator[None]:
    """Close the transport after its use. After a lost rank it stays as it is, for closing it would wait."""
    try:
        yield
    except BaseException as error:
        control.fail(error)  # first: with others' messages under way, closing may wait for these
        raise
    finally:
        if transport is not None:
            _LEFT.append(transport) if isinstance(control.error, LostRankError) else transport.close()


def _transport_of(
    control: Control, partners: Sequence[int], timeout: float, device: torch.device | None
) -> Callable[[], Transport]:
    """Where every rank of the default group has its shards on a CUDA `device` of its own, from device to device."""
    if differs_on_all_ranks(control, "device", _identity(device)) and control.of_all and device is not None:
        return lambda: DeviceTransport(timeout, device)
    return lambda: GlooTransport(control.base, control.rank, control.world_size, timeout, partners)


def _identity(device: torch.device | None) -> str | None:
    """The same on two ranks only if they share the CUDA device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device else None
