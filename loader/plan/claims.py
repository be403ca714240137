"""What bytes of files are claimed to have which CRC, and what of that can be checked by those who read them.

Pure: whoever reads a range makes the CRCs of its parts, and these are joined to that of the whole, which nobody holds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from loader.errors import ConfigError
from loader.ground.crc import Algorithm, joined
from loader.plan.catalog import Catalog
from loader.plan.needs import Ints

LISTED = 5
"""How many files an error lists."""


class Claim(NamedTuple):
    """Bytes `[start, stop)` of file number `file` have the CRC `value`, which the bucket, or the file itself, says.

    Those before `known` were read as the file was catalogued, and have the CRC `crc`.
    """

    file: int
    start: int
    stop: int
    algorithm: Algorithm
    value: int
    known: int
    crc: int


@dataclass(frozen=True, slots=True)
class Claims:
    """All of them, by file and byte, without overlaps; and by the number of the others' files why there is none."""

    each: tuple[Claim, ...] = ()
    without: Mapping[int, str] = field(default_factory=dict)


class Spans(NamedTuple):
    """Bytes `[start, stop)` of files, as columns."""

    file: Ints
    start: Ints
    stop: Ints


class Checkable(NamedTuple):
    """The numbers of the claims whose bytes are all read, and by the number of a file why not all of it is checked."""

    numbers: list[int]
    without: dict[int, str]


class Part(NamedTuple):
    """The CRC of bytes `[start, stop)` of claim number `claim`."""

    claim: int
    start: int
    stop: int
    crc: int


def checkable(claims: Claims, reads: Sequence[Spans], catalog: Catalog) -> Checkable:
    """What those who make `reads` can check between them. Raises ConfigError where that is nothing at all."""
    numbers, without = [], dict(claims.without)
    for number, gap in enumerate(unread(claims.each, reads)):
        if gap is None:
            numbers.append(number)
        else:
            file = claims.each[number].file
            without.setdefault(file, f"bytes {gap[0]}-{gap[1]} are not read{_key_at(catalog, file, *gap)}")
    if all(claims.each[number].known == claims.each[number].stop for number in numbers):
        named = [f"{catalog.files[file].name}: {why}" for file, why in sorted(without.items())]
        more = f"; and {len(named) - LISTED} files more" if len(named) > LISTED else ""
        raise ConfigError(
            f"verify: checksum, but there is no file that could be checked ({'; '.join(named[:LISTED])}{more}). Set "
            "verify to fingerprint or null, or upload the files with a checksum of the whole object"
        )
    return Checkable(numbers, without)


def _key_at(catalog: Catalog, file: int, start: int, stop: int) -> str:
    for name, entry in catalog.entries.items():
        if entry.file == file and entry.start < stop and entry.stop > start:
            return f", which nobody needs (key {name})"
    return ""


def unread(claims: Sequence[Claim], reads: Sequence[Spans]) -> list[tuple[int, int] | None]:
    """For each claim its first bytes that none of `reads` has, None where all are read.

    Of bytes 0-100, of which 20 are known: reads of 20-60 and 50-80 leave (80, 100), a further one of 80-100 none.
    """
    by_file = _by_file(reads)
    return [_gap(claim, *by_file.get(claim.file, (np.zeros(0, np.int64),) * 2)) for claim in claims]


def _by_file(reads: Sequence[Spans]) -> dict[int, tuple[Ints, Ints]]:
    """The stretches that are read of each file, disjoint and ascending: their starts and stops."""
    file, start, stop = (np.concatenate(columns) for columns in zip(*reads, strict=True))
    result = {}
    for number in np.unique(file).tolist():
        order = np.argsort(start[file == number], kind="stable")
        starts = start[file == number][order]
        stops = np.maximum.accumulate(stop[file == number][order])
        apart = np.flatnonzero(starts[1:] > stops[:-1])
        result[number] = starts[np.append(0, apart + 1)], stops[np.append(apart, len(stops) - 1)]
    return result


def _gap(claim: Claim, starts: Ints, stops: Ints) -> tuple[int, int] | None:
    at = claim.known
    stretch = int(np.searchsorted(starts, at, side="right")) - 1
    if stretch >= 0:
        at = max(at, int(stops[stretch]))
    if at >= claim.stop:
        return None
    return at, min(claim.stop, int(starts[stretch + 1]) if stretch + 1 < len(starts) else claim.stop)


class Cuts:
    """Where reads are cut into parts: so that what several ranks read, and each otherwise, is cut alike by all."""

    def __init__(self, claims: Sequence[Claim], checked: Iterable[int], reads: Sequence[Spans]) -> None:
        """`checked` are the numbers of the claims that count, ascending."""
        self._claims = claims
        self._checked: dict[int, list[int]] = {}
        for number in checked:
            self._checked.setdefault(claims[number].file, []).append(number)
        self._cuts: dict[int, list[int]] = {}
        file, start, stop = (np.concatenate(columns) for columns in zip(*reads, strict=True))
        for each, numbers in self._checked.items():
            ends = [end for number in numbers for end in (claims[number].known, claims[number].stop)]
            here = file == each
            self._cuts[each] = np.unique(np.concatenate([start[here], stop[here], np.array(ends)])).tolist()

    def of(self, file: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The parts of a read: number of the claim, first byte and end, without what no claim that counts is about."""
        numbers, cuts = self._checked.get(file, []), self._cuts.get(file, [])
        inner = cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)]
        parts = []
        for begin, end in zip([start, *inner], [*inner, stop], strict=True):
            at = bisect_right(numbers, begin, key=lambda number: self._claims[number].start) - 1
            if at >= 0 and self._claims[numbers[at]].known <= begin < self._claims[numbers[at]].stop:
                parts.append((numbers[at], begin, end))
        return parts


def differing(ranks: Sequence[Sequence[Part]]) -> tuple[Part, int, int] | None:
    """A part that two ranks read otherwise, and the two."""
    first: dict[tuple[int, int], tuple[Part, int]] = {}
    for rank, parts in enumerate(ranks):
        for part in parts:
            known, other = first.setdefault((part.claim, part.start), (part, rank))
            if known != part:
                return part, other, rank
    return None


def found_values(claims: Sequence[Claim], checked: Iterable[int], parts: Iterable[Part]) -> dict[int, int]:
    """The CRC that was found of each of the claims numbered `checked`, of all whose bytes there are `parts`."""
    values = {number: claims[number].crc for number in checked}
    ends = {number: claims[number].known for number in values}
    for number, start, stop, crc in sorted(set(parts)):
        assert start == ends[number], "a part of a claim is missing"
        values[number] = joined(claims[number].algorithm, values[number], crc, stop - start)
        ends[number] = stop
    assert all(end == claims[number].stop for number, end in ends.items()), "a claim's last part is missing"
    return values
