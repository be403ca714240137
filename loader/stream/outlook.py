"""The plans of a whole world, and what they come to."""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np

from loader.plan.catalog import Catalog
from loader.plan.claims import Spans
from loader.plan.extents import cut_extents
from loader.plan.forecast import Forecast, egress_bytes, exchange, forecast
from loader.plan.needs import Ints
from loader.plan.plan import Share, plan_with_cuts, sharing_domains
from loader.stream.demand import check_unused, classes_of
from loader.stream.foresight import Foresight
from loader.stream.planning import Terms


class Outlook(NamedTuple):
    """What all ranks will do, by rank; what hosts send and receive; in bytes, what the whole job needs, what its ranks
    need together, and what leaves the bucket for each way of sharing; and all that is read, by distinct domain."""

    ranks: Forecast
    between_hosts: tuple[Ints, Ints]
    needed_bytes: int
    held_bytes: int
    egress_bytes: dict[str, int]
    reads: list[Spans]


def look_ahead(foresight: Foresight, catalog: Catalog, terms: Terms, host: Ints, share: Share) -> Outlook:
    """Prove coverage and plan, as `agree_on_plan` does with ranks that are there. `host` has each rank's, ascending.

    Domains of ranks with the same demands are planned once. Raises CoverageError and MemoryBudgetError.
    """
    entries = list(catalog.entries.values())
    check_unused((each.unused for each in foresight.demands.values()), catalog.keys)
    demands = [foresight.ranks[rank].demand for rank in range(len(host))]
    columns = Forecast(*(np.zeros(len(host), np.int64) for _ in Forecast._fields))
    between_hosts = np.zeros((2, int(host[-1]) + 1), np.int64)
    known: dict[tuple[int, ...], tuple[Forecast, tuple[Ints, Ints]]] = {}
    reads: list[Spans] = []
    nodes = [str(each) for each in host.tolist()]
    for domain in sharing_domains(nodes, share):
        same = tuple(demands[rank] for rank in domain)
        first, last = int(host[domain[0]]), int(host[domain[-1]])
        if same not in known:
            classes = classes_of(domain, demands, foresight.demands, nodes)
            plan, cuts = plan_with_cuts(entries, classes, terms.limits, terms.partners)
            reads.append(Spans(plan.file, plan.start, plan.stop))
            known[same] = forecast(plan, cuts, terms.limits), exchange(plan, cuts, host[domain] - first)
        own, between = known[same]
        for column, values in zip(columns, own, strict=True):
            column[domain] = values
        between_hosts[:, first : last + 1] += between
    everyone = classes_of(range(len(host)), demands, foresight.demands, nodes)
    others = {each: sharing_domains(nodes, each) for each in get_args(Share) if each != share}
    egress = egress_bytes(entries, everyone, others, terms.limits)
    item = np.array([entry.dtype.itemsize for entry in entries], np.int64)
    sizes = {number: demand.needs.size(item) for number, demand in foresight.demands.items()}
    return Outlook(
        columns,
        (between_hosts[0], between_hosts[1]),
        plan.needed_bytes
        if share == "world"
        else cut_extents(entries, everyone, terms.limits.range_bytes).needed_bytes,
        sum(sizes[number] for number in demands),
        {each: egress.get(each, int(columns.fetched.sum())) for each in get_args(Share)},
        reads,
    )
