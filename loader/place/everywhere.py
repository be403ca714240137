"""What every rank of a world holds, from the model that one of them has: arithmetic on meshes, without a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from loader.place.boxes import shard_shape
from loader.place.targets import Target, boxes_at, held_in

Coordinate = tuple[int, ...]


class Grid(NamedTuple):
    """A mesh as all ranks have it: its sizes, and `coordinates[rank]`, which are -1 where the rank is not on it."""

    sizes: tuple[int, ...]
    coordinates: npt.NDArray[np.int64]


class Part(NamedTuple):
    """One tensor of the model (see `Target`), of global `shape`; a plain tensor is on a grid without dims."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    grid: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Everywhere:
    """A model's tensors, on all ranks that built the same but for their coordinates."""

    parts: tuple[Part, ...]
    grids: tuple[Grid, ...]

    @classmethod
    def of(cls, model: nn.Module | Mapping[str, torch.Tensor], world_size: int) -> Everywhere:
        """The model of one rank, which may be on meta. Raises BuilderError for what cannot be filled."""
        numbers: dict[DeviceMesh | None, int] = {None: 0}
        parts = []
        for held in held_in(model):
            placed = held.tensor if isinstance(held.tensor, DTensor) else None
            grid = numbers.setdefault(placed.device_mesh if placed is not None else None, len(numbers))
            placements = tuple(placed.placements) if placed is not None else ()
            parts.append(Part(held.names, tuple(held.tensor.shape), held.local.dtype, grid, placements))
        return cls(tuple(parts), tuple(_grid(mesh, world_size) for mesh in numbers))

    def coordinate(self, part: Part, rank: int) -> Coordinate | None:
        """Where `rank` stands on the part's mesh, 0 on the dims that it is not sharded over; None off the mesh."""
        found = self.grids[part.grid].coordinates[rank].tolist()
        if -1 in found:
            return None
        return tuple(
            0 if isinstance(placement, Replicate) else at for at, placement in zip(found, part.placements, strict=True)
        )

    def target(self, part: Part, coordinate: Coordinate | None) -> Target:
        """The part as a target on meta of the ranks at `coordinate`."""
        if coordinate is None:
            return Target(part.names, torch.empty(0, dtype=part.dtype, device="meta"), part.shape, ())
        sizes = self.grids[part.grid].sizes
        boxes = boxes_at(part.names[0], part.shape, sizes, coordinate, part.placements)
        local = shard_shape(part.shape, sizes, coordinate, part.placements)
        return Target(part.names, torch.empty(local, dtype=part.dtype, device="meta"), part.shape, boxes)

    def held(self, rank: int) -> list[tuple[object, ...]]:
        """All that `rank` has, to be compared."""
        targets = (self.target(part, self.coordinate(part, rank)) for part in self.parts)
        return [(each.names, each.shape, each.dtype, each.boxes) for each in targets]

    def alike(self, ranks: Iterable[int]) -> list[list[int]]:
        """`ranks`, those together that hold the same boxes of every part, by their first."""
        placed = {(part.grid, part.placements): part for part in self.parts}.values()
        together: dict[tuple[Coordinate | None, ...], list[int]] = {}
        for rank in ranks:
            together.setdefault(tuple(self.coordinate(part, rank) for part in placed), []).append(rank)
        return list(together.values())


def _grid(mesh: DeviceMesh | None, world_size: int) -> Grid:
    """The sub-meshes of all ranks, which have one root: torch lists them along a first dim."""
    if mesh is None:
        return Grid((), np.zeros((world_size, 0), np.int64))
    every: Any = mesh._layout.remap_to_tensor(mesh._rank_map)  # noqa: SLF001 - what is public shows this rank's own alone
    at = np.stack(np.unravel_index(np.arange(every.numel()), tuple(every.shape)), axis=1)
    coordinates = np.full((world_size, mesh.ndim), -1, np.int64)
    coordinates[every.flatten().numpy()] = at[:, 1:]
    return Grid(tuple(mesh.shape), coordinates)
