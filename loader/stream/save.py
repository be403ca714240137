"""What the targets hold, as one checkpoint of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from loader.exchange.control import Control
from loader.ground.caller import Caller
from loader.sinks.checkpoint import Filled, Saving
from loader.stream.planning import pack, unpack

T = TypeVar("T")


def save(targets: Iterable[Filled], url: str, control: Control) -> None:
    """Write `targets` of every rank to the directory `url`, which rank 0 has prepared, as a DCP checkpoint. Collective.

    Ranks wait for the slowest one's writes, and for none that is lost: either every rank returns or every rank raises
    one error, a SinkError that names the rank that failed, or a LostRankError.
    """
    saving, everyone = Saving(targets, url, control.rank), range(control.world_size)
    with control.phase("save plan"):
        control.put("could save", pack(_unless_failed(control, saving.plan)))
        joined = []
        if control.rank == 0:
            plans = [unpack(plan) for plan in control.take("could save", everyone)]
            joined = [pack(plan) for plan in saving.join(plans)]
        mine = unpack(control.scatter("to save", joined))
    with control.phase("save"):
        control.put("saved", pack(_unless_failed(control, lambda: saving.write(mine))))
        if control.rank == 0:
            saved = [unpack(results) for results in control.take("saved", everyone)]
            _unless_failed(control, lambda: saving.finish(saved))


def _unless_failed(control: Control, work: Callable[[], T]) -> T:
    """What `work()` returns, on a thread of its own: left behind once the job has failed elsewhere, for it may write
    for minutes, or hang."""
    caller = Caller("loader-save")
    try:
        return caller.call(work, lambda: control.error)
    finally:
        caller.close()
