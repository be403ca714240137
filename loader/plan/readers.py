"""One reader for each extent, among its consumers, so that every rank reads its fair part."""

from __future__ import annotations

import heapq

import numpy as np

from loader.plan.extents import Cuts
from loader.plan.needs import Classes, Ints


def assign_readers(cuts: Cuts, classes: Classes) -> Ints:
    """The rank that reads each extent.

    Extents with the fewest possible readers are placed first, then those with more fill the valleys they left; within
    one set of consumers the largest go first, each to the rank with the least so far. For nested consumer sets (a
    shard's owners within a replica group within the world) no rank is more than one extent over the best balance.
    """
    members = [classes.members(number) for number in range(len(classes.needs))]
    sets: dict[bytes, list[int]] = {}
    for number, kind in enumerate(cuts.kinds):
        sets.setdefault(kind.classes.tobytes(), []).append(number)
    pools = [
        (np.sort(np.concatenate([members[c] for c in cuts.kinds[kinds[0]].classes])), kinds) for kinds in sets.values()
    ]
    readers = np.empty(len(cuts.start), np.int64)
    load = dict.fromkeys(classes.ranks.tolist(), 0)
    set_of_kind = np.empty(len(cuts.kinds), np.int64)
    for i, (_, kinds) in enumerate(pools):
        set_of_kind[kinds] = i
    set_of = set_of_kind[cuts.kind]
    size = cuts.size
    for i in sorted(range(len(pools)), key=lambda i: (len(pools[i][0]), pools[i][0].tolist())):
        ranks = pools[i][0].tolist()
        extents = np.flatnonzero(set_of == i)
        if len(ranks) == 1:
            readers[extents] = ranks[0]
            load[ranks[0]] += int(size[extents].sum())
            continue
        heap = [(load[rank], rank) for rank in ranks]
        heapq.heapify(heap)
        for extent in extents[np.argsort(-size[extents], kind="stable")].tolist():
            least, rank = heap[0]
            readers[extent] = rank
            heapq.heapreplace(heap, (least + int(size[extent]), rank))
        load.update((rank, least) for least, rank in heap)
    return readers
