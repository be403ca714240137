"""Boxes: n-d half-open regions of a tensor, and what can be said of them without touching data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """The region `offsets[d] <= i < offsets[d] + sizes[d]` of an n-d tensor. A 0-d tensor's box is `Box((), ())`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Index a tensor whose element 0 stands at `origin` (default: the whole tensor's origin)."""
        base = origin if origin is not None else (0,) * len(self.offsets)
        return tuple(slice(o - b, o - b + s) for o, s, b in zip(self.offsets, self.sizes, base, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common region, or None when it is empty."""
        offsets, sizes = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            first, stop = max(a, b), min(a + n, b + m)
            if first >= stop:
                return None
            offsets.append(first)
            sizes.append(stop - first)
        return Box(tuple(offsets), tuple(sizes))

    def subtract(self, other: Box) -> list[Box]:
        """Disjoint boxes that cover what of self is outside `other`: at most two a dim."""
        common = self.intersect(other)
        if common is None:
            return [self]
        rest = []
        offsets, sizes = list(self.offsets), list(self.sizes)
        for d, (lo, stop) in enumerate(zip(common.offsets, common.stops, strict=True)):
            end = offsets[d] + sizes[d]
            if offsets[d] < lo:
                rest.append(Box(tuple(offsets), (*sizes[:d], lo - offsets[d], *sizes[d + 1 :])))
            if stop < end:
                rest.append(Box((*offsets[:d], stop, *offsets[d + 1 :]), (*sizes[:d], end - stop, *sizes[d + 1 :])))
            offsets[d], sizes[d] = lo, stop - lo
        return rest


def whole(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def disjoint(boxes: Sequence[Box]) -> list[Box]:
    """Boxes that cover the same elements, each once."""
    result: list[Box] = []
    for box in boxes:
        fresh = [box] if box.numel else []
        for seen in result:
            fresh = [part for piece in fresh for part in piece.subtract(seen)]
        result += fresh
    return result


def portions(box: Box, most: int) -> Iterator[Box]:
    """The box in runs of rows of at most `most` elements, and pieces of rows where one has more, in order.

    Sizes (2, 3, 4), 8 at most: rows 0-1 and row 2 of the first matrix, then of the second.
    """
    if box.numel <= most:
        yield box
        return
    dim = next(d for d, size in enumerate(box.sizes) if size > 1)
    step = max(1, most // (box.numel // box.sizes[dim]))
    offsets, sizes = list(box.offsets), list(box.sizes)
    for first in range(0, box.sizes[dim], step):
        offsets[dim], sizes[dim] = box.offsets[dim] + first, min(step, box.sizes[dim] - first)
        yield from portions(Box(tuple(offsets), tuple(sizes)), most)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements: (2, 3, 4) -> (12, 4, 1)."""
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor with these strides lies row by row; a dim of size 1 has any stride, an empty tensor any."""
    expected = contiguous_strides(shape)
    return 0 in shape or all(n == 1 or s == e for n, s, e in zip(shape, strides, expected, strict=True))


def flat_span(shape: Sequence[int], box: Box) -> tuple[int, int]:
    """First flat index of `box` in a tensor of `shape`, and one past its last.

    Shape (4, 6), box rows 1-2, columns 2-3: first = 1*6 + 2 = 8, last = 2*6 + 3 = 15, so (8, 16).
    """
    strides = contiguous_strides(shape)
    first = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    last = sum((stop - 1) * s for stop, s in zip(box.stops, strides, strict=True))
    return first, last + 1


def is_contiguous(shape: Sequence[int], box: Box) -> bool:
    """Whether the box's elements follow each other in a row-major tensor of `shape`."""
    first, stop = flat_span(shape, box)
    return stop - first == box.numel


def steps(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the dims along which a strided tensor moves, by falling stride: [3, 1, 4], [1, 9, 3] ->
    [(4, 3), (3, 1)]."""
    return sorted(((n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and s), key=lambda dim: -dim[1])


def strided_box(shape: Sequence[int], offset: int, dims: Sequence[tuple[int, int]]) -> Box | None:
    """The box of a row-major tensor of `shape` whose elements, in order, are those from flat index `offset` on along
    `dims`, (size, stride) by falling stride; None where they make no box.

    Shape (100, 20), offset 10, dims [(100, 20), (5, 1)]: all rows, columns 10-14.
    """
    offsets, sizes, left = [], [], offset
    open_dims = list(dims)
    for size, stride in zip(shape, contiguous_strides(shape), strict=True):
        at, left = divmod(left, stride) if size else (0, left)
        taken = open_dims.pop(0)[0] if open_dims and open_dims[0][1] == stride and size > 1 else 1
        if at + taken > size:
            return None
        offsets.append(at)
        sizes.append(taken)
    return None if open_dims or left else Box(tuple(offsets), tuple(sizes))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The flat range `[start, stop)` of a row-major tensor, as contiguous boxes in order: at most `2 * ndim - 1`.

    Shape (4, 6), [8, 20): row 1 columns 2-5, row 2 whole, row 3 columns 0-1.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        yield from _in_row(first, shape, head, tail)
        return
    if head:
        yield from _in_row(first, shape, head, inner)
        first += 1
    if first < last:
        rest = tuple(shape[1:])
        yield Box((first,) + (0,) * len(rest), (last - first, *rest))
    if tail:
        yield from _in_row(last, shape, 0, tail)


def _in_row(row: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))
