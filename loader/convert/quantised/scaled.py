"""Float8 weights with float scales: for each block, each row, or the whole tensor.

DeepSeek-V3's `quant_method: fp8` (key and key_scale_inv, which in spite of its name multiplies) and the float8 formats
of compressed-tensors (weight and weight_scale). Each element is float32(value) x float32(its block's scale).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loader.convert.graph import Dequantised, Node, Reshape
from loader.convert.quantised.weight import Weight, blocks_of, exponents, look_up, spread
from loader.errors import ConversionError
from loader.formats.strict_json import quote
from loader.plan.geometry import Box

Block = tuple[int, ...]

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_VALUES = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32) for dtype in _FLOAT8}
"""By dtype, the value of each byte."""
_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "input_zero_point", "output_zero_point")
_ZERO_POINT = "_zero_point"
_LARGEST = 1 << 31
"""No block of scales is as large."""
_CACHE = ("q_scale", "k_scale", "v_scale")


def is_float8(dtype: torch.dtype) -> bool:
    return dtype in _FLOAT8


def block_scaled(keys: Mapping[str, Node], config: Mapping[str, Any]) -> Iterator[Weight]:
    """As transformers' FineGrainedFP8Config: blocks of `weight_block_size`, or one scale where that is null."""
    size = config.get("weight_block_size")
    return _weights(keys, "_scale_inv", [_block(size)] if size else [], ())


def compressed_tensors(keys: Mapping[str, Node], config: Mapping[str, Any]) -> Iterator[Weight]:
    """Every group of `config_groups` must keep its weights as symmetric float8, per tensor, channel, group or block."""
    blocks: list[Block] = []
    for name, group in _object(config.get("config_groups") or {}, "config_groups").items():
        weights = _object(_object(group, name).get("weights") or {}, f"{name}.weights")
        told = {"type": weights.get("type"), "num_bits": weights.get("num_bits")}
        if told != {"type": "float", "num_bits": 8} or not weights.get("symmetric", True):
            told["symmetric"] = weights.get("symmetric", True)
            raise ConversionError(
                f"config.json: group {name} of compressed-tensors keeps weights as {told} "
                f"(format {config.get('format')}); only symmetric float8 can be dequantised. "
                "Keep it as it is with model.dequantize: false"
            )
        if weights.get("block_structure"):
            blocks.append(_block(weights["block_structure"]))
        elif weights.get("group_size") not in (None, 0, -1):  # a tuple: what config.json has there may be anything
            blocks.append(_block([1, weights["group_size"]]))
    return _weights(keys, "_scale", blocks, _CACHE if config.get("kv_cache_scheme") else ())


def _object(told: object, name: str) -> Mapping[str, Any]:
    if not isinstance(told, Mapping):
        raise ConversionError(f"config.json: {name} of its quantisation should be an object, found {quote(told)}")
    return told


def _block(told: object) -> Block:
    if isinstance(told, list | tuple) and all(type(of) is int and 0 < of < _LARGEST for of in told):
        return tuple(told)
    raise ConversionError(f"config.json: a block of scales should be sizes such as [128, 128], found {quote(told)}")


def _weights(keys: Mapping[str, Node], suffix: str, blocks: Sequence[Block], cache: Sequence[str]) -> Iterator[Weight]:
    for key, node in keys.items():
        if node.dtype not in _VALUES or key.endswith(_ZERO_POINT):
            continue
        scale = f"{key}{suffix}"
        if scale not in keys:
            raise ConversionError(
                f"{key} is {node.dtype}, which means nothing without its scales, and there is no {scale}: "
                "is it left out by source.ignore? Keep it as it is with model.dequantize: false"
            )
        module = key.rpartition(".")[0]
        beside = [f"{module}.{name}" for name in _ACTIVATIONS] + [f"{key}{_ZERO_POINT}"]
        beside += [f"{owner}.{name}" for owner in (module, module.rpartition(".")[0]) for name in cache]
        made = _dequantised(key, node, scale, keys[scale], blocks)
        yield Weight(key, made, (key, scale), tuple(name for name in beside if name in keys))


def _dequantised(key: str, weight: Node, name: str, scales: Node, blocks: Sequence[Block]) -> Node:
    """The product, whatever the scales are for: each of `blocks`, the tensor, each expert's matrix, or each row."""
    shape, ndim = weight.shape, len(weight.shape)
    fitting = [block for block in blocks if len(block) <= ndim]
    known = [(1,) * (ndim - len(block)) + block for block in fitting]  # experts in one tensor have scales of their own
    one_a_row = (1,) * (ndim - 1) + shape[ndim - 1 :]
    for block in (*known, shape, (1,) * (ndim - 2) + shape[-2:], one_a_row):
        grid = _grid(shape, block)
        fits = scales.shape in ({grid, grid[:-1]} if block == one_a_row else {grid})
        if fits or math.prod(scales.shape) == math.prod(grid) == 1:
            parts = (weight, Reshape(grid, scales.dtype, scales))
            return Dequantised(shape, torch.float32, parts, partial(_multiply, block), _Parts(block))
    expected = [f"{list(_grid(shape, block))} for blocks of {list(block)}" for block in known]
    raise ConversionError(
        f"{name} is {list(scales.shape)}, and {key} is {list(shape)}: expected {', '.join([*expected, 'one scale'])}, "
        "or one a row. Does config.json belong to the checkpoint?"
    )


def _grid(shape: Sequence[int], block: Block) -> tuple[int, ...]:
    """How many blocks there are in each dim; those at the edges may be partial."""
    return tuple(-(-size // max(1, of)) for size, of in zip(shape, block, strict=True))


@dataclass(frozen=True, slots=True)
class _Parts:
    """The boxes of weight and scales that make a box. Equal for equal blocks: so equal weights are seen to be."""

    block: Block

    def __call__(self, box: Box) -> tuple[Box, Box]:
        touched = [blocks_of(*span) for span in zip(box.offsets, box.sizes, self.block, strict=True)]
        offsets, sizes = zip(*touched, strict=True) if touched else ((), ())
        return box, Box(offsets, sizes)


def _multiply(block: Block, box: Box, weight: Tensor, stored: Tensor) -> Tensor:
    scales = exponents(stored)
    for dim, of in enumerate(block):
        if scales.shape[dim] > 1:
            scales = spread(scales, dim, of, box.offsets[dim], box.sizes[dim])
    return look_up(_VALUES[weight.dtype], weight).mul_(scales)
