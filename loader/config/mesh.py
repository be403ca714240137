"""The mesh: names and sizes of its dims, outermost first, one of which may fill what the others leave."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loader.errors import ConfigError

FILL = -1


def check_mesh(mesh: dict[str, int]) -> dict[str, int]:
    """`mesh` itself, once its sizes are known to be positive, but for at most one -1. Raises ConfigError."""
    if not mesh:
        raise ConfigError("should name at least one dim, such as {dp_shard: -1}")
    for name, size in mesh.items():
        if size < 1 and size != FILL:
            raise ConfigError(f"every size should be positive, or -1 to fill, found {name}: {size}")
    filling = [name for name, size in mesh.items() if size == FILL]
    if len(filling) > 1:
        raise ConfigError(f"one dim at most can be -1, found {' and '.join(filling)}: give all but one a size")
    return mesh


def resolve_mesh(mesh: Mapping[str, int], world_size: int) -> dict[str, int]:
    """The sizes that `mesh` has over `world_size` ranks, in its order, with -1 filled.

    {dp_replicate: 2, dp_shard: -1} over 8 ranks is {dp_replicate: 2, dp_shard: 4}. Raises ConfigError when the sizes do
    not multiply to `world_size`.
    """
    product = math.prod(size for size in mesh.values() if size != FILL)
    fill, rest = divmod(world_size, product)
    filling = FILL in mesh.values()
    if rest or not (filling or fill == 1):
        raise ConfigError(_misfit(mesh, product, world_size, filling=filling))
    return {name: fill if size == FILL else size for name, size in mesh.items()}


def _misfit(mesh: Mapping[str, int], product: int, world_size: int, *, filling: bool) -> str:
    shown = ", ".join(f"{name}: {size}" for name, size in mesh.items())
    if filling:
        below = world_size // product * product
        worlds = " or ".join(str(world) for world in (below, below + product) if world)
        complaint = f"the sizes given multiply to {product}, which does not divide the world size {world_size}"
        ways = [f"start {worlds} ranks"]
    else:
        complaint = f"its sizes multiply to {product}, but the world size is {world_size}"
        ways = [f"start {product} ranks"]
    for name, size in mesh.items():
        others = product // size
        # With a -1 beside it, any divisor would do; 1 stands for "leave it to the -1".
        fits = 1 if filling else world_size // others
        if size > 1 and world_size % others == 0:
            ways.append(f"set mesh.{name}={fits}")
    return f"mesh {{{shown}}}: {complaint}; {', or '.join(ways)}"
