"""Pull-back through a reshape: the box of the output as boxes of the input, each with its strided view.

Both shapes are said in common factors, their *atoms*. Splitting a dim into atoms is always one strided view; merging
atoms into a dim is, where the view's strides allow it, and else falls into one part for each index of what cannot be
merged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from loader.errors import ConversionError
from loader.plan.geometry import Box, boxes_of_range

MOST_PARTS = 65_536
"""Parts that one box may fall into; each is a copy of its own, some microseconds."""

Shape = tuple[int, ...]
Atoms = list[Shape]
"""For each dim of a shape the factors it is split into, outermost first."""


def reshape_parts(source: Shape, shape: Shape, box: Box, view: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """Boxes of a tensor of shape `source` that make `box` of the same tensor in `shape`, and where each lands.

    [6, 4] as [3, 8], row 1: atoms (3, 2) and 4 against 3 and (2, 4), so rows 2-3 of the source.

    Raises ConversionError where the shapes have no common factors, or the box falls into too many parts.
    """
    if not box.numel:
        return
    inner, outer = common_atoms(source, shape)
    count = 0
    for atom_box, atom_view in _split(outer, box, view):
        for part in _merge(inner, atom_box, atom_view):
            count += 1
            if count > MOST_PARTS:
                raise ConversionError(
                    f"a reshape of {list(source)} to {list(shape)} scatters a slice of {list(box.sizes)} over more "
                    f"than {MOST_PARTS} places: shard another dim, or convert so that a slice stays together"
                )
            yield part


def common_atoms(source: Shape, shape: Shape) -> tuple[Atoms, Atoms]:
    """Each shape's dims as factors, the same sequence in both. [6, 4], [3, 8] -> [(3, 2), (4,)], [(3,), (2, 4)].

    Raises ConversionError for shapes such as [2, 3] and [3, 2], which have none.
    """
    ends = sorted({*_ends(source), *_ends(shape)}, reverse=True)  # elements from the end, largest first
    for large, small in itertools.pairwise(ends):
        if large % small:
            raise ConversionError(
                f"a reshape of {list(source)} to {list(shape)} cuts across the dims of both: "
                "flatten or unflatten whole dims instead"
            )
    return _atoms(source, ends), _atoms(shape, ends)


def _ends(shape: Shape) -> Iterator[int]:
    """Suffix products: [6, 4] -> 24, 4, 1."""
    return itertools.accumulate(reversed(shape), lambda a, b: a * b, initial=1)


def _atoms(shape: Shape, ends: Sequence[int]) -> Atoms:
    result, suffixes = [], list(_ends(shape))[::-1]
    for large, small in itertools.pairwise(suffixes):
        cuts = [end for end in ends if small <= end <= large]
        result.append(tuple(a // b for a, b in itertools.pairwise(cuts)))
    return result


def _split(atoms: Atoms, box: Box, view: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The box in atoms: at most 2k - 1 boxes for a dim of k atoms."""
    pieces = [
        [(part, part.numel) for part in boxes_of_range(factors, start, start + size)]
        for factors, start, size in zip(atoms, box.offsets, box.sizes, strict=True)
    ]
    for chosen in itertools.product(*(range(len(dim)) for dim in pieces)):
        at = view
        offsets: Shape = ()
        sizes: Shape = ()
        for dim, number in enumerate(chosen):
            part, length = pieces[dim][number]
            begin = sum(n for _, n in pieces[dim][:number])
            where = len(sizes)
            at = at.narrow(where, begin, length)
            at = at.view((*at.shape[:where], *part.sizes, *at.shape[where + 1 :]))
            offsets, sizes = offsets + part.offsets, sizes + part.sizes
        yield Box(offsets, sizes), at


def _merge(atoms: Atoms, box: Box, view: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """A box of atoms as boxes of the dims that they make up."""
    plans = []
    first = 0
    for factors in atoms:
        stop = first + len(factors)
        plans.append((first, _mergeable_from(factors, box, view, first), stop))
        first = stop
    loose = [d for first, begin, _ in plans for d in range(first, begin)]
    for index in itertools.product(*(range(box.sizes[d]) for d in loose)):
        at = dict(zip(loose, index, strict=True))
        yield _merged(atoms, plans, box, view, at)


def _mergeable_from(factors: Shape, box: Box, view: Tensor, first: int) -> int:
    """The outermost atom from which on a dim's atoms are one run of elements, in the source and in the view."""
    stop = first + len(factors)
    begin = max(first, stop - 1)
    while begin > first:
        inner = begin  # is everything from `inner` on whole, and does the view step over it evenly?
        whole = all(box.sizes[d] == factors[d - first] for d in range(inner, stop))
        span = math.prod(box.sizes[inner:stop])
        even = box.sizes[begin - 1] == 1 or _innermost_stride(box, view, inner, stop) * span == view.stride(begin - 1)
        if not (whole and even):
            break
        begin -= 1
    return begin


def _innermost_stride(box: Box, view: Tensor, first: int, stop: int) -> int:
    """The stride of the run that dims `first` to `stop` make; what is of size 1 has none of its own."""
    return next((view.stride(d) for d in range(stop - 1, first - 1, -1) if box.sizes[d] > 1), 1)


def _merged(
    atoms: Atoms, plans: Sequence[tuple[int, int, int]], box: Box, view: Tensor, at: dict[int, int]
) -> tuple[Box, Tensor]:
    offsets, sizes, strides = [], [], []
    origin = view.storage_offset() + sum(i * view.stride(d) for d, i in at.items())
    for factors, (first, begin, stop) in zip(atoms, plans, strict=True):
        flat = 0
        for d in range(first, stop):
            flat = flat * factors[d - first] + box.offsets[d] + at.get(d, 0)
        offsets.append(flat)
        sizes.append(math.prod(box.sizes[begin:stop]))
        strides.append(_innermost_stride(box, view, begin, stop))
    return Box(tuple(offsets), tuple(sizes)), view.as_strided(sizes, strides, origin)
