"""From every rank's demand to the plan: gathered by digest, planned once for each sharing domain."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loader.exchange.control import Control
from loader.plan.catalog import Catalog
from loader.plan.extents import Limits, cut_extents
from loader.plan.needs import Classes
from loader.plan.plan import Plan, make_plan
from loader.stream.demand import Demand, check_unused

Share = Literal["world", "node", "none"]


@dataclass(frozen=True, slots=True)
class Planned:
    """This rank's domain's plan; what the whole job needs, each byte of a used key once, and what it reads."""

    plan: Plan
    needed_bytes: int
    read_bytes: int


def pack(value: Any) -> bytes:
    """Encode for another rank of this job."""
    return zlib.compress(pickle.dumps(value), level=1)


def unpack(data: bytes) -> Any:
    return pickle.loads(zlib.decompress(data))  # noqa: S301 - from a rank of this job, never from a checkpoint


def agree_on_plan(
    control: Control,
    demand: Demand,
    catalog: Catalog,
    *,
    share: Share,
    node: str,
    limits: Limits,
    partners: Sequence[Collection[int]],
) -> Planned:
    """Gather demands, prove that they cover the catalog, and plan. Every rank calls it.

    Ranks tell their digests first: of equal demands only one is sent. Rank 0 proves coverage for all; the first rank of
    each domain plans for its domain. `partners` are keys whose elements are combined. Raises CoverageError and
    MemoryBudgetError.
    """
    entries = list(catalog.entries.values())
    with control.phase("demand"):
        control.put("digest", pack((demand.digest, node)))
        told = b""
        if control.rank == 0:
            told = pack([unpack(data) for data in control.take("digest", range(control.world_size))])
        ranks: list[tuple[bytes, str]] = unpack(control.broadcast("digests", told))
    digests = [digest for digest, _ in ranks]
    spokesman = {digest: digests.index(digest) for digest in dict.fromkeys(digests)}
    domain, heads = _domain(control.rank, [node for _, node in ranks], share)
    control.peers = domain
    with control.phase("plan"):
        if spokesman[demand.digest] == control.rank:
            control.put("demand", pack(demand))
        plan = totals = b""
        needed = 0
        if control.rank == domain[0]:
            demands = _distinct(control, domain, digests, spokesman)
            if control.rank == 0 and share == "world":
                check_unused((each.unused for each in demands.values()), catalog.entries)
            made = make_plan(entries, _classes(domain, digests, demands), limits, partners)
            plan, needed = pack(made), made.needed_bytes
            control.put("reads", pack(made.read_bytes))
        if control.rank == 0 and share != "world":
            everyone = range(control.world_size)
            demands = _distinct(control, everyone, digests, spokesman)
            check_unused((each.unused for each in demands.values()), catalog.entries)
            needed = cut_extents(entries, _classes(everyone, digests, demands), limits.range_bytes).needed_bytes
        if control.rank == 0:
            totals = pack((needed, sum(map(unpack, control.take("reads", heads)))))
        mine = control.broadcast(f"plan/{domain[0]}", plan, domain[0])
        return Planned(unpack(mine), *unpack(control.broadcast("totals", totals)))


def _domain(rank: int, nodes: Sequence[str], share: Share) -> tuple[list[int], list[int]]:
    """The ranks that share what is read with `rank`, ascending; and the first rank of every such domain."""
    if share == "world":
        return list(range(len(nodes))), [0]
    if share == "none":
        return [rank], list(range(len(nodes)))
    return [r for r, node in enumerate(nodes) if node == nodes[rank]], [nodes.index(n) for n in dict.fromkeys(nodes)]


def _distinct(
    control: Control, ranks: Sequence[int], digests: Sequence[bytes], spokesman: dict[bytes, int]
) -> dict[bytes, Demand]:
    """The distinct demands of `ranks`, each from the first rank of the world that has it."""
    distinct = list(dict.fromkeys(digests[rank] for rank in ranks))
    sent = control.take("demand", [spokesman[digest] for digest in distinct])
    return dict(zip(distinct, map(unpack, sent), strict=True))


def _classes(ranks: Sequence[int], digests: Sequence[bytes], demands: dict[bytes, Demand]) -> Classes:
    needs = {digest: demand.needs for digest, demand in demands.items()}
    return Classes.of({rank: digests[rank] for rank in ranks}, needs)
