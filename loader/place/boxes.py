"""Which boxes of a tensor a rank holds under a DTensor's placements, and where each stands in the local shard.

torch's own `compute_local_shape_and_global_offset` gives the first offset alone; under `_StridedShard` a shard is
several boxes. Every tensor dim is therefore a list of intervals, `(start, length)` in global indices, in local order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from loader.errors import BuilderError
from loader.plan.geometry import Box

Intervals = list[tuple[int, int]]


def shard_boxes(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> list[tuple[Box, tuple[int, ...]]]:
    """The boxes that the rank at `coordinate` holds of a tensor of `shape`, each with its offsets in the local shard.

    Shape (8,), two ranks, `_StridedShard(0, split_factor=2)`: rank 0 holds rows 0-1 at 0 and rows 4-5 at 2. An empty
    shard has no boxes; a 0-d tensor has one. Raises BuilderError where a placement is neither Shard nor Replicate.
    """
    dims = shard_intervals(shape, mesh_shape, coordinate, placements)
    boxes = []
    for parts in itertools.product(*map(_with_local_starts, dims)):
        offsets, sizes, local_offsets = zip(*parts, strict=True) if parts else ((), (), ())
        boxes.append((Box(offsets, sizes), local_offsets))
    return boxes


def shard_shape(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[int, ...]:
    """The local shard's shape."""
    return tuple(sum(n for _, n in dim) for dim in shard_intervals(shape, mesh_shape, coordinate, placements))


def shard_intervals(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> list[Intervals]:
    """Per tensor dim, the intervals held. As in torch, each mesh dim splits what those to its left leave."""
    dims: list[Intervals] = [[(0, n)] if n else [] for n in shape]
    for ranks, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise BuilderError(f"placement {placement!r} cannot be loaded: redistribute to Shard or Replicate first")
        factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        dims[placement.dim] = _split(dims[placement.dim], ranks, rank, factor)
    return dims


def _split(held: Intervals, ranks: int, rank: int, factor: int) -> Intervals:
    """What `rank` gets when `held` is cut in `factor` pieces and each of them is shared by `ranks`.

    torch.chunk both times: pieces of ceil(n / count), so the last ones may be short or empty.
    """
    total = sum(n for _, n in held)
    result: Intervals = []
    for piece in range(factor):
        begin, end = _chunk(total, factor, piece)
        first, stop = _chunk(end - begin, ranks, rank)
        for start, length in _take(held, begin + first, begin + stop):
            if result and sum(result[-1]) == start:
                result[-1] = (result[-1][0], result[-1][1] + length)
            else:
                result.append((start, length))
    return result


def _chunk(size: int, count: int, index: int) -> tuple[int, int]:
    step = -(-size // count)
    return min(size, step * index), min(size, step * (index + 1))


def _take(intervals: Intervals, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Elements `[first, stop)`, counted along the intervals."""
    for start, length in intervals:
        if first >= stop:
            return
        if first < length:
            end = min(length, stop)
            yield start + first, end - first
        first, stop = max(0, first - length), stop - length


def _with_local_starts(intervals: Intervals) -> Iterator[tuple[int, int, int]]:
    """(global start, length, local start) of each interval."""
    local = 0
    for start, length in intervals:
        yield start, length, local
        local += length
