"""Cutting a key where needs begin and end: row blocks, and who consumes each.

A row block is a contiguous run of rows on the first dim larger than 1, and deeper where a row is itself huge or holds
a wide stretch that nobody needs. All positions here are flat element indices of one key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from loader.plan.geometry import Box, disjoint

LARGEST = 1.6
"""Ranges that one read may hold: a part of up to 1.6 ranges is not cut, so that no cut leaves less than 0.8 ranges on
average, and GETs stay within 1 / 0.8 = 1.25 x the bytes over the range size."""


class Share(NamedTuple):
    """What one class consumes of a block or an extent.

    `elements` needed lie within `[first, stop)`; `ragged` when they do not follow each other there (columns), so that a
    reader must pack them before it can send them. Shares of one block are the same elements when they are equal:
    `content` tells boxes apart that span the same range.
    """

    elements: int
    first: int
    stop: int
    ragged: bool
    content: int

    @property
    def packed(self) -> int:
        """Elements the reader must stage to send this share: none where it is one contiguous piece."""
        return self.elements if self.ragged or self.stop - self.first != self.elements else 0

    def shifted(self, by: int) -> Share:
        return self._replace(first=self.first + by, stop=self.stop + by)

    def joined(self, other: Share) -> Share:
        return Share(
            self.elements + other.elements,
            min(self.first, other.first),
            max(self.stop, other.stop),
            self.ragged or other.ragged,
            hash((self.content, other.content, other.first - self.first, other.stop - self.first)),
        )


class Block(NamedTuple):
    """The flat range `[start, stop)`, each consuming class's share of it, and how much of it anybody needs."""

    start: int
    stop: int
    shares: Mapping[int, Share]
    needed: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Elements that its reader holds at most: what it reads, and what it packs, once for all who need the same."""
        return self.size + sum(share.packed for share in set(self.shares.values()))

    def shifted(self, by: int) -> Block:
        return Block(self.start + by, self.stop + by, {c: s.shifted(by) for c, s in self.shares.items()}, self.needed)

    def joined(self, other: Block) -> Block:
        """This block and the one that follows it, as one."""
        shares = dict(self.shares)
        for number, share in other.shares.items():
            shares[number] = shares[number].joined(share) if number in shares else share
        return Block(self.start, other.stop, shares, self.needed + other.needed)


def cut(shape: Sequence[int], needs: Sequence[tuple[int, Box]], *, row_limit: int, gap_limit: int) -> list[Block]:
    """Cut a row-major key of `shape` into blocks, in order.

    `needs` are (class, box) pairs; `row_limit` and `gap_limit` are in elements: a row longer than the first is cut
    within, and so is a row of which at least the second is needed by nobody. What no box touches is in no block.

    Shape (8, 4), class 0 needs rows 0-3, class 1 rows 2-7: blocks [0, 8) for 0, [8, 16) for 0 and 1, [16, 32) for 1.
    """
    dim = next((d for d, size in enumerate(shape) if size > 1), len(shape) - 1)
    if dim < 0:
        return [Block(0, 1, {number: Share(1, 0, 1, ragged=False, content=0) for number, _ in needs}, 1)]
    inner_shape = tuple(shape[dim + 1 :])
    inner = math.prod(inner_shape)
    blocks: list[Block] = []
    for first, stop, active in _segments(dim, needs):
        parts = {Box(box.offsets[dim + 1 :], box.sizes[dim + 1 :]) for _, box in active}
        missing = inner - sum(box.numel for box in disjoint(sorted(parts)))
        if inner_shape and (inner > row_limit or missing >= gap_limit):
            inner_needs = [(c, Box(box.offsets[dim + 1 :], box.sizes[dim + 1 :])) for c, box in active]
            row = cut(inner_shape, inner_needs, row_limit=row_limit, gap_limit=gap_limit)
            row = join(row, small=row_limit * 4 // 5, limit=int(LARGEST * row_limit))  # else GETs: parts times rows
            blocks += [block.shifted(r * inner) for r in range(first, stop) for block in row]
        else:
            blocks += _split(first, stop, inner, inner - missing, active, dim, row_limit)
    return blocks


def _segments(dim: int, needs: Sequence[tuple[int, Box]]) -> Iterator[tuple[int, int, list[tuple[int, Box]]]]:
    """Rows `[first, stop)` of `dim` between neighbouring cuts, with the needs that cover them all."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for i, (_, box) in enumerate(needs):
        begins.setdefault(box.offsets[dim], []).append(i)
        ends.setdefault(box.offsets[dim] + box.sizes[dim], []).append(i)
    cuts = sorted(begins.keys() | ends.keys())
    active: dict[int, None] = {}
    for first, stop in itertools.pairwise(cuts):
        for i in ends.get(first, ()):
            del active[i]
        active.update(dict.fromkeys(begins.get(first, ())))
        if active:
            yield first, stop, [needs[i] for i in active]


def _split(
    first: int, stop: int, inner: int, needed: int, active: Sequence[tuple[int, Box]], dim: int, limit: int
) -> Iterator[Block]:
    """Rows `[first, stop)`, of `inner` elements each (`needed` of them needed), in pieces of about `limit` elements.

    Fewer, larger pieces win below 4 limits: 1.5 limits are one piece, 1.7 are two of 0.85. Rows of 0.9 limits stand
    alone.
    """
    size = (stop - first) * inner
    pieces = math.ceil(size / limit) if size >= 4 * limit else int(1.25 * size / limit)
    rows = max(1, int(LARGEST * limit) // inner)
    pieces = min(max(pieces, math.ceil((stop - first) / rows)), stop - first)
    for i in range(pieces):
        a = first + (stop - first) * i // pieces
        b = first + (stop - first) * (i + 1) // pieces
        shares: dict[int, Share] = {}
        for number, box in active:
            width = math.prod(box.sizes[dim + 1 :])
            content = hash((box.offsets[dim + 1 :], box.sizes[dim + 1 :]))
            share = Share((b - a) * width, a * inner, b * inner, width != inner, content)
            shares[number] = shares[number].joined(share) if number in shares else share
        yield Block(a * inner, b * inner, shares, (b - a) * needed)


def join(blocks: Sequence[Block], *, small: int, limit: int) -> list[Block]:
    """Join neighbours that `may_join` allows. All sizes in elements."""
    result: list[Block] = []
    for block in blocks:
        if result and result[-1].stop == block.start and may_join(result[-1], block, small=small, limit=limit):
            result[-1] = result[-1].joined(block)
        else:
            result.append(block)
    return result


def may_join(left: Block, right: Block, *, small: int, limit: int) -> bool:
    """Whether neighbours should be one read: the same consumers, or small ones, up to `limit` together.

    A small read costs a request's latency whatever its size; a large one whose consumer reads it itself costs no
    exchange, so it stays alone.
    """
    if left.size + right.size > limit:
        return False
    left_yields = left.size < small or len(left.shares) > 1
    return (left_yields and right.size < small) or left.shares.keys() == right.shares.keys()
