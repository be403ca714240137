"""What a traced conversion is: a graph of few kinds of node, from keys and constants to an output.

Every op that a conversion may use is said in these kinds (see `ops`). A node knows its shape, its dtype and its inputs,
and nothing of data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loader.plan.geometry import Box

Shape = tuple[int, ...]
Pointwise = Callable[[Tensor], Tensor]
"""A function that treats every element alike, wherever it stands."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Any node: a tensor of `shape` and `dtype`."""

    shape: Shape
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[Node, ...]:
        return ()


@dataclass(frozen=True, slots=True, eq=False)
class Key(Node):
    """A whole checkpoint tensor: `position` in the catalog."""

    position: int


@dataclass(frozen=True, slots=True, eq=False)
class Constant(Node):
    """A real tensor that the conversion brought along."""

    value: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Unary(Node):
    source: Node

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True, eq=False)
class Seen(_Unary):
    """The source as it is: a key, by its number among the catalog's, that is stored otherwise than it is seen."""

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Permute(_Unary):
    """Dim d of it is dim `dims[d]` of the source."""

    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Reshape(_Unary):
    """The source's elements in row-major order, in another shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice(_Unary):
    """Elements `start`, `start + 1`, … of dim `dim`."""

    dim: int
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class Take(_Unary):
    """Element i along `dim` is the source's element `index[i]`."""

    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Expand(_Unary):
    """Dims of size 1 repeated; the source has as many dims."""


@dataclass(frozen=True, slots=True, eq=False)
class Map(_Unary):
    """`run` of every element: a cast, arithmetic with a number, exp, …"""

    run: Pointwise


@dataclass(frozen=True, slots=True, eq=False)
class Cat(Node):
    """The parts one after another along `dim`."""

    parts: tuple[Node, ...]
    dim: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.parts


@dataclass(frozen=True, slots=True, eq=False)
class Combine(Node):
    """`run` of equally shaped tensors, element by element: it needs all of them at once."""

    parts: tuple[Node, ...]
    run: Callable[..., Tensor]

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.parts

    def over(self, box: Box) -> tuple[tuple[Box, ...], Callable[..., Tensor]]:
        """The box of each part that `box` of it takes, and what makes it of them."""
        return (box,) * len(self.parts), self.run


@dataclass(frozen=True, slots=True, eq=False)
class Dequantised(Combine):
    """A quantised weight: `run(box, *tensors)` makes `box` of it from those boxes of the parts that `boxes` gives."""

    boxes: Callable[[Box], tuple[Box, ...]]

    def over(self, box: Box) -> tuple[tuple[Box, ...], Callable[..., Tensor]]:
        return self.boxes(box), partial(self.run, box)


def form(node: Node) -> tuple[Hashable, tuple[int, ...]]:
    """What `node` is but for the keys that it is made of; and those keys (positions in the catalog).

    Outputs of equal forms are pulled back alike: box for box, to keys at equal places among theirs.
    """
    nodes, numbers = [node], {id(node): 0}
    keys: dict[int, int] = {}
    steps = []
    for current in nodes:  # which grows
        for each in current.inputs:
            if id(each) not in numbers:
                numbers[id(each)] = len(nodes)
                nodes.append(each)
        steps.append(
            (type(current).__name__, current.shape, _own(current, keys), *(numbers[id(i)] for i in current.inputs))
        )
    return tuple(steps), tuple(keys)


def _own(node: Node, keys: dict[int, int]) -> Hashable:
    """What a node does with places: all that it has but its inputs and what is done to values; a key by its number."""
    if isinstance(node, Key):
        return keys.setdefault(node.position, len(keys))
    values = {"shape", "dtype", "source", "parts", "run", "value", "number"}
    return tuple(getattr(node, field.name) for field in dataclasses.fields(node) if field.name not in values)


def dequantises(node: Node) -> bool:
    """Whether it is made of quantised weights."""
    return isinstance(node, Dequantised) or any(dequantises(each) for each in node.inputs)


def partners(nodes: Iterable[Node]) -> list[set[int]]:
    """Groups of keys (positions in the catalog) of which an op needs elements at once; no key is in two groups."""
    groups: dict[int, set[int]] = {}
    seen: set[int] = set()
    open_nodes = list(nodes)
    while open_nodes:
        node = open_nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        open_nodes += node.inputs
        if isinstance(node, Combine):
            group = set(keys_of(node))
            for key in list(group):
                group |= groups.get(key, set())
            groups.update(dict.fromkeys(group, group))
    return list({id(group): group for group in groups.values()}.values())


def keys_of(*nodes: Node) -> set[int]:
    """Positions of the stored keys that `nodes` are made of."""
    return {node.position for node in _within(nodes) if isinstance(node, Key)}


def seen_in(*nodes: Node) -> set[int]:
    """Numbers among the catalog's keys of those that `nodes` are made of, as they are seen: of two views of what is
    stored once, one may be used and the other not."""
    found = set()
    for node in _within(nodes, below=lambda node: not isinstance(node, Seen)):
        if isinstance(node, Key):
            found.add(node.position)
        elif isinstance(node, Seen):
            found.add(node.number)
    return found


def _within(nodes: Iterable[Node], below: Callable[[Node], bool] = lambda _: True) -> Iterator[Node]:
    """The nodes, and those that they are made of where `below` says so, each once."""
    seen: set[int] = set()
    open_nodes = list(nodes)
    while open_nodes:
        current = open_nodes.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            if below(current):
                open_nodes += current.inputs
