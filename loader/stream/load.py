"""One load, from a catalog and targets to filled shards, on every rank together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from loader.convert.conversion import Outputs
from loader.convert.graph import partners
from loader.exchange.control import Control
from loader.exchange.transport import Transport
from loader.ground.memory import PeakMemory, untouched_bytes
from loader.ground.progress import Progress, Show
from loader.ground.recording import Recorder
from loader.place.targets import Target
from loader.plan.catalog import Catalog
from loader.plan.claims import Claims, Spans
from loader.plan.plan import Plan, Share
from loader.plan.schedule import Schedule
from loader.store.loop import loop_seconds
from loader.store.store import Store
from loader.store.tally import Asked
from loader.stream.checksums import Checked, Checks
from loader.stream.connect import connected, leaving
from loader.stream.demand import make_demand
from loader.stream.pipeline import Pipeline
from loader.stream.planning import Terms, agree_on_plan, on_any_rank
from loader.stream.stage import cuda_device, stage_for
from loader.stream.watched import watched


@dataclass(frozen=True, slots=True)
class Loaded:
    """What this rank did. `needed_bytes` is the whole job's; `checksums` are by file, None where none were asked for;
    for `loop_seconds` the storage client's event loop was busy. (The control's recorder has the other seconds.)"""

    needed_bytes: int
    exchanged_bytes: int
    shard_bytes: int
    peak_over_shards_bytes: int | None
    loop_seconds: float
    checksums: dict[str, Checked] | None


@dataclass(frozen=True, slots=True)
class Manner:
    """How a rank reads: the YAML's `read` (bytes, seconds), the node that it is on, and how much of the memory budget
    its caller's storage client and catalog take."""

    share: Share
    node: str
    memory_budget: int
    reserved: int
    range_size: int
    deadline: float


def fill(
    targets: Sequence[Target],
    outputs: Outputs,
    catalog: Catalog,
    wanted: Collection[int],
    store: Store,
    control: Control,
    manner: Manner,
    memory: PeakMemory,
    *,
    claims: Claims | None = None,
    show: Show | None,
) -> Loaded:
    """Fill `targets` from the catalogued files, and check `claims` of these. Collective; either every rank returns or
    every rank raises one error.

    `wanted` are the numbers of the catalog's keys that must be used (see `make_demand`). `memory` is started by the
    caller and stopped here. `show` is how rank 0 shows the progress.
    """
    terms = _terms(control, outputs, manner)
    with control.phase("targets"):
        demand, landings = make_demand(targets, outputs, catalog, wanted, terms.portion, control.recorder)
    planned = agree_on_plan(control, demand, catalog, share=manner.share, node=manner.node, terms=terms)
    schedule = Schedule(planned.plan, list(catalog.entries.values()), control.rank)
    checks = _checks(control, claims, planned.plan, catalog)
    fresh = untouched_bytes(target.tensor for target in targets) or 0
    memory.landed = lambda: min(fresh, landings.landed_bytes)
    landings.fill()
    shards = [target.tensor for target in targets]
    read_range = _reader(catalog, store, checks, control.recorder)
    loop_before = loop_seconds()
    stage, device = stage_for(shards), cuda_device(shards)
    others, timeout = schedule.partners(), 2 * manner.deadline
    with connected(control, others, planned.on_node, timeout, device, in_host_memory=stage.on_host) as ways:
        pipeline = Pipeline(
            schedule,
            catalog,
            read_range,
            landings,
            control,
            *ways,
            stage,
            slots=terms.limits.rounds_in_flight,
            concurrency=store.most_at_once,
            straight=store.ends_when_closed,
        )
        control.todo_bytes = schedule.read_bytes
        store.begin(schedule.read_bytes)
        _run(pipeline, ways.transport, control, store, planned.read_bytes, show if control.rank == 0 else None)
    checked = _agreed(control, checks)
    peak = memory.stop()
    memory.landed = lambda: 0  # what has landed is the caller's alone now
    return Loaded(
        planned.needed_bytes,
        pipeline.exchanged_bytes,
        sum(shard.numel() * shard.element_size() for shard in shards),
        peak,
        loop_seconds() - loop_before,
        checked,
    )


def _terms(control: Control, outputs: Outputs, manner: Manner) -> Terms:
    with control.phase("budget"):
        together = partners(outputs.values())
        waits = on_any_rank(control, "waits", bool(together))
        return Terms.of(together, manner.memory_budget, manner.range_size, manner.reserved, waits=waits)


def _checks(control: Control, claims: Claims | None, plan: Plan, catalog: Catalog) -> Checks | None:
    """Of what the plan reads; None where nothing is to be checked."""
    if claims is None:
        return None
    with control.phase("claims"):
        return Checks(control, claims, Spans(plan.file, plan.start, plan.stop), catalog)


def _agreed(control: Control, checks: Checks | None) -> dict[str, Checked] | None:
    if checks is None:
        return None
    with control.phase("checksums"):
        return checks.agree(control)


def _reader(
    catalog: Catalog, store: Store, checks: Checks | None, recorder: Recorder
) -> Callable[[int, int, Tensor], Asked]:
    def read_range(file: int, start: int, memory: Tensor) -> Asked:
        found, data = catalog.files[file], memory.numpy().data
        asked = store.read(found.name, found.pin, start, data)
        if checks is not None:
            with recorder.span("checksum"):
                checks.take(file, start, data)
        return asked

    return read_range


def _run(
    pipeline: Pipeline, transport: Transport | None, control: Control, store: Store, total: int, show: Show | None
) -> None:
    """The rounds. After an error nothing is read any more: it would come into shards that the caller may fill anew.

    Their thread leaves the `transport` at its end: one that is left behind may still send what others wait for.
    """

    def rounds() -> None:
        with leaving(transport, control):
            pipeline.run()

    with ExitStack() as unless_done, control.phase("rounds"):
        unless_done.callback(store.close)
        if show is not None:
            with Progress(total, show) as progress:
                watched(rounds, control, "loader-rounds", lambda: progress.look(control.progress))
        else:
            watched(rounds, control, "loader-rounds")
        unless_done.pop_all()
