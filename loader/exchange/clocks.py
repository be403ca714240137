"""What the clocks of the ranks' hosts differ by.

Processes of one kernel read one monotonic clock, so one rank of each kernel compares it with rank 0's. Both write their
time into torch's store, again and again, and read the other's: what is read was written before, so each look bounds the
difference on one side. Of all looks the tightest bounds count, and what lies between them is the error. However many
hosts there are, it takes `COMPARED` seconds; where there is one kernel, nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from loader.exchange.control import Control

COMPARED = 0.25
"""Seconds for which two clocks are compared."""
PAUSE = 0.002
"""Seconds between looks, at least; more where many hosts would keep the store too busy."""
LOAD = 20e-6
"""Seconds of the store for one host's look."""


class Offset(NamedTuple):
    """Seconds that a rank's clock is ahead of rank 0's, give or take `error`."""

    seconds: float
    error: float


def clock_offset(
    control: Control, clock: Callable[[], float] = time.monotonic, kernel: Callable[[], str] | None = None
) -> Offset:
    """This rank's. Collective, within a phase. `kernel` names what ranks with one clock have in common."""
    control.put("kernel", (kernel or _kernel)().encode())
    told = b""
    if control.rank == 0:
        told = json.dumps([each.decode() for each in control.take("kernel", range(control.world_size))]).encode()
    kernels = json.loads(control.broadcast("kernels", told))
    spokesmen = {name: kernels.index(name) for name in dict.fromkeys(kernels) if name != kernels[0]}
    found = b"{}"
    if control.rank == 0 and spokesmen:
        least = _look(control, list(spokesmen.values()), clock, len(spokesmen))
        most = [-float(each) for each in control.take("clock most", list(spokesmen.values()))]
        bounds = zip(spokesmen, least, most, strict=True)
        found = json.dumps({name: ((low + high) / 2, (high - low) / 2) for name, low, high in bounds}).encode()
    elif control.rank in spokesmen.values():
        control.put("clock most", repr(_look(control, [0], clock, len(spokesmen))[0]).encode())
    offsets = json.loads(control.broadcast("clock offsets", found))
    return Offset(*offsets.get(kernels[control.rank], (0.0, 0.0)))


def _look(control: Control, others: list[int], clock: Callable[[], float], hosts: int) -> list[float]:
    """By how many seconds each of the others' clocks is ahead of this one, at least."""
    ahead = [float("-inf")] * len(others)
    until = float("inf")
    while time.monotonic() < until:
        control.show("clock", repr(clock()).encode())
        seen = control.shown("clock", others)
        now = clock()
        ahead = [max(low, float(each) - now) if each else low for low, each in zip(ahead, seen, strict=True)]
        if until == float("inf") and all(seen):
            until = time.monotonic() + COMPARED
        time.sleep(max(PAUSE, hosts * LOAD))
    return ahead


def _kernel() -> str:
    """This boot of this kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()
