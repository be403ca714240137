"""Where arriving boxes go: straight into the local shards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loader.plan.geometry import Box


class Landing(NamedTuple):
    """`view` is the part of a local shard that takes `box` of a key; they have the same sizes."""

    box: Box
    view: Tensor


class Landings:
    """All landings of one rank, by key (its position in the catalog). `landed_bytes` grows as boxes arrive."""

    def __init__(self) -> None:
        self._by_key: dict[int, list[Landing]] = {}
        self.landed_bytes = 0

    def add(self, key: int, box: Box, view: Tensor) -> None:
        """`view` shares its storage with the shard; writing to it fills the shard."""
        assert tuple(view.shape) == box.sizes, (view.shape, box)
        self._by_key.setdefault(key, []).append(Landing(box, view))

    def land(self, key: int, box: Box, values: Tensor) -> None:
        """Copy `values`, the elements of `box`, wherever they belong, cast to each shard's dtype on the way."""
        with torch.no_grad():
            for landing in self._by_key[key]:
                common = box.intersect(landing.box)
                if common is not None:
                    view = landing.view[common.slices(landing.box.offsets)]
                    view.copy_(values[common.slices(box.offsets)])
                    self.landed_bytes += view.numel() * view.element_size()
