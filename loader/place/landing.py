"""Where arriving boxes go: straight into the local shards, or, where an op needs several at once, together first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loader.convert.graph import Node, Pointwise
from loader.convert.pull import Fill, Join, Move, pull_back
from loader.plan.geometry import Box


class Landings:
    """All landings of one rank. `landed_bytes` grows as shards are written."""

    def __init__(self) -> None:
        self.landed_bytes = 0
        self._by_key: dict[int, list[_Landing]] = {}
        self._fills: list[tuple[Fill, _Part | None]] = []

    def add(self, node: Node, box: Box, shard: Tensor) -> list[tuple[int, Box]]:
        """Let `box` of `node` land in `shard`, a view of a local shard with the box's sizes.

        Returns the boxes of keys (by position in the catalog) that it takes.
        """
        return list(self._follow(node, box, shard, None))

    def fill(self) -> None:
        """Write what is known without reading: padding, a conversion's own constants."""
        for fill, part in self._fills:
            self._write(fill.view, part, fill.values)

    def land(self, key: int, box: Box, values: Tensor) -> None:
        """Write `values`, the elements of `box`, wherever they belong, cast to each shard's dtype on the way."""
        for landing in self._by_key[key]:
            common = box.intersect(landing.box)
            if common is not None:
                found = values[common.slices(box.offsets)]
                for run in landing.maps:
                    found = run(found)
                self._write(landing.view[common.slices(landing.box.offsets)], landing.part, found)

    def _follow(self, node: Node, box: Box, view: Tensor, part: _Part | None) -> list[tuple[int, Box]]:
        boxes: list[tuple[int, Box]] = []
        for found in pull_back(node, box, view):
            match found:
                case Move():
                    boxes.append((found.key, found.box))
                    self._by_key.setdefault(found.key, []).append(_Landing(found.box, found.view, found.maps, part))
                case Fill():
                    self._fills.append((found, part))
                case Join():
                    boxes += self._gather(found, part)
        return boxes

    def _gather(self, join: Join, out: _Part | None) -> list[tuple[int, Box]]:
        whole = _Whole(join.run, join.maps, join.view, out)
        boxes: list[tuple[int, Box]] = []
        for node in join.parts:
            part = _Part(torch.empty(join.box.sizes, dtype=node.dtype, device="meta"), join.box.numel, whole)
            whole.parts.append(part)
            boxes += self._follow(node, join.box, part.layout, part)
        return boxes

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
            made = whole.run(*(each.take() for each in whole.parts))
            for run in whole.maps:
                made = run(made)
            self._write(whole.view, whole.out, made)


class _Landing(NamedTuple):
    """Elements `box` of a key, through `maps`, go to `view`: of a shard, or of `part`'s layout."""

    box: Box
    view: Tensor
    maps: tuple[Pointwise, ...]
    part: _Part | None


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
    """An input of an op on several tensors. `layout` stands for it on meta; its memory comes with the first arrival."""

    layout: Tensor
    missing: int
    whole: _Whole
    memory: Tensor | None = None

    def at(self, view: Tensor) -> Tensor:
        """The memory that a view of `layout` stands for."""
        if self.memory is None:
            self.memory = torch.empty(self.layout.shape, dtype=self.layout.dtype)
        return self.memory.as_strided(view.shape, view.stride(), view.storage_offset())

    def take(self) -> Tensor:
        memory, self.memory = self.memory, None
        assert memory is not None
        return memory
