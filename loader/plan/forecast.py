"""What a plan will come to, in bytes, requests and seconds: from its columns, without a rank or a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loader.plan.catalog import Entry
from loader.plan.extents import Cuts, Kind, Limits, Pattern, find_patterns, pattern_blocks
from loader.plan.geometry import Box
from loader.plan.needs import Classes, Ints
from loader.plan.plan import Plan
from loader.plan.rounds import beside_reading

CONNECTION = 85e6
"""Bytes a second that an object store serves on one connection: 85 to 90 MB/s, measured and advised."""


class Forecast(NamedTuple):
    """One domain's ranks, in the order of `plan.classes.ranks`: columns of bytes, but for `gets`.

    `buffers` is the memory that a rank's rounds in flight take, by the planner's reckoning: the storage client's, the
    catalog's and what waits to be combined are beside it.
    """

    fetched: Ints
    gets: Ints
    sent: Ints
    buffers: Ints


def forecast(plan: Plan, cuts: Cuts, limits: Limits) -> Forecast:
    """What the ranks of a plan will do. `cuts` are those that it was made of."""
    ranks = plan.classes.ranks
    reader = np.searchsorted(ranks, plan.reader)
    sent, _ = exchange(plan, cuts, np.arange(len(ranks)))
    return Forecast(
        np.bincount(reader, cuts.size, len(ranks)).astype(np.int64),
        np.bincount(reader, minlength=len(ranks)),
        sent,
        _buffers(plan, cuts, limits.rounds_in_flight),
    )


def exchange(plan: Plan, cuts: Cuts, group: Ints) -> tuple[Ints, Ints]:
    """Bytes that each group of ranks sends to others, and receives from others. `group[i]` is the number of the group
    of `plan.classes.ranks[i]`: hosts, for one, or each rank by itself."""
    groups = int(group.max()) + 1
    reader = group[np.searchsorted(plan.classes.ranks, plan.reader)]
    sent, received = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    for kind, extents in _by_kind(cuts):
        needed = np.bincount(group, _landing(kind, plan.classes), groups).astype(np.int64)
        reads = np.bincount(reader[extents], minlength=groups)
        sent += reads * (needed.sum() - needed)
        received += needed * (reads.sum() - reads)
    return sent, received


def egress_bytes(
    entries: Sequence[Entry], classes: Classes, ways: Mapping[str, Sequence[Sequence[int]]], limits: Limits
) -> dict[str, int]:
    """Bytes that leave the bucket for each of `ways` to divide the ranks of `classes` into domains, each of which reads
    what it needs once: what the extents of their plans hold, without the plans."""
    class_of = dict(zip(classes.ranks.tolist(), classes.class_of.tolist(), strict=True))
    wanted = {
        way: Counter(frozenset(class_of[rank] for rank in domain) for domain in domains)
        for way, domains in ways.items()
    }
    egress = dict.fromkeys(ways, 0)
    for pattern in find_patterns(entries, classes):
        needs: dict[int, list[tuple[int, Box]]] = {}
        for need in pattern.needs:
            needs.setdefault(need[0], []).append(need)
        read: dict[frozenset[int], int] = {frozenset(): 0}
        for way, times_wanted in wanted.items():
            for domain, times_read in times_wanted.items():
                using = domain.intersection(needs)
                if using not in read:
                    own = tuple(need for number in sorted(using) for need in needs[number])
                    read[using] = _read_bytes(entries, pattern._replace(needs=own), limits)
                egress[way] += times_read * read[using]
    return egress


def _read_bytes(entries: Sequence[Entry], pattern: Pattern, limits: Limits) -> int:
    entry = entries[int(pattern.keys[0])]
    blocks = pattern_blocks(entry, pattern, limits.range_bytes, limits.round_bytes)
    return len(pattern.keys) * sum(block.size for block in blocks)


def _buffers(plan: Plan, cuts: Cuts, slots: int) -> Ints:
    """A slot holds every so many rounds, one after another, and grows to the largest of them."""
    classes, rounds = plan.classes, plan.rounds
    reader = np.searchsorted(classes.ranks, plan.reader)
    cost = np.zeros((rounds, len(classes.ranks)), np.int64)
    np.add.at(cost, (plan.round, reader), cuts.size)
    alone = np.bincount(classes.class_of) == 1
    for kind, extents in _by_kind(cuts):
        arriving = np.bincount(plan.round[extents], minlength=rounds)
        cost += arriving[:, None] * _landing(kind, classes)
        homes = classes.class_of[reader[extents]]
        beside = {home: beside_reading(kind, home, alone=bool(alone[home])) for home in np.unique(homes).tolist()}
        np.add.at(cost, (plan.round[extents], reader[extents]), [beside[home] for home in homes.tolist()])
    return sum((cost[slot::slots].max(axis=0, initial=0) for slot in range(slots)), np.zeros(cost.shape[1], np.int64))


def _by_kind(cuts: Cuts) -> Iterator[tuple[Kind, Ints]]:
    """Every kind with its extents."""
    order = np.argsort(cuts.kind, kind="stable")
    ends = np.cumsum(np.bincount(cuts.kind, minlength=len(cuts.kinds)))
    return zip(cuts.kinds, np.split(order, ends[:-1]) if len(ends) else [], strict=True)


def _landing(kind: Kind, classes: Classes) -> Ints:
    """Bytes of an extent of this kind that each rank needs."""
    of_class = np.zeros(len(classes.needs), np.int64)
    of_class[kind.classes] = kind.landing
    return of_class[classes.class_of]


class Links(NamedTuple):
    """What carries a load, in bytes a second: a host's link to the bucket, a host's link to other hosts, each way, and
    the connections to the bucket that one rank has together."""

    bucket: float
    peers: float
    connections: float


class Times(NamedTuple):
    """Seconds that a rank's bytes take on each link by itself. `bucket` and `peers` are its host's."""

    bucket: float
    connections: float
    peers: float


def times(fetched: Ints, host: Ints, between_hosts: tuple[Ints, Ints], links: Links) -> list[Times]:
    """How long each rank's links are busy. Everything overlaps, so that the longest of all is the load's time:

        bucket       bytes that the host's ranks fetch / the host's link to the bucket
        connections  bytes that the rank fetches / its connections together
        peers        the larger of what the host sends to and receives from other hosts / its link to them

    `fetched` and `host` (its number) are by rank, `between_hosts` what hosts send and receive (see `exchange`). What
    stays on a host, CPUs and the start of a load take no time here: it is the best that the links allow.
    """
    by_host = np.bincount(host, fetched) / links.bucket
    peers = np.maximum(*between_hosts) / links.peers
    connections = fetched / links.connections
    columns = by_host[host].tolist(), connections.tolist(), peers[host].tolist()
    return [Times(*row) for row in zip(*columns, strict=True)]
