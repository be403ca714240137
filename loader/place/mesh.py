"""The device mesh, from the config's resolved dims."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from loader.errors import ConfigError


def make_mesh(dims: Mapping[str, int], device_type: str) -> DeviceMesh:
    """A mesh over the whole world with `dims` in their order, the last one over neighbouring ranks.

    The default process group must exist. No dims at all is one rank, as `dp_shard: 1`. Raises ConfigError where the
    dims do not multiply to the world size.
    """
    dims = dims or {"dp_shard": 1}
    world_size = dist.get_world_size()
    if math.prod(dims.values()) != world_size:
        product = " x ".join(f"{name} {size}" for name, size in dims.items())
        raise ConfigError(f"mesh: {product} = {math.prod(dims.values())} ranks, but the world has {world_size}")
    return init_device_mesh(device_type, tuple(dims.values()), mesh_dim_names=tuple(dims))
