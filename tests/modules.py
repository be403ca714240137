"""Modules that hold what a test wants them to, under the names that it wants."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def module_of(tensors: Mapping[str, Tensor], mesh: DeviceMesh | None = None) -> nn.Module:
    """Parameters like `tensors`, on meta, by their FQNs; with a mesh each in an FSDP2 group of its own module."""
    root = nn.Module()
    for fqn, tensor in tensors.items():
        owner = root
        *path, name = fqn.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(name, nn.Parameter(torch.empty_like(tensor, device="meta")))
    for owner in root.modules() if mesh is not None else ():
        if owner._parameters:
            fully_shard(owner, mesh=mesh)
    return root
