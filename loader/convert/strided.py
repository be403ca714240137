"""A strided view of what is stored as a graph over it: a tensor that was transposed, sliced or shared when saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from loader.convert.graph import Cat, Expand, Node, Permute, Reshape, Shape, Slice
from loader.errors import ConversionError
from loader.plan.geometry import Box, contiguous_strides, steps, strided_box

MOST_PIECES = 4096
"""Runs of elements that a view may fall into where it is no box of what is stored."""


def strided(source: Node, shape: Shape, offset: int, strides: Sequence[int]) -> Node:
    """The tensor of `shape` whose element (i, j, ...) is element `offset + i * strides[0] + ...` of the row-major
    `source`. It lies within it.

    Raises ConversionError for a view of more than MOST_PIECES pieces.
    """
    dims = steps(shape, strides)
    node = _along(source, offset, dims)
    moving = [d for d, (n, s) in enumerate(zip(shape, strides, strict=True)) if n > 1 and s]
    order = sorted(moving, key=lambda d: -strides[d])  # stable, as `steps` is
    if order != moving:
        turned = tuple(order.index(d) for d in moving)
        node = Permute(tuple(node.shape[d] for d in turned), node.dtype, node, turned)
    still = tuple(n if d in moving else 1 for d, n in enumerate(shape))
    node = _reshaped(node, still)
    return node if still == shape else Expand(shape, node.dtype, node)


def _along(source: Node, offset: int, dims: Sequence[tuple[int, int]]) -> Node:
    """The elements along `dims`, (size, stride) by falling stride, one dim for each."""
    sizes = tuple(size for size, _ in dims)
    for shape in (source.shape, _finer(source.shape, dims)):
        box = strided_box(shape, offset, dims) if shape is not None else None
        if shape is not None and box is not None:
            return _reshaped(_boxed(_reshaped(source, shape), box), sizes)
    if math.prod(sizes) // (sizes[-1] if dims[-1][1] == 1 else 1) > MOST_PIECES:
        raise ConversionError(
            f"a tensor of steps {list(dims)} over a storage of {list(source.shape)} falls into more than {MOST_PIECES} "
            "pieces: save it again as tensor.contiguous()"
        )
    (size, stride), *inner = dims
    rows = [_reshaped(_along(source, offset + i * stride, inner), (1, *sizes[1:])) for i in range(size)]
    return Cat(sizes, source.dtype, tuple(rows), 0)


def _finer(shape: Shape, dims: Sequence[tuple[int, int]]) -> Shape | None:
    """`shape` with its dims split so that every stride is that of a dim; None where it is not possible.

    (100, 20) for columns 0, 2, 4, ...: (100, 10, 2).
    """
    edges = {math.prod(shape), 1, *contiguous_strides(shape), *(stride for _, stride in dims)}
    pairs = list(itertools.pairwise(sorted(edges, reverse=True)))
    if any(large % small for large, small in pairs):
        return None
    return tuple(large // small for large, small in pairs)


def _boxed(node: Node, box: Box) -> Node:
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        if size < node.shape[dim]:
            node = Slice((*node.shape[:dim], size, *node.shape[dim + 1 :]), node.dtype, node, dim, start)
    return node


def _reshaped(node: Node, shape: Shape) -> Node:
    return node if node.shape == shape else Reshape(shape, node.dtype, node)
