"""Pull-back: from a box of an output to the boxes of keys that fill it, and where each lands.

Nothing is computed. A *view* is a strided tensor that stands for where a box's elements go; it is followed through the
graph from the output to the keys, so that whatever only moves data is one strided copy on arrival.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from loader.convert.graph import (
    Cat,
    Combine,
    Constant,
    Expand,
    Key,
    Map,
    Node,
    Permute,
    Pointwise,
    Reshape,
    Seen,
    Slice,
    Take,
)
from loader.convert.reshape import reshape_parts
from loader.plan.geometry import Box


class Move(NamedTuple):
    """Elements `box` of key `key`, each through `maps` in order, land in `view`, which has the box's sizes."""

    key: int
    box: Box
    view: Tensor
    maps: tuple[Pointwise, ...]


class Fill(NamedTuple):
    """Known `values` land in `view` before anything is read."""

    values: Tensor
    view: Tensor


class Join(NamedTuple):
    """`box` of `node`, which needs several tensors at once, lands in `view` through `maps`."""

    node: Combine
    box: Box
    view: Tensor
    maps: tuple[Pointwise, ...]


class _Step(NamedTuple):
    node: Node
    box: Box
    view: Tensor
    maps: tuple[Pointwise, ...]


def pull_back(node: Node, box: Box, view: Tensor) -> Iterator[Move | Fill | Join]:
    """What fills `box` of `node`, each element once. `view` has the box's sizes, and any strides and device.

    Raises ConversionError where a reshape scatters the box into too many parts.
    """
    steps = [_Step(node, box, view, ())]
    while steps:
        step = steps.pop()
        match step.node:
            case Key(position=position):
                yield Move(position, step.box, step.view, step.maps)
            case Constant(value=value):
                values = value[step.box.slices()]
                for run in step.maps:
                    values = run(values)
                yield Fill(values, step.view)
            case Combine() as node:
                yield Join(node, step.box, step.view, step.maps)
            case Map(source=source, run=run):
                steps.append(step._replace(node=source, maps=(run, *step.maps)))
            case _:
                steps += [_Step(*part, step.maps) for part in _parts(step.node, step.box, step.view)]


Part = tuple[Node, Box, Tensor]


def _parts(node: Node, box: Box, view: Tensor) -> Iterator[Part]:
    """The same elements, said of the node's inputs."""
    match node:
        case Permute(source=source, dims=dims):
            back = sorted(range(len(dims)), key=dims.__getitem__)
            moved = Box(tuple(box.offsets[d] for d in back), tuple(box.sizes[d] for d in back))
            yield source, moved, view.permute(back)
        case Slice(source=source, dim=dim, start=start):
            yield source, _shifted(box, dim, start), view
        case Take(source=source, dim=dim, index=index):
            yield from _taken(source, dim, index, box, view)
        case Seen(source=source):
            yield source, box, view
        case Expand(source=source):
            yield from _expanded(source, box, view)
        case Cat(parts=parts, dim=dim):
            yield from _cat(parts, dim, box, view)
        case Reshape(source=source, shape=shape):
            for part, at in reshape_parts(source.shape, shape, box, view):
                yield source, part, at
        case _:
            raise AssertionError(node)


def _shifted(box: Box, dim: int, by: int, size: int | None = None) -> Box:
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[dim] += by
    sizes[dim] = sizes[dim] if size is None else size
    return Box(tuple(offsets), tuple(sizes))


def _taken(source: Node, dim: int, index: Sequence[int], box: Box, view: Tensor) -> Iterator[Part]:
    """Runs of neighbours: index (4, 5, 6, 1) is rows 4-6, then row 1."""
    chosen = index[box.offsets[dim] : box.offsets[dim] + box.sizes[dim]]
    at = 0
    for _, run in itertools.groupby(enumerate(chosen), key=lambda pair: pair[1] - pair[0]):
        rows = [row for _, row in run]
        yield source, _shifted(box, dim, rows[0] - box.offsets[dim], len(rows)), view.narrow(dim, at, len(rows))
        at += len(rows)


def _expanded(source: Node, box: Box, view: Tensor) -> Iterator[Part]:
    """One part for each copy."""
    repeated = [d for d, size in enumerate(source.shape) if size == 1 and box.sizes[d] > 0]
    offsets = tuple(0 if d in repeated else o for d, o in enumerate(box.offsets))
    sizes = tuple(1 if d in repeated else s for d, s in enumerate(box.sizes))
    for copy in itertools.product(*(range(box.sizes[d]) for d in repeated)):
        at = view
        for d, i in zip(repeated, copy, strict=True):
            at = at.narrow(d, i, 1)
        yield source, Box(offsets, sizes), at


def _cat(parts: Sequence[Node], dim: int, box: Box, view: Tensor) -> Iterator[Part]:
    begin = 0
    first, stop = box.offsets[dim], box.offsets[dim] + box.sizes[dim]
    for part in parts:
        end = begin + part.shape[dim]
        low, high = max(first, begin), min(stop, end)
        if low < high:
            inside = _shifted(box, dim, low - first - begin, high - low)
            yield part, inside, view.narrow(dim, low - first, high - low)
        begin = end
