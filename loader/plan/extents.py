"""From the needs of all classes to extents: what is read in one go, and by whom it may be read.

Keys of one pattern (shape, item size, needs) are cut once, then laid out at each key's place: the cost grows with
patterns and blocks, not with ranks times keys.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loader.errors import MemoryBudgetError
from loader.plan.blocks import Block, cut, join, may_join
from loader.plan.catalog import Entry
from loader.plan.geometry import Box
from loader.plan.needs import Classes, Ints, common

GAP_BYTES = 128 * 1024
"""Unneeded bytes inside a row that are read rather than skipped: at 85 MB/s a connection they take 1.5 ms, a further
request 10 to 50 ms. A wider stretch is never read."""

SMALL_SHARE = 8
"""A block under 1/8 of the range size is small: its request's latency outweighs exchanging it."""


FINEST = 64
"""A read that costs more than a round holds is cut finer, down to 1/64 of the range size."""


LEAST_USABLE = 1 << 20
"""Bytes for rounds without which a load would be all latency: two rounds of a read of 100 KiB each."""


BESIDE = 12 * 1024
"""What a range in flight takes beside its bytes, in tensors, futures and what gloo keeps for each transfer: 9 kB, as
measured with 600 of them."""


class Limits(NamedTuple):
    """`range_bytes` is the size of a read; `round_bytes` what one of `rounds_in_flight` rounds may cost a rank."""

    range_bytes: int
    round_bytes: int
    rounds_in_flight: int

    @classmethod
    def within(cls, memory_budget: int, range_size: int, reserved: int) -> Limits:
        """Share a budget (bytes) between rounds.

        A quarter is left to what is not planned, or `reserved` bytes if that is more. The rest holds 2 to 4 rounds, so
        that one is read while another is exchanged: more than 2 where each holds 4.8 ranges, which is 1.6 read, packed
        and received. Reads stay at the range size; only the keys whose reads do not fit a round are cut finer. Of a
        round, what each of its ranges takes beside its bytes is left free. Ranges of 8 MiB: 512 MiB give 4 rounds of
        96 MiB; 64 MiB, 26 of them reserved, give 2 of 19 MiB. Ranges of 64 KiB: 27/32 of a round are bytes.

        Raises MemoryBudgetError where next to nothing is left.
        """
        usable = memory_budget - max(memory_budget // 4, reserved)
        if usable < LEAST_USABLE:
            raise MemoryBudgetError(
                f"read.memory_budget: {memory_budget} bytes, of which the storage client, the catalog and what waits "
                f"for its partners take {reserved}: set it to at least {-(-(reserved + LEAST_USABLE) >> 20)}MiB"
            )
        rounds = max(2, min(4, usable * 10 // (48 * range_size)))
        range_bytes = min(range_size, usable // rounds)
        round_bytes = usable // rounds * range_bytes // (range_bytes + BESIDE)
        return cls(min(range_bytes, round_bytes), round_bytes, rounds)


class Kind(NamedTuple):
    """What extents with the same consumers and shares have in common. Arrays over the consuming classes, ascending.

    Class `classes[i]` needs `landing[i]` bytes of the extent, which the reader sends it as message number `message[i]`:
    classes that need the same are sent the same. `staged[m]` bytes must be packed to send message m.
    """

    classes: Ints
    landing: Ints
    message: Ints
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

    What is needed of each key is folded into one 64-bit number, without a Python object a key and once for all classes
    that share an array of keys; keys with equal numbers are one pattern. The multiplier is 2^64 over the golden ratio
    (Knuth, TAOCP 6.4).
    """
    users: dict[int, tuple[Ints, list[tuple[int, tuple[Box, ...]]]]] = {}
    for number, needs in enumerate(classes.needs):
        for group in needs.groups:
            users.setdefault(id(group.keys), (group.keys, []))[1].append((number, group.boxes))
    fold = np.zeros(len(entries), np.uint64)
    is_needed = np.zeros(len(entries), bool)
    golden = np.uint64(0x9E3779B97F4A7C15)
    for keys, needed_by in users.values():
        fold[keys] = (fold[keys] ^ np.uint64(hash(tuple(needed_by)) % 2**64)) * golden
        fold[keys] ^= fold[keys] >> np.uint64(29)
        is_needed[keys] = True
    needed = np.flatnonzero(is_needed)
    layout: dict[tuple[tuple[int, ...], int], int] = {}
    layouts = [layout.setdefault((entries[k].shape, entries[k].dtype.itemsize), len(layout)) for k in needed.tolist()]
    signature = np.stack([fold[needed], np.array(layouts, np.uint64)])
    _, first, inverse = np.unique(signature, axis=1, return_index=True, return_inverse=True)
    leaders = np.sort(needed[first])
    by_leader: dict[int, list[tuple[int, Box]]] = {leader: [] for leader in leaders.tolist()}
    for keys, needed_by in users.values():
        pairs = [(number, box) for number, boxes in needed_by for box in boxes]
        for leader in common(keys, leaders).tolist():
            by_leader[leader] += pairs
    leader_of = needed[first][inverse.reshape(-1)]
    return [Pattern(needed[leader_of == leader], tuple(needs)) for leader, needs in by_leader.items()]


def cut_extents(entries: Sequence[Entry], classes: Classes, range_bytes: int, round_bytes: int = sys.maxsize) -> Cuts:
    """Cut what is needed into disjoint extents that cover every need.

    An extent has at most 1.6 `range_bytes` (more only where a single element has), and costs its reader at most
    `round_bytes` where cutting finer can make it so.
    """
    blocks: list[Block] = []  # in bytes, relative to their key
    columns: list[tuple[Ints, ...]] = []
    needed = 0
    files = np.array([e.file for e in entries], np.int64)
    starts = np.array([e.start for e in entries], np.int64)
    for pattern in find_patterns(entries, classes):
        for block in pattern_blocks(entries[int(pattern.keys[0])], pattern, range_bytes, round_bytes):
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
    file, start, stop, number = file[order], start[order], stop[order], number[order]
    joins = _Joins(blocks, range_bytes, round_bytes)
    head, kind = joins.follow(file, start, stop, number)
    tail = np.append(head[1:], len(start)) - 1
    return Cuts(file[head], start[head], stop[tail], kind, joins.kinds, needed)


def pattern_blocks(entry: Entry, pattern: Pattern, range_bytes: int, round_bytes: int) -> list[Block]:
    item = entry.dtype.itemsize
    limit = max(1, range_bytes // item)
    finest = max(1, limit // FINEST)
    while True:
        cuts = cut(entry.shape, pattern.needs, row_limit=limit, gap_limit=max(1, GAP_BYTES // item))
        small = max(1, limit // SMALL_SHARE)
        blocks = [_in_bytes(block, item) for block in join(cuts, small=small, limit=limit)]
        if limit == finest or max(block.cost for block in blocks) <= round_bytes:
            return blocks
        limit = max(finest, limit * 3 // 4)


def _in_bytes(block: Block, item: int) -> Block:
    shares = {
        number: share._replace(elements=share.elements * item, first=share.first * item, stop=share.stop * item)
        for number, share in block.shares.items()
    }
    return Block(block.start * item, block.stop * item, shares, block.needed * item)


class _Joins:
    """Joins small blocks of neighbouring keys to runs. Equal runs, layer after layer, are made once: a run's number
    follows from the number of the run without its last block, and that block's."""

    def __init__(self, blocks: Sequence[Block], range_bytes: int, round_bytes: int) -> None:
        self._runs = list(blocks)
        self._longer: dict[tuple[int, int], int | None] = {}
        self._range_bytes = range_bytes
        self._round_bytes = round_bytes
        self.kinds: tuple[Kind, ...] = ()

    def follow(self, file: Ints, start: Ints, stop: Ints, number: Ints) -> tuple[Ints, Ints]:
        """Where each run begins among the blocks (given in file order), and its kind, a position in `self.kinds`."""
        touches = np.append(False, (file[1:] == file[:-1]) & (start[1:] == stop[:-1]))
        heads: list[int] = []
        runs: list[int] = []
        for i, (block, touching) in enumerate(zip(number.tolist(), touches.tolist(), strict=True)):
            longer = self._join(runs[-1], block) if touching else None
            if longer is None:
                heads.append(i)
                runs.append(block)
            else:
                runs[-1] = longer
        used, kind = np.unique(np.array(runs, np.int64), return_inverse=True)
        self.kinds = tuple(_kind(self._runs[run]) for run in used.tolist())
        return np.array(heads, np.int64), kind.reshape(-1)

    def _join(self, run: int, block: int) -> int | None:
        """The number of `run` with `block` after it, or None where they stay apart."""
        if (run, block) not in self._longer:
            left, right = self._runs[run], self._runs[block]
            small = max(1, self._range_bytes // SMALL_SHARE)
            longer = None
            if may_join(left, right, small=small, limit=self._range_bytes):
                joined = left.joined(right.shifted(left.stop - right.start))
                if joined.cost <= self._round_bytes:
                    longer = len(self._runs)
                    self._runs.append(joined)
            self._longer[run, block] = longer
        return self._longer[run, block]


def _kind(block: Block) -> Kind:
    classes = sorted(block.shares)
    shares = [block.shares[c] for c in classes]
    messages = {share: number for number, share in enumerate(dict.fromkeys(shares))}
    return Kind(
        np.array(classes, np.int64),
        np.array([share.elements for share in shares], np.int64),
        np.array([messages[share] for share in shares], np.int64),
        np.array([share.packed for share in messages], np.int64),
    )
