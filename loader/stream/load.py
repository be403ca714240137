"""One load, from a catalog and targets to filled shards, on every rank together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from loader.convert.conversion import Outputs
from loader.convert.graph import partners
from loader.errors import LostRankError
from loader.exchange.control import Control
from loader.exchange.device import DeviceTransport
from loader.exchange.gloo import GlooTransport
from loader.exchange.neighbours import Neighbours
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
from loader.stream.demand import make_demand
from loader.stream.pipeline import Pipeline
from loader.stream.planning import Terms, agree_on_plan, differs_on_all_ranks, on_any_rank
from loader.stream.stage import cuda_device, stage_for

DRAIN = 8.0
"""Seconds for the rounds in flight to end after an error, before the rank gives up on them: all must end within 10."""

_LEFT: list[Transport] = []
"""Whose end would wait for a lost rank."""


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
    with _connected(control, manner, planned.on_node, device, in_host_memory=stage.on_host) as (transport, neighbours):
        pipeline = Pipeline(
            schedule,
            catalog,
            read_range,
            landings,
            control,
            transport,
            neighbours,
            stage,
            slots=terms.limits.rounds_in_flight,
            concurrency=store.most_at_once,
            straight=store.ends_when_closed,
        )
        control.todo_bytes = schedule.read_bytes
        store.begin(schedule.read_bytes)
        _run(pipeline, transport, control, store, planned.read_bytes, show if control.rank == 0 else None)
    busy = loop_seconds() - loop_before
    checked = _agreed(control, checks)
    peak = memory.stop()
    memory.landed = lambda: 0  # what has landed is the caller's alone now
    return Loaded(
        planned.needed_bytes,
        pipeline.exchanged_bytes,
        sum(shard.numel() * shard.element_size() for shard in shards),
        peak,
        busy,
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


@contextmanager
def _connected(
    control: Control, manner: Manner, on_node: Sequence[int], device: torch.device | None, *, in_host_memory: bool
) -> Iterator[tuple[Transport | None, Neighbours | None]]:
    """This rank's ways to the others: a rank alone, or for itself, needs none; those `on_node` share memory where all
    of them have their shards `in_host_memory`; where any rank has others to send to, all ranks of the job make a
    transport together. It is closed by the thread that uses it (see `_run`).
    """
    if control.world_size == 1 or manner.share == "none":
        yield None, None
        return
    made: list[Transport] = []
    with ExitStack() as ways:
        with control.phase("connect"):
            neighbours = Neighbours.meet(control, on_node, willing=in_host_memory)
            near = {control.rank} if neighbours is None else {control.rank, *neighbours.ranks}
            if neighbours is not None:
                ways.callback(neighbours.close)
            sharing = on_node if manner.share == "node" else range(control.world_size)
            if on_any_rank(control, "messages", not near.issuperset(sharing)):
                make = _transport_of(control, 2 * manner.deadline, device)
                _wait_for(lambda: made.append(make()), control, "loader-connect")
        yield made[0] if made else None, neighbours


def _leave(transport: Transport, control: Control) -> None:
    """After a lost rank it stays as it is, for closing it would wait."""
    if isinstance(control.error, LostRankError):
        _LEFT.append(transport)
    else:
        transport.close()


def _transport_of(control: Control, timeout: float, device: torch.device | None) -> Callable[[], Transport]:
    """Where every rank of the default group has its shards on a CUDA `device` of its own, from device to device."""
    if differs_on_all_ranks(control, "device", _identity(device)) and control.of_all and device is not None:
        return lambda: DeviceTransport(timeout, device)
    return lambda: GlooTransport(control.base, control.rank, control.world_size, timeout)


def _identity(device: torch.device | None) -> str | None:
    """The same on two ranks only if they share the CUDA device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device else None


def _run(
    pipeline: Pipeline, transport: Transport | None, control: Control, store: Store, total: int, show: Show | None
) -> None:
    """The rounds. After an error nothing is read any more: it would come into shards that the caller may fill anew.

    Their thread leaves the `transport` when it ends: one that is left behind may still send what others wait for.
    """

    def rounds() -> None:
        with ExitStack() as ends:
            if transport is not None:
                ends.callback(_leave, transport, control)
            pipeline.run()

    with ExitStack() as unless_done, control.phase("rounds"):
        unless_done.callback(store.close)
        if show is not None:
            with Progress(total, show) as progress:
                _wait_for(rounds, control, "loader-rounds", lambda: progress.look(control.progress))
        else:
            _wait_for(rounds, control, "loader-rounds")
        unless_done.pop_all()


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
