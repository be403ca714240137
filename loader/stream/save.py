"""What the targets hold, as one checkpoint of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import wait
from typing import TypeVar

from loader.exchange.control import Control
from loader.ground.caller import LOOK, Caller
from loader.sinks.checkpoint import Filled, Saving
from loader.stream.planning import pack, unpack

T = TypeVar("T")

MOMENT = 0.5
"""Seconds: all ranks are to end within 10 of a loss, which is seen after 7, and what was written is to be removed."""


def save(targets: Iterable[Filled], url: str, control: Control) -> None:
    """Write `targets` of every rank to the directory `url`, which rank 0 has prepared, as a DCP checkpoint. Collective.

    Ranks wait for the slowest one's writes, and for none that is lost: either every rank returns or every rank raises
    one error, a SinkError that names the rank that failed, or a LostRankError.
    """
    saving, everyone = Saving(targets, url, control.rank, control.go_on), range(control.world_size)
    with control.phase("save plan"):
        control.put("could save", pack(_unless_failed(control, saving.plan)))
        joined = []
        if control.rank == 0:
            plans = control.take("could save", everyone)
            joined = _unless_failed(control, lambda: [*map(pack, saving.join([*map(unpack, plans)]))])
            del plans
        mine = unpack(control.scatter("to save", joined))
        del joined
    with control.phase("save"):
        control.put("saved", pack(_unless_failed(control, lambda: saving.write(mine))))
        if control.rank == 0:
            saved = control.take("saved", everyone)
            _unless_failed(control, lambda: saving.finish([*map(unpack, saved)]))


def _unless_failed(control: Control, work: Callable[[], T]) -> T:
    """What `work()` returns, on a thread of its own: left behind once the job has failed elsewhere, for it may be in a
    write for minutes, or hang. It is given a moment to come to its end, and begins no other file."""
    caller = Caller("loader-save")
    try:
        working = caller.submit(work)
        while not working.done():
            wait([working], LOOK)
            if control.error is not None:
                wait([working], MOMENT)
                raise control.error
        return working.result()
    finally:
        caller.close()
