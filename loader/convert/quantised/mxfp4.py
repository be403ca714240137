"""MXFP4, as gpt_oss has it: two 4-bit floats in a byte, and for each 32 of them a power of two.

`<name>_blocks` is uint8 [experts, rows, groups, 16], `<name>_scales` uint8 [experts, rows, groups]. What transformers'
`convert_moe_packed_tensors` makes of them, and what is seen here, is [experts, groups * 32, rows].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loader.convert.graph import Dequantised, Node, Permute, Reshape
from loader.convert.quantised.weight import Weight, blocks_of, look_up, spread
from loader.errors import ConversionError
from loader.plan.geometry import Box

GROUP = 32
"""Elements that share a scale (OCP Microscaling Formats 1.0, table 1)."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_PAIRS = torch.tensor([(2 * _E2M1[byte & 15], 2 * _E2M1[byte >> 4]) for byte in range(256)])
"""By byte its two elements, the low bits first, doubled: with halved scales all 256 of them are floats."""

_PAIRS_AS_ONE = _PAIRS.view(torch.float64).flatten()


def weights(keys: Mapping[str, Node], _: Mapping[str, Any]) -> Iterator[Weight]:
    """Raises ConversionError for blocks without scales, and for shapes that do not belong together."""
    for key, blocks in keys.items():
        if not key.endswith("_blocks") or blocks.dtype != torch.uint8:
            continue
        name = key.removesuffix("_blocks")
        scales = keys.get(f"{name}_scales")
        if scales is None:
            raise ConversionError(f"{key} means nothing without {name}_scales: is it left out by source.ignore?")
        if len(blocks.shape) != 4 or blocks.shape[3] * 2 != GROUP or scales.shape != blocks.shape[:3]:
            raise ConversionError(
                f"{key} is {list(blocks.shape)} and {name}_scales {list(scales.shape)}: expected "
                "[experts, rows, groups, 16] and [experts, rows, groups]"
            )
        yield Weight(name, _dequantised(blocks, scales), (key, f"{name}_scales"))


def _dequantised(blocks: Node, scales: Node) -> Node:
    experts, rows, groups, size = blocks.shape
    packed = Reshape((experts, rows, groups * size), blocks.dtype, blocks)
    made = Dequantised((experts, rows, groups * GROUP), torch.float32, (packed, scales), _multiply, _parts_of)
    return Permute((experts, groups * GROUP, rows), torch.float32, made, (0, 2, 1))


def _parts_of(box: Box) -> tuple[Box, Box]:
    """The boxes of bytes and scales that make `box` of [experts, rows, groups * 32]."""
    parts = [blocks_of(box.offsets[2], box.sizes[2], of) for of in (2, GROUP)]
    found = [Box((*box.offsets[:2], first), (*box.sizes[:2], size)) for first, size in parts]
    return found[0], found[1]


def _multiply(box: Box, packed: Tensor, stored: Tensor) -> Tensor:
    first, size = box.offsets[2], box.sizes[2]
    values = look_up(_PAIRS_AS_ONE, packed).view(torch.float32).narrow(2, first % 2, size)
    scales = stored.to(torch.float32).sub_(128.0).exp2_()  # 2^(e - 127) / 2
    return values.mul_(spread(scales, 2, GROUP, first, size))
