"""A state dict without a model (`builder: null`): empty DTensors, sharded by the config's placement rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from loader.errors import ConfigError
from loader.place.boxes import shard_shape
from loader.plan.geometry import contiguous_strides

Rule = tuple[str, Mapping[str, int]]
"""A glob over FQNs, and which tensor dim each named mesh dim shards."""


def empty_state_dict(
    tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
    mesh: DeviceMesh,
    rules: Sequence[Rule],
    device: torch.device | str,
) -> dict[str, DTensor]:
    """Uninitialised DTensors of the given global shapes and dtypes, with the placements of the first rule that matches.

    What no rule matches, or a rule with no mesh dims, is replicated. Mesh dims that shard the same tensor dim nest in
    mesh order; negative tensor dims count from the end. Raises ConfigError for a tensor dim or a mesh dim that is not.
    """
    result = {}
    for fqn, (shape, dtype) in tensors.items():
        placements = _placements(fqn, tuple(shape), mesh, rules)
        coordinate = mesh.get_coordinate()
        local_shape = (0,) if coordinate is None else shard_shape(shape, mesh.shape, coordinate, placements)
        result[fqn] = DTensor.from_local(
            torch.empty(local_shape, dtype=dtype, device=device),
            mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=contiguous_strides(shape),
        )
    return result


def _placements(fqn: str, shape: tuple[int, ...], mesh: DeviceMesh, rules: Sequence[Rule]) -> list[Placement]:
    placements: list[Placement] = [Replicate()] * mesh.ndim
    match, shard = next(((glob, shard) for glob, shard in rules if fnmatchcase(fqn, glob)), ("", {}))
    names = mesh.mesh_dim_names or ()
    for mesh_dim, dim in shard.items():
        where = f"placements: rule {match!r} for {fqn} of shape {list(shape)}"
        if mesh_dim not in names:
            raise ConfigError(f"{where}: no mesh dim {mesh_dim!r}; the mesh has {', '.join(names)}")
        if not -len(shape) <= dim < len(shape):
            raise ConfigError(f"{where}: cannot shard dim {dim} of {len(shape)} over {mesh_dim}; put a rule before it")
        placements[names.index(mesh_dim)] = Shard(dim % len(shape))
    return placements
