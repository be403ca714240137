"""From the needs of all classes to extents: what is read in one go, and by whom it may be read.

Keys of one pattern (shape, item size, needs) are cut once, then laid out at each key's place: the cost grows with
patterns and blocks, not with ranks times keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loader.plan.blocks import Block, Share, cut, join, may_join
from loader.plan.catalog import Entry
from loader.plan.geometry import Box
from loader.plan.needs import Classes, Ints

GAP_BYTES = 128 * 1024
"""Unneeded bytes inside a row that are read rather than skipped: at 85 MB/s a connection they take 1.5 ms, a further
request 10 to 50 ms. A wider stretch is never read."""

SMALL_SHARE = 8
"""A block under 1/8 of the range size is small: its request's latency outweighs exchanging it."""


class Limits(NamedTuple):
    """`range_bytes` is the size of a read; `round_bytes` what one of `rounds_in_flight` rounds may cost a rank."""

    range_bytes: int
    round_bytes: int
    rounds_in_flight: int

    @classmethod
    def within(cls, memory_budget: int, range_size: int) -> Limits:
        """Share a budget (bytes) between rounds.

        A quarter is left to clients and the interpreter. The rest holds 2 to 4 rounds, so that one is read while
        another is exchanged; and a round holds at least one extent of up to 1.6 ranges read, staged and received:
        4.8 ranges. 512 MiB: 4 rounds of 96 MiB. 64 MiB: 2 rounds of 24 MiB, reads of 5 MiB.
        """
        usable = memory_budget * 3 // 4
        range_bytes = min(range_size, usable * 10 // (2 * 48))
        rounds = max(2, min(4, usable * 10 // (48 * range_bytes)))
        return cls(range_bytes, usable // rounds, rounds)


class Kind(NamedTuple):
    """What extents with the same consumers and shares have in common. Arrays over the consuming classes.

    `landing[i]` bytes of the extent are needed by class `classes[i]`, of which the reader must stage `staged[i]`.
    """

    classes: Ints
    landing: Ints
    staged: Ints


@dataclass(frozen=True, slots=True)
class Cuts:
    """Every extent, in file order: bytes `[start, stop)` of `file`, with its kind in `kinds[kind]`.

    `needed_bytes` counts each byte that any rank needs once: less than the extents' bytes where gaps are bridged.
    """

    file: Ints
    start: Ints
    stop: Ints
    kind: Ints
    kinds: tuple[Kind, ...]
    needed_bytes: int

    @property
    def size(self) -> Ints:
        return self.stop - self.start


class Pattern(NamedTuple):
    """Keys (ascending) of one shape and item size that the same classes need alike."""

    keys: Ints
    needs: tuple[tuple[int, Box], ...]


def find_patterns(entries: Sequence[Entry], classes: Classes) -> list[Pattern]:
    """Group the needed keys by what decides how they are cut.

    Each key's needs are folded into one 64-bit number, class by class and group by group, without a Python object a
    key; keys with equal numbers are one pattern. The multiplier is 2^64 over the golden ratio (Knuth, TAOCP 6.4).
    """
    fold = np.zeros(len(entries), np.uint64)
    golden = np.uint64(0x9E3779B97F4A7C15)
    seen: dict[tuple[int, tuple[Box, ...]], int] = {}
    layout: dict[tuple[tuple[int, ...], int], int] = {}
    owners: list[tuple[int, tuple[Box, ...], Ints]] = []
    for number, needs in enumerate(classes.needs):
        for group in needs.groups:
            token = np.uint64(seen.setdefault((number, group.boxes), len(seen)) + 1)
            fold[group.keys] = (fold[group.keys] ^ token) * golden
            fold[group.keys] ^= fold[group.keys] >> np.uint64(29)
            owners.append((number, group.boxes, group.keys))
    needed = np.flatnonzero(fold)
    layouts = np.array(
        [layout.setdefault((entries[k].shape, entries[k].dtype.itemsize), len(layout)) for k in needed.tolist()],
        np.uint64,
    )
    signature = np.stack([fold[needed], layouts])
    _, first, inverse = np.unique(signature, axis=1, return_index=True, return_inverse=True)
    leaders = needed[first]
    order = np.argsort(leaders)
    by_leader: dict[int, list[tuple[int, Box]]] = {int(k): [] for k in leaders}
    for number, boxes, keys in owners:
        for key in np.intersect1d(keys, leaders, assume_unique=True):
            by_leader[int(key)] += [(number, box) for box in boxes]
    flat = inverse.reshape(-1)
    return [Pattern(needed[flat == i], tuple(by_leader[int(leaders[i])])) for i in order]


def cut_extents(entries: Sequence[Entry], classes: Classes, range_bytes: int) -> Cuts:
    """Cut what is needed into extents of at most 1.6 `range_bytes`, disjoint, covering every need."""
    blocks: list[Block] = []  # in bytes, relative to their key
    columns: list[tuple[Ints, ...]] = []
    needed = 0
    files = np.array([e.file for e in entries], np.int64)
    starts = np.array([e.start for e in entries], np.int64)
    for pattern in find_patterns(entries, classes):
        for block in _pattern_blocks(entries[int(pattern.keys[0])], pattern, range_bytes):
            at = starts[pattern.keys]
            number = np.full(len(at), len(blocks), np.int64)
            columns.append((files[pattern.keys], at + block.start, at + block.stop, number))
            blocks.append(block)
            needed += block.needed * len(at)
    if not columns:
        none = np.zeros(0, np.int64)
        return Cuts(none, none, none, none, (), 0)
    file, start, stop, number = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.lexsort((start, file))
    return _join_neighbours(file[order], start[order], stop[order], number[order], blocks, range_bytes, needed)


def _pattern_blocks(entry: Entry, pattern: Pattern, range_bytes: int) -> list[Block]:
    item = entry.dtype.itemsize
    limit = max(1, range_bytes // item)
    cuts = cut(entry.shape, pattern.needs, row_limit=limit, gap_limit=max(1, GAP_BYTES // item))
    return [_in_bytes(block, item) for block in join(cuts, small=max(1, limit // SMALL_SHARE), limit=limit)]


def _in_bytes(block: Block, item: int) -> Block:
    shares = {c: Share(s.elements * item, s.first * item, s.stop * item, s.ragged) for c, s in block.shares.items()}
    return Block(block.start * item, block.stop * item, shares, block.needed * item)


def _join_neighbours(
    file: Ints, start: Ints, stop: Ints, number: Ints, blocks: Sequence[Block], range_bytes: int, needed: int
) -> Cuts:
    """Join small blocks of neighbouring keys. Equal runs of blocks (layer after layer) share one kind."""
    small = max(1, range_bytes // SMALL_SHARE)
    firsts: list[int] = []
    kind_of: list[int] = []
    kinds: dict[tuple[int, ...], int] = {}
    made: list[Kind] = []
    run: Block | None = None
    members: tuple[int, ...] = ()

    def close() -> None:
        if run is not None:
            if members not in kinds:
                kinds[members] = len(made)
                made.append(_kind(run))
            kind_of.append(kinds[members])

    rows = zip(file.tolist(), start.tolist(), stop.tolist(), number.tolist(), strict=True)
    last = (-1, -1)
    for i, (f, a, b, n) in enumerate(rows):
        block = blocks[n]
        if run is not None and last == (f, a) and may_join(run, block, small=small, limit=range_bytes):
            run, members = run.joined(block.shifted(run.stop - block.start)), (*members, n)
        else:
            close()
            run, members = block, (n,)
            firsts.append(i)
        last = (f, b)
    close()
    head = np.array(firsts, np.int64)
    tail = np.append(head[1:], len(start)) - 1
    return Cuts(file[head], start[head], stop[tail], np.array(kind_of, np.int64), tuple(made), needed)


def _kind(block: Block) -> Kind:
    classes = sorted(block.shares)
    shares = [block.shares[c] for c in classes]
    return Kind(
        np.array(classes, np.int64),
        np.array([s.elements for s in shares], np.int64),
        np.array([s.packed for s in shares], np.int64),
    )
