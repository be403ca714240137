"""The story without the load: from a config and headers alone to what every rank would do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from loader.build import build_on_meta, needless_keys, open_job, own_conversion, wishes_of
from loader.config import Config, resolve_mesh
from loader.convert.conversion import Outputs
from loader.convert.graph import Node, partners, seen_in
from loader.errors import ConfigError
from loader.exchange.control import Control
from loader.exchange.group import fake_group
from loader.ground.logs import Voice
from loader.job import Job
from loader.place.everywhere import Everywhere
from loader.place.mesh import make_mesh
from loader.place.user_code import resolve
from loader.plan.claims import checkable
from loader.plan.forecast import CONNECTION, Links, Times, times
from loader.plan.needs import Ints
from loader.report import RankReport, Report, Seconds, merge
from loader.report.predicted import Predicted, Spread
from loader.stream.foresight import Foresight
from loader.stream.outlook import Outlook, look_ahead
from loader.stream.planning import Terms


class World(NamedTuple):
    """The ranks to foresee, neighbours on one host; Gbit/s of a host's link to the bucket, and to other hosts."""

    size: int
    ranks_per_host: int
    bucket_gbps: float
    peer_gbps: float

    @property
    def host(self) -> Ints:
        """The number of each rank's host."""
        return np.arange(self.size) // self.ranks_per_host


def dry_run(config: Config, control: Control, world: World, voice: Voice) -> None:
    """Read headers, build on meta, prove the coverage, plan, report: in one process."""
    with control.phase("start"):
        if min(world) <= 0:
            raise ConfigError(f"a dry run's numbers should be above zero, found {world}")
        convert = own_conversion(config)
        dims = resolve_mesh(config.mesh, world.size)
        if config.output.entrypoint:
            resolve(config.output.entrypoint)
    job = open_job(config, convert, control)
    job.store.close()
    with control.phase("build"):
        builds = list(_builds(config, job, dims, world.size))
    with control.phase("budget"):
        together = partners(node for _, built in builds for node in built.outputs.values())
        budget = (config.read.memory_budget, config.read.range_size, job.reserved_bytes)
        terms = Terms.of(together, *budget, waits=bool(together))
    foresight = Foresight(job.source.catalog)
    with control.phase("plan"):
        for ranks, built in builds:
            foresight.add(built.everywhere, built.outputs, ranks, seen_in(*built.wanted))
        outlook = look_ahead(foresight, job.source.catalog, terms, world.host, config.read.share)
        if job.source.claims is not None:
            checkable(job.source.claims, outlook.reads, job.source.catalog)
    with control.phase("report"):
        report = _report(job, dims, world, foresight, outlook, tensors=len(builds[0][1].wanted))
        voice.say(report.table(), **report.summary())
        if config.report is not None:
            report.write(config.report)


class _Built(NamedTuple):
    """What a model is on every rank but for what is new in it, what it is made of, and the keys that must be used."""

    everywhere: Everywhere
    outputs: Outputs
    wanted: list[Node]


def _builds(config: Config, job: Job, dims: Mapping[str, int], size: int) -> Iterator[tuple[list[int], _Built]]:
    """Models, each with the ranks that have it, those of rank 0 first.

    A model that is built as one rank tells what its meshes' other ranks hold. A user's builder may look at its rank
    besides, for a pipeline's stages: so it is built again at the far end of each mesh dim, and for every coordinate on
    those dims where that is not what the first says.
    """
    first = _build(config, job, dims, 0, size)
    ranks = np.arange(size).reshape(tuple(dims.values()))
    differs = []
    for dim, count in enumerate(ranks.shape):
        probe = int(ranks[tuple(-1 if d == dim else 0 for d in range(ranks.ndim))])
        users = config.model.builder not in {None, "transformers"}
        if users and count > 1:
            there = _build(config, job, dims, probe, size)
            if there.everywhere.held(probe) != first.everywhere.held(probe) or there.wanted != first.wanted:
                differs.append(dim)
    for at in itertools.product(*(range(ranks.shape[dim]) for dim in differs)):
        chosen = dict(zip(differs, at, strict=True))
        same = ranks[tuple(chosen.get(dim, slice(None)) for dim in range(ranks.ndim))].flatten().tolist()
        yield same, _build(config, job, dims, same[0], size) if same[0] else first


def _build(config: Config, job: Job, dims: Mapping[str, int], rank: int, size: int) -> _Built:
    with fake_group(rank, size):
        model = build_on_meta(config, job, make_mesh(dims, "cpu"))
        everywhere = Everywhere.of(model, size)
        fitted = job.fit({part.names: part.shape for part in everywhere.parts}, wishes_of(config, job, model))
        parts = tuple(part for part in everywhere.parts if part.names[0] not in fitted.new)
        wanted = job.wanted(needless_keys(config, job, model))
        return _Built(replace(everywhere, parts=parts), fitted.outputs, wanted)


def _report(
    job: Job, dims: Mapping[str, int], world: World, foresight: Foresight, outlook: Outlook, *, tensors: int
) -> Report:
    """The report of a load that goes as planned."""
    columns, tally = outlook.ranks, job.store.tally
    columns.fetched[0] += tally.fetched_bytes  # the headers, which rank 0 reads
    columns.gets[0] += tally.gets
    links = Links(world.bucket_gbps * 1e9 / 8, world.peer_gbps * 1e9 / 8, job.read.concurrency * CONNECTION)
    taken = times(columns.fetched, world.host, outlook.between_hosts, links)
    ranks = [
        RankReport(
            rank=rank,
            host=f"host-{host}",
            fetched_bytes=fetched,
            gets=gets,
            exchanged_bytes=sent,
            shard_bytes=foresight.ranks[rank].shard_bytes,
            peak_over_shards_bytes=job.reserved_bytes + buffers,
            seconds=Seconds(total=max(spent), read=max(spent.bucket, spent.connections), exchange=spent.peers),
        )
        for rank, (host, spent, fetched, gets, sent, buffers) in enumerate(
            zip(world.host.tolist(), taken, *(column.tolist() for column in columns), strict=True)
        )
    ]
    return merge(
        ranks,
        source=job.described(),
        mesh=dims,
        tensors=tensors,
        needed_bytes=outlook.needed_bytes,
        budget_bytes=job.read.memory_budget,
        predicted=_predicted(world, foresight, outlook, ranks, taken),
    )


def _predicted(
    world: World, foresight: Foresight, outlook: Outlook, ranks: Sequence[RankReport], taken: Sequence[Times]
) -> Predicted:
    """What the report of a load does not have."""
    of_a_rank = ("shard_bytes", "fetched_bytes", "gets", "exchanged_bytes", "peak_over_shards_bytes")
    longest = {link: max(getattr(each, link) for each in taken) for link in Times._fields}
    return Predicted(
        per_rank={
            "tensors": Spread.of([foresight.ranks[rank].tensors for rank in range(world.size)]),
            **{name: Spread.of([getattr(each, name) for each in ranks]) for name in of_a_rank},
        },
        held_bytes=outlook.held_bytes,
        egress_bytes=outlook.egress_bytes,
        ranks_per_host=world.ranks_per_host,
        bucket_gbps=world.bucket_gbps,
        peer_gbps=world.peer_gbps,
        seconds=longest,
        bound_by=max(longest, key=longest.__getitem__),
    )
