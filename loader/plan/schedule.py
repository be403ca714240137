"""One rank's part of the plan, round by round: what it reads, sends and receives, piece by piece.

Both ends of a message derive it from the plan, so nothing but the bytes travels.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from loader.plan.catalog import Entry
from loader.plan.geometry import Box, boxes_of_range, flat_span
from loader.plan.needs import Ints, Needs
from loader.plan.plan import Plan

FILE = 1 << 44
"""Bytes: files are far smaller than these 16 TiB."""


class Piece(NamedTuple):
    """A box of a key inside an extent. It stands in `frame`, a contiguous box of the key whose bytes begin at `at`,
    counted from the extent's first byte."""

    key: int
    box: Box
    frame: Box
    at: int


class Message(NamedTuple):
    """Pieces of one extent for the ranks that need them, row-major each, one after another: `size` bytes.

    `begin` is where the bytes stand in the extent when they are one contiguous run of it, else None: then the reader
    packs them.
    """

    pieces: tuple[Piece, ...]
    size: int
    begin: int | None


@dataclass(frozen=True, slots=True)
class Read:
    """An extent that this rank reads; `own` is what it keeps of it, `sends` go to other ranks."""

    extent: int
    file: int
    start: int
    stop: int
    own: Message
    sends: tuple[tuple[Message, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        return self.stop - self.start


class Receive(NamedTuple):
    """A message that rank `sender` sends to this one."""

    extent: int
    sender: int
    message: Message


@dataclass(frozen=True, slots=True)
class Round:
    """What one rank does in one round, each list in extent order."""

    number: int
    reads: list[Read] = field(default_factory=list)
    receives: list[Receive] = field(default_factory=list)


class Schedule:
    """The rounds of `rank`. Rounds are made one at a time: their pieces need not exist all at once."""

    def __init__(self, plan: Plan, entries: Sequence[Entry], rank: int) -> None:
        self.plan = plan
        self.entries = entries
        self.rank = rank
        self._home = plan.classes.number_of(rank)
        self._others = {
            number: tuple(r for r in plan.classes.members(number).tolist() if r != rank)
            for number in range(len(plan.classes.needs))
        }
        self._by_place = _KeysByPlace(entries)
        self._reads = np.flatnonzero(plan.reader == rank)
        self._consumed = self._extents_of(plan.classes.needs[self._home])
        self._needs_here = [
            _needs_by_key(needs, self._by_place.keys_in(plan, self._reads)) for needs in plan.classes.needs
        ]
        self._own_needs = _needs_by_key(plan.classes.needs[self._home], None)

    @property
    def rounds(self) -> int:
        return self.plan.rounds

    @property
    def read_bytes(self) -> int:
        return int((self.plan.stop - self.plan.start)[self._reads].sum())

    def partners(self) -> list[int]:
        """The ranks that this one sends to, or receives from, and perhaps a few more; each of them has this one among
        its own."""
        starts = _place(self.plan.file, self.plan.start)[self._reads].tolist()
        ends = _place(self.plan.file, self.plan.stop)[self._reads].tolist()

        def reads_for(needs: dict[int, tuple[Box, ...]]) -> bool:
            spans = (self._span(key, box) for key, boxes in needs.items() for box in boxes)
            return any(bisect_right(ends, first) < bisect_left(starts, stop) for first, stop in spans)

        consumers = (self._others[number] for number, needs in enumerate(self._needs_here) if reads_for(needs))
        readers = np.unique(self.plan.reader[self._consumed]).tolist()
        return sorted({*readers, *chain.from_iterable(consumers)} - {self.rank})

    def _span(self, key: int, box: Box) -> tuple[int, int]:
        """The places between which a box of a key stands."""
        at, item = int(self._by_place.place[key]), int(self._by_place.item[key])
        first, stop = flat_span(self.entries[key].shape, box)
        return at + first * item, at + stop * item

    def round(self, number: int) -> Round:
        plan = self.plan
        result = Round(number)
        for extent in self._reads[plan.round[self._reads] == number].tolist():
            result.reads.append(self._read(extent))
        for extent in self._consumed[plan.round[self._consumed] == number].tolist():
            sender = int(plan.reader[extent])
            if sender != self.rank and (message := self._message(self._frames(extent), self._own_needs)).pieces:
                result.receives.append(Receive(extent, sender, message))
        return result

    def _read(self, extent: int) -> Read:
        plan = self.plan
        own = Message((), 0, None)
        sends: dict[Message, tuple[int, ...]] = {}  # classes that need the same of the extent are sent the same
        frames = self._frames(extent)
        for number, needs in enumerate(self._needs_here):
            message = self._message(frames, needs)
            if number == self._home:
                own = message
            if message.pieces and self._others[number]:
                sends[message] = sends.get(message, ()) + self._others[number]
        start, stop = int(plan.start[extent]), int(plan.stop[extent])
        return Read(extent, int(plan.file[extent]), start, stop, own, tuple(sends.items()))

    def _message(self, frames: Sequence[tuple[int, Box, int]], needs: dict[int, tuple[Box, ...]]) -> Message:
        pieces: list[Piece] = []
        size, begin, end, whole = 0, 0, 0, True
        for key, frame, at in frames:
            item = self.entries[key].dtype.itemsize
            found = (need.intersect(frame) for need in needs.get(key, ()))
            for box in sorted(filter(None, found)):  # row-major, so that what is one run of the extent is seen to be
                inside = Box(tuple(map(operator.sub, box.offsets, frame.offsets)), box.sizes)
                first, stop = (at + i * item for i in flat_span(frame.sizes, inside))
                begin = first if not pieces else begin
                whole = whole and stop - first == box.numel * item and (not pieces or first == end)
                end = stop
                pieces.append(Piece(key, box, frame, at))
                size += box.numel * item
        return Message(tuple(pieces), size, begin if pieces and whole else None)

    def _frames(self, extent: int) -> list[tuple[int, Box, int]]:
        """The contiguous boxes that `extent` holds of keys, with where their bytes begin in it."""
        start, stop = int(self.plan.start[extent]), int(self.plan.stop[extent])
        frames = []
        for key in self._by_place.within(int(self.plan.file[extent]), start, stop):
            entry = self.entries[key]
            item = entry.dtype.itemsize
            a, b = max(start, entry.start), min(stop, entry.stop)
            at = a - start
            for frame in boxes_of_range(entry.shape, (a - entry.start) // item, (b - entry.start) // item):
                frames.append((key, frame, at))
                at += frame.numel * item
        return frames

    def _extents_of(self, needs: Needs) -> Ints:
        """The extents that `needs` touch, ascending. A superset: a column box spans rows it does not fill."""
        starts, ends = (_place(self.plan.file, byte) for byte in (self.plan.start, self.plan.stop))
        found = []
        for group in needs.groups:
            shape = self.entries[int(group.keys[0])].shape
            at = self._by_place.place[group.keys]
            item = self._by_place.item[group.keys]  # a group's keys have one shape, not one dtype
            for box in group.boxes:
                first, stop = flat_span(shape, box)
                low = np.searchsorted(ends, at + first * item, side="right")
                high = np.searchsorted(starts, at + stop * item, side="left")
                found += [np.arange(a, b) for a, b in set(zip(low.tolist(), high.tolist(), strict=True))]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


class _KeysByPlace:
    """Finds keys by file and byte."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        file = np.array([e.file for e in entries], np.int64)
        self.place = _place(file, np.array([e.start for e in entries], np.int64))
        end = _place(file, np.array([e.stop for e in entries], np.int64))
        self.item = np.array([e.dtype.itemsize for e in entries], np.int64)
        order = np.lexsort((end, self.place))  # empty keys stand before the key that begins where they do
        # Lists, for they are searched once a message: bisecting them takes a tenth of a searchsorted.
        self._order: list[int] = order.tolist()
        self._starts: list[int] = self.place[order].tolist()
        self._ends: list[int] = end[order].tolist()

    def within(self, file: int, start: int, stop: int) -> list[int]:
        """Keys with bytes in `[start, stop)` of `file`, in file order."""
        first = bisect_right(self._ends, file * FILE + start)
        last = bisect_left(self._starts, file * FILE + stop)
        return self._order[first:last]

    def keys_in(self, plan: Plan, extents: Ints) -> Ints:
        """Keys that any of `extents` touches, ascending."""
        keys: set[int] = set()
        for extent in extents.tolist():
            keys.update(self.within(int(plan.file[extent]), int(plan.start[extent]), int(plan.stop[extent])))
        return np.array(sorted(keys), np.int64)


def _place(file: Ints, byte: Ints) -> Ints:
    """File and byte as one ascending number."""
    return file * FILE + byte


def _needs_by_key(needs: Needs, keys: Ints | None) -> dict[int, tuple[Box, ...]]:
    if keys is None:
        return {int(key): group.boxes for group in needs.groups for key in group.keys}
    return dict(needs.on(keys))
