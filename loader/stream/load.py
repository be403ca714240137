"""One load, from a catalog and targets to filled shards, on every rank together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from loader.convert.conversion import Outputs
from loader.convert.graph import partners
from loader.errors import LostRankError
from loader.exchange.control import Control
from loader.exchange.transport import Transport
from loader.memory import PeakMemory, untouched_bytes
from loader.place.targets import Target
from loader.plan.catalog import Catalog
from loader.plan.plan import Share
from loader.plan.schedule import Schedule
from loader.progress import Progress
from loader.store.store import Store
from loader.stream.demand import make_demand
from loader.stream.pipeline import Pipeline, Seconds
from loader.stream.planning import Terms, agree_on_plan, on_any_rank

DRAIN = 8.0
"""Seconds for the rounds in flight to end after an error, before the rank gives up on them: all must end within 10."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What this rank did. `needed_bytes` is the whole job's; times are in seconds."""

    needed_bytes: int
    exchanged_bytes: int
    shard_bytes: int
    peak_over_shards_bytes: int | None
    plan_seconds: float
    seconds: Seconds


def fill(
    targets: Sequence[Target],
    outputs: Outputs,
    catalog: Catalog,
    wanted: Collection[int],
    store: Store,
    control: Control,
    *,
    share: Share,
    node: str,
    memory_budget: int,
    reserved: int,
    range_size: int,
    concurrency: int,
    deadline: float,
    memory: PeakMemory,
    show: bool,
) -> Loaded:
    """Fill `targets` from the catalogued files. Collective; either every rank returns or every rank raises one error.

    `reserved` bytes of the budget are taken by what the caller holds. `memory` is started by the caller and stopped
    here. `show` is whether rank 0 shows the progress.
    """
    begun = time.monotonic()
    with control.phase("budget"):
        together = partners(outputs.values())
        waits = on_any_rank(control, "waits", bool(together))
        terms = Terms.of(together, memory_budget, range_size, reserved, waits=waits)
    with control.phase("targets"):
        demand, landings = make_demand(targets, outputs, catalog, wanted, terms.portion)
    planned = agree_on_plan(control, demand, catalog, share=share, node=node, terms=terms)
    schedule = Schedule(planned.plan, list(catalog.entries.values()), control.rank)
    plan_seconds = time.monotonic() - begun
    fresh = untouched_bytes(target.tensor for target in targets) or 0
    memory.landed = lambda: min(fresh, landings.landed_bytes)
    transport = _connect(control, deadline) if control.world_size > 1 and share != "none" else None

    def read_range(file: int, start: int, memory: Tensor) -> None:
        found = catalog.files[file]
        store.read(found.name, found.pin, start, memory.numpy().data)

    pipeline = Pipeline(
        schedule,
        list(catalog.entries.values()),
        read_range,
        landings,
        control,
        transport,
        slots=terms.limits.rounds_in_flight,
        concurrency=concurrency,
    )
    landings.fill()
    try:
        _run(pipeline, control, planned.read_bytes if show else None)
    finally:
        if transport is not None and not isinstance(control.error, LostRankError):
            transport.close()
    peak = memory.stop()
    memory.landed = lambda: 0  # what has landed is the caller's alone now
    return Loaded(
        planned.needed_bytes,
        pipeline.exchanged_bytes,
        sum(target.tensor.numel() * target.tensor.element_size() for target in targets),
        peak,
        plan_seconds,
        pipeline.seconds,
    )


def _connect(control: Control, deadline: float) -> Transport:
    """All ranks of the job make the transport together, also those that will have nothing to send."""
    made: list[Transport] = []
    with control.phase("connect"):
        _wait_for(lambda: made.append(Transport(2 * deadline)), control, "loader-connect")
    return made[0]


def _run(pipeline: Pipeline, control: Control, total: int | None) -> None:
    with control.phase("rounds"):
        if control.rank == 0 and total is not None:
            with Progress(total) as progress:
                _wait_for(pipeline.run, control, "loader-rounds", lambda: progress.update_to(control.progress()))
                progress.update_to(total)
        else:
            _wait_for(pipeline.run, control, "loader-rounds")


def _wait_for(
    work: Callable[[], object], control: Control, name: str, look: Callable[[], object] = lambda: None
) -> None:
    """Do `work` in a thread that may block in gloo, while this one watches for the job's error.

    After an error the work is to end by itself; a lost rank it may wait for for ever, so it is left behind.
    """

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told to all ranks
            control.fail(error)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    give_up = float("inf")
    while thread.is_alive():
        thread.join(0.1)
        look()
        if control.error is not None:
            give_up = min(give_up, time.monotonic() + DRAIN)
            if isinstance(control.error, LostRankError) or time.monotonic() > give_up:
                break
    if control.error is not None:
        raise control.error
