"""How a tensor of a model lies over the ranks, in words that can be written down and compared in another process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from loader.place.targets import Held
from loader.plan.geometry import contiguous_strides

Layout = dict[str, Any]
"""`shape` and `dtype` of the whole tensor, `mesh` (dims by name), this rank's `coordinate` in it (None: it is outside),
`placements`, and `local_shape`, in JSON's types. A plain tensor is on a mesh without dims."""


def layout_of(held: Held) -> Layout:
    """{"shape": [4, 6], "dtype": "bfloat16", "mesh": {"dp_shard": 2}, "coordinate": [1], "placements": ["S(0)"],
    "local_shape": [2, 6]}"""
    tensor = held.tensor
    layout: Layout = {"mesh": {}, "coordinate": [], "placements": []}
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        layout = {
            "mesh": mesh_dims(tensor.device_mesh),
            "coordinate": None if coordinate is None else list(coordinate),
            "placements": [str(placement) for placement in tensor.placements],
        }
    sizes = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    return {**sizes, **layout, "local_shape": list(held.local.shape)}


def mesh_dims(mesh: DeviceMesh) -> dict[str, int]:
    """Its dims by name, outermost first; without names dim_0, dim_1, …"""
    names = mesh.mesh_dim_names or tuple(f"dim_{i}" for i in range(mesh.ndim))
    return dict(zip(names, mesh.shape, strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    """As torch's attribute is called: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """A tensor that is laid out as `tensor`, over `local` in place of its own local one."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=contiguous_strides(tensor.shape),
    )
