"""One reader for each extent, among its consumers, so that every rank reads its fair part."""

from __future__ import annotations

import heapq
import sys
from typing import NamedTuple

import numpy as np

from loader.plan.extents import Cuts
from loader.plan.needs import Classes, Ints

PASSES = 20
"""Passes over all pools of readers at most; nested pools are level after the first."""


class _Pool(NamedTuple):
    """The ranks that may read any of `extents`, nodes in turn; the extents from the largest to the smallest."""

    ranks: list[int]
    extents: Ints


def assign_readers(cuts: Cuts, classes: Classes) -> Ints:
    """The rank that reads each extent.

    Extents with the fewest possible readers are placed first, then those with more fill the valleys they left; within
    one pool of readers the largest go first, each to the rank with the least so far; of those with as little, to the
    first of each node before the second of any: 4 extents leave by 4 nodes' links. For nested pools (a shard's owners
    within a replica group within the world) no rank is then more than one extent over the best balance. Pools that
    cross (TP's columns, FSDP's rows) are placed anew on top of all others, pass by pass, while the fullest rank gains.
    """
    size = cuts.size
    pools = _find_pools(cuts, classes)
    load = dict.fromkeys(classes.ranks.tolist(), 0)
    readers = np.full(len(size), -1, np.int64)
    best, fullest = readers, sys.maxsize
    for _ in range(PASSES):
        readers = readers.copy()
        for pool in pools:
            _place(pool, size, readers, load)
        if max(load.values()) >= fullest:
            break
        best, fullest = readers, max(load.values())
    return best


def _find_pools(cuts: Cuts, classes: Classes) -> list[_Pool]:
    """One for each set of consuming classes, the smallest first."""
    numbers: dict[bytes, int] = {}
    pool_of_kind = np.array([numbers.setdefault(kind.classes.tobytes(), len(numbers)) for kind in cuts.kinds], np.int64)
    pool_of = pool_of_kind[cuts.kind]
    by_size = np.argsort(-cuts.size, kind="stable")
    turns = np.lexsort((classes.ranks, classes.place))
    pools = []
    for consumers, number in numbers.items():
        ranks = turns[np.isin(classes.class_of[turns], np.frombuffer(consumers, np.int64))]
        pools.append(_Pool(classes.ranks[ranks].tolist(), by_size[pool_of[by_size] == number]))
    return sorted(pools, key=lambda pool: (len(pool.ranks), pool.ranks))


def _place(pool: _Pool, size: Ints, readers: Ints, load: dict[int, int]) -> None:
    """Place the pool's extents, which leave where they were, on top of all others."""
    sizes = size[pool.extents].tolist()
    for reader, bytes_ in zip(readers[pool.extents].tolist(), sizes, strict=True):
        if reader >= 0:
            load[reader] -= bytes_
    heap = [(load[rank], turn, rank) for turn, rank in enumerate(pool.ranks)]
    heapq.heapify(heap)
    placed = []
    for bytes_ in sizes:
        least, turn, rank = heap[0]
        placed.append(rank)
        heapq.heapreplace(heap, (least + bytes_, turn, rank))
    readers[pool.extents] = placed
    load.update((rank, least) for least, _, rank in heap)
