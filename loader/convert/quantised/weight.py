"""What every kind of quantisation says of a weight, and how scales are spread over its blocks."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from loader.convert.graph import Node


class Weight(NamedTuple):
    """A quantised weight: its name and node as a conversion sees it, the keys it is stored as, the keys that nobody
    needs once it is dequantised."""

    name: str
    node: Node
    stored: tuple[str, ...]
    needless: tuple[str, ...] = ()


def exponents(stored: Tensor) -> Tensor:
    """Scales in float32. A byte that is no float is the exponent of a power of two: e stands for 2^(e - 127)."""
    found = stored.to(torch.float32)
    return (found - 127.0).exp2_() if stored.dtype == torch.uint8 else found


def spread(scales: Tensor, dim: int, block: int, first: int, size: int) -> Tensor:
    """Each scale along `dim` once for each element of its block that is within `[first, first + size)` of the weight.

    `scales` begins with the block that element `first` is in: first 3, size 4, blocks of 2 -> scales 0, 1, 1, 2.
    """
    return scales.repeat_interleave(block, dim).narrow(dim, first % block, size)


def look_up(table: Tensor, stored: Tensor) -> Tensor:
    """By byte its value in `table`, of 256: in a third of the time that a cast from float8 takes."""
    values = _kept(table, stored.device)
    return values.index_select(0, stored.view(torch.uint8).flatten().to(torch.int32)).view(stored.shape)


@cache
def _kept(table: Tensor, device: torch.device) -> Tensor:
    return table.to(device)


def blocks_of(first: int, size: int, block: int) -> tuple[int, int]:
    """Offset and number of the blocks that `[first, first + size)` touches: 3, 4 in blocks of 2 -> 1, 3."""
    begin = first // block
    return begin, -(-(first + size) // block) - begin
