"""From every rank's demand to the plan: gathered by digest, planned once for each sharing domain."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from loader.exchange.control import Control
from loader.plan.catalog import Catalog
from loader.plan.extents import Limits, cut_extents
from loader.plan.plan import Plan, Share, make_plan, sharing_domains
from loader.stream.demand import Demand, check_unused, classes_of

PORTIONS = 512
"""An op on several tensors holds at most budget / 512 elements of each at a time: 1 Mi of 512 MiB, 4 MiB in float32."""

COMBINING = 5 << 20
"""What an op on several tensors takes beside what waits for it: 3 kB a portion, and torch's first use of the ops. Of 36
MiB of float8 with a budget of 16 MiB, 5 MiB were measured."""


class Terms(NamedTuple):
    """What a plan is made under: the `limits` of reads and rounds, the keys whose elements are combined, and how many
    elements of each are held at once for that."""

    limits: Limits
    partners: list[set[int]]
    portion: int

    @classmethod
    def of(cls, together: list[set[int]], memory_budget: int, range_size: int, reserved: int, *, waits: bool) -> Terms:
        """With partners `together`; what `waits` to be combined, on any rank, has half of what `reserved` leaves.

        Raises MemoryBudgetError.
        """
        if waits:
            reserved += COMBINING
            reserved += max(0, memory_budget - reserved) // 2
        limits = Limits.within(memory_budget, range_size, reserved)
        return cls(limits, together, memory_budget // PORTIONS)


@dataclass(frozen=True, slots=True)
class Planned:
    """This rank's domain's plan; what the whole job needs, each byte of a used key once, and what it reads; and the
    ranks on this rank's node, ascending."""

    plan: Plan
    needed_bytes: int
    read_bytes: int
    on_node: tuple[int, ...]


def pack(value: Any) -> bytes:
    """Encode for another rank of this job."""
    return zlib.compress(pickle.dumps(value), level=1)


def unpack(data: bytes) -> Any:
    return pickle.loads(zlib.decompress(data))  # noqa: S301 - from a rank of this job, never from a checkpoint


def on_any_rank(control: Control, fact: str, holds: bool) -> bool:
    """Whether `fact`, which is asked for once in a job, holds on any rank. Every rank asks, within a phase."""
    control.put(fact, pack(holds))
    everyone = range(control.world_size)
    found = pack(any(map(unpack, control.take(fact, everyone)))) if control.rank == 0 else b""
    return bool(unpack(control.broadcast(f"{fact} on any rank", found)))


def alike_on_all_ranks(control: Control, name: str, value: str | None) -> bool:
    """Whether every rank has one and the same `value`, and not None. Every rank asks once, within a phase."""
    return _count(control, name, value) == 1


def differs_on_all_ranks(control: Control, name: str, value: str | None) -> bool:
    """Whether every rank has a `value` of its own, and not None. Every rank asks once, within a phase."""
    return _count(control, name, value) == control.world_size


def _count(control: Control, name: str, value: str | None) -> int:
    """How many values there are on all ranks together; 0 where any is None."""
    control.put(name, pack(value))
    told = b""
    if control.rank == 0:
        values = set(map(unpack, control.take(name, range(control.world_size))))
        told = pack(0 if None in values else len(values))
    return int(unpack(control.broadcast(f"{name} on all ranks", told)))


def agree_on_plan(
    control: Control,
    demand: Demand,
    catalog: Catalog,
    *,
    share: Share,
    node: str,
    terms: Terms,
) -> Planned:
    """Gather demands, prove that they cover the catalog, and plan. Every rank calls it.

    Ranks tell their digests first: of equal demands only one is sent. Rank 0 proves coverage for all; the first rank of
    each domain plans for its domain. Raises CoverageError and MemoryBudgetError.
    """
    entries = list(catalog.entries.values())
    with control.phase("demand"):
        control.put("digest", pack((demand.digest, node)))
        told = b""
        if control.rank == 0:
            told = pack([unpack(data) for data in control.take("digest", range(control.world_size))])
        ranks: list[tuple[bytes, str]] = unpack(control.broadcast("digests", told))
    digests, nodes = [digest for digest, _ in ranks], [node for _, node in ranks]
    spokesman = {digest: digests.index(digest) for digest in dict.fromkeys(digests)}
    domains = sharing_domains(nodes, share)
    domain = next(each for each in domains if control.rank in each)
    control.peers = domain
    with control.phase("plan"):
        if spokesman[demand.digest] == control.rank:
            control.put("demand", pack(demand))
        plan = totals = b""
        needed = 0
        if control.rank == domain[0]:
            demands = _distinct(control, domain, digests, spokesman)
            if control.rank == 0 and share == "world":
                check_unused((each.unused for each in demands.values()), catalog.keys)
            made = make_plan(entries, classes_of(domain, digests, demands, nodes), terms.limits, terms.partners)
            plan, needed = pack(made), made.needed_bytes
            control.put("reads", pack(made.read_bytes))
        if control.rank == 0 and share != "world":
            everyone = range(control.world_size)
            demands = _distinct(control, everyone, digests, spokesman)
            check_unused((each.unused for each in demands.values()), catalog.keys)
            classes = classes_of(everyone, digests, demands, nodes)
            needed = cut_extents(entries, classes, terms.limits.range_bytes).needed_bytes
        if control.rank == 0:
            totals = pack((needed, sum(map(unpack, control.take("reads", [each[0] for each in domains])))))
        mine = control.broadcast(f"plan/{domain[0]}", plan, domain[0])
        on_node = tuple(rank for rank, other in enumerate(nodes) if other == node)
        needed, reads = unpack(control.broadcast("totals", totals))
        return Planned(unpack(mine), needed, reads, on_node)


def _distinct(
    control: Control, ranks: Sequence[int], digests: Sequence[bytes], spokesman: dict[bytes, int]
) -> dict[bytes, Demand]:
    """The distinct demands of `ranks`, each from the first rank of the world that has it."""
    distinct = list(dict.fromkeys(digests[rank] for rank in ranks))
    sent = control.take("demand", [spokesman[digest] for digest in distinct])
    return dict(zip(distinct, map(unpack, sent), strict=True))
