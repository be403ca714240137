"""Where arriving boxes go: straight into the local shards, or, where an op needs several at once, together first."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loader.convert.graph import Node, Pointwise
from loader.convert.pull import Fill, Join, Move, pull_back
from loader.ground.recording import Recorder
from loader.plan.geometry import Box, portions


class Landings:
    """All landings of one rank. `landed_bytes` grows as shards are written.

    What needs several tensors at once is made in portions of `portion` elements. `recorder` gets a span, convert, for
    whatever is computed.
    """

    def __init__(self, portion: int, recorder: Recorder | None = None) -> None:
        self.landed_bytes = 0
        self._recorder = recorder or Recorder()
        self._portion = portion
        self._by_key: dict[int, _OfKey] = {}
        self._fills: list[tuple[Fill, _Part | None]] = []

    def add(self, node: Node, box: Box, shard: Tensor) -> list[tuple[int, Box]]:
        """Let `box` of `node` land in `shard`, a view of a local shard with the box's sizes.

        Returns the boxes of keys (by position in the catalog) that it takes.
        """
        return list(self._follow(node, box, shard, None))

    def fill(self) -> None:
        """Write what is known without reading: padding, a conversion's own constants. From now on boxes may land."""
        for fill, part in self._fills:
            self._write(fill.view, part, fill.values)
        for landings in self._by_key.values():
            landings.order()

    def land(self, key: int, box: Box, values: Tensor) -> None:
        """Write `values`, the elements of `box`, wherever they belong, cast to each shard's dtype on the way."""
        for landing in self._by_key[key].near(box):
            common = box.intersect(landing.box)
            if common is not None:
                found = self._mapped(landing.maps, values[common.slices(box.offsets)])
                self._write(landing.view[common.slices(landing.box.offsets)], landing.part, found)

    def straight(self, key: int, box: Box, dtype: torch.dtype) -> Tensor | None:
        """The memory of a shard, of so many bytes (uint8), where the elements of `box` belong as they are, of this
        `dtype` and in row-major order; None where they are changed, cast, scattered, or go to several places."""
        match [each for each in self._by_key[key].near(box) if each.box.intersect(box) is not None]:
            case [_Landing(box=whole, view=shard, maps=(), part=None)] if whole.intersect(box) == box:
                return _bytes_of(shard[box.slices(whole.offsets)], dtype)
        return None

    def arrived(self, size: int) -> None:
        """So many bytes (of one rank's shards) were written where `straight` said."""
        self.landed_bytes += size

    def _follow(self, node: Node, box: Box, view: Tensor, part: _Part | None) -> list[tuple[int, Box]]:
        boxes: list[tuple[int, Box]] = []
        for found in pull_back(node, box, view):
            match found:
                case Move():
                    boxes.append((found.key, found.box))
                    landing = _Landing(found.box, found.view, found.maps, part)
                    self._by_key.setdefault(found.key, _OfKey()).landings.append(landing)
                case Fill():
                    self._fills.append((found, part))
                case Join():
                    boxes += self._gather(found, part)
        return boxes

    def _gather(self, join: Join, out: _Part | None) -> list[tuple[int, Box]]:
        """A portion at a time, by rows of what is made: they arrive one after another. The needs are the whole's."""
        for box in portions(join.box, self._portion):
            parts, run = join.node.over(box)
            whole = _Whole(run, join.maps, join.view[box.slices(join.box.offsets)], out)
            for node, region in zip(join.node.inputs, parts, strict=True):
                layout = torch.empty(region.sizes, dtype=node.dtype, device="meta")
                part = _Part(layout, region.numel, whole, join.view.device if out is None else out.device)
                whole.parts.append(part)
                self._follow(node, region, part.layout, part)
        return list(_needs(join))

    def _write(self, view: Tensor, part: _Part | None, values: Tensor) -> None:
        if part is None:
            with torch.no_grad():
                view.copy_(values)
            self.landed_bytes += view.numel() * view.element_size()
            return
        part.at(view).copy_(values)
        part.missing -= view.numel()
        whole = part.whole
        if all(not each.missing for each in whole.parts):
            with self._recorder.span("convert"):
                made = whole.run(*(each.take() for each in whole.parts))
            self._write(whole.view, whole.out, self._mapped(whole.maps, made))

    def _mapped(self, maps: tuple[Pointwise, ...], values: Tensor) -> Tensor:
        if maps:
            with self._recorder.span("convert"):
                for run in maps:
                    values = run(values)
        return values


def _needs(join: Join) -> Iterator[tuple[int, Box]]:
    """The boxes of keys that it takes."""
    for node, region in zip(join.node.inputs, join.node.over(join.box)[0], strict=True):
        for found in pull_back(node, region, torch.empty(region.sizes, dtype=node.dtype, device="meta")):
            if isinstance(found, Move):
                yield found.key, found.box
            elif isinstance(found, Join):
                yield from _needs(found)


class _Landing(NamedTuple):
    """Elements `box` of a key, through `maps`, go to `view`: of a shard, or of `part`'s layout."""

    box: Box
    view: Tensor
    maps: tuple[Pointwise, ...]
    part: _Part | None


def _bytes_of(view: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The memory that the view is; None where it is not one run of host memory, of this dtype. What a subclass of
    Tensor keeps there is its own affair, and a conjugate or negative view means something else than it keeps."""
    plain = type(view) is Tensor and not view.is_conj() and not view.is_neg()
    if not (plain and view.dtype == dtype and view.device.type == "cpu" and view.is_contiguous()):
        return None
    memory, at = view.untyped_storage(), view.storage_offset() * view.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(memory, at, (view.numel() * view.element_size(),), (1,))


@dataclass(slots=True)
class _OfKey:
    """A key's landings, in the order of their rows, for there may be thousands."""

    landings: list[_Landing] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    reach: list[int] = field(default_factory=list)
    """By position, the row at which this one and all before it end."""

    def order(self) -> None:
        self.landings.sort(key=lambda landing: _rows(landing.box)[0])
        rows = [_rows(landing.box) for landing in self.landings]
        self.starts = [first for first, _ in rows]
        self.reach = list(itertools.accumulate((stop for _, stop in rows), max))

    def near(self, box: Box) -> list[_Landing]:
        """Those that may have elements of `box`: a few more than do."""
        assert self.starts, "nothing may land before `fill`"
        first, stop = _rows(box)
        return self.landings[bisect_right(self.reach, first) : bisect_left(self.starts, stop)]


def _rows(box: Box) -> tuple[int, int]:
    return (box.offsets[0], box.offsets[0] + box.sizes[0]) if box.sizes else (0, 1)


@dataclass(slots=True)
class _Whole:
    """Parts that are combined once all of them are there."""

    run: Callable[..., Tensor]
    maps: tuple[Pointwise, ...]
    view: Tensor
    out: _Part | None
    parts: list[_Part] = field(default_factory=list)


@dataclass(slots=True)
class _Part:
    """An input of an op on several tensors. `layout` stands for it on meta; its memory comes with the first arrival, on
    the `device` of the shard that it is for."""

    layout: Tensor
    missing: int
    whole: _Whole
    device: torch.device
    memory: Tensor | None = None

    def at(self, view: Tensor) -> Tensor:
        """The memory that a view of `layout` stands for."""
        if self.memory is None:
            self.memory = torch.empty(self.layout.shape, dtype=self.layout.dtype, device=self.device)
        return self.memory.as_strided(view.shape, view.stride(), view.storage_offset())

    def take(self) -> Tensor:
        memory, self.memory = self.memory, None
        assert memory is not None
        return memory
