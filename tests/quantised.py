"""Quantised checkpoints for tests, beside what they mean: bits at random, so that none passes for another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.shards import write_file

Quantise = Callable[[str, Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor] | None]
"""What is stored in a tensor's place, by key, and the tensor that it stands for; None leaves it as it is."""


def float8(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Every finite value of float8_e4m3fn."""
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.where(values & 0x7F == 0x7F, 0, values).view(torch.float8_e4m3fn)


def scales(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) + 0.01


def product(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The whole by torch alone: each scale repeated over its block, what hangs over the edge cut off."""
    rows, columns = weight.shape[-2:]
    spread = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    return weight.float() * spread


def in_blocks(block: tuple[int, int], kind: torch.dtype = torch.float32, suffix: str = "_scale_inv") -> Quantise:
    """Float8 with a scale for each block, of `kind`: float32, bfloat16, or powers of two as float8_e8m0fnu."""

    def quantise(key: str, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor] | None:
        if not key.endswith("_proj.weight") or "embed" in key:
            return None
        weight = float8(tuple(tensor.shape), generator)
        grid = tuple(-(-size // of) for size, of in zip(tensor.shape, block, strict=True))
        scale = scales(grid, generator).to(kind)
        return {key: weight, f"{key}{suffix}": scale}, product(weight, scale, block)

    return quantise


def one_scale(shape: Callable[[Tensor], tuple[int, ...]], suffix: str, **beside: Tensor) -> Quantise:
    """Float8 with scales of `shape`, one or one a row, and keys `beside` it that nobody needs."""

    def quantise(key: str, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor] | None:
        if not key.endswith("_proj.weight"):
            return None
        weight = float8(tuple(tensor.shape), generator)
        scale = scales(shape(tensor), generator).to(torch.bfloat16)
        extra = {f"{key.rpartition('.')[0]}.{name}": value for name, value in beside.items()}
        return {key: weight, f"{key}{suffix}": scale, **extra}, weight.float() * scale.float().view(-1, 1)

    return quantise


def mxfp4(key: str, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor] | None:
    if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    experts, width, rows = tensor.shape
    blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8, generator=generator)
    scale = torch.randint(100, 150, (experts, rows, width // 32), dtype=torch.uint8, generator=generator)
    return {f"{key}_blocks": blocks, f"{key}_scales": scale}, convert_moe_packed_tensors(
        blocks, scale, dtype=torch.float32
    )


def quantised_copy(source: Path, to: Path, quantise: Quantise, config: Mapping[str, Any]) -> None:
    """The checkpoint of `source` again in `to`/quantised, and what it means: `to`/exact, and rounded, `to`/plain."""
    generator = torch.Generator().manual_seed(0)
    stored, exact = {}, {}
    for key, tensor in load_file(source / "model.safetensors").items():
        made = quantise(key, tensor, generator)
        stored |= made[0] if made else {key: tensor.to(torch.bfloat16)}
        exact[key] = made[1] if made else tensor.to(torch.bfloat16).float()
    plain = {key: tensor.to(torch.bfloat16) for key, tensor in exact.items()}
    fields = {**json.loads((source / "config.json").read_text()), "dtype": "bfloat16"}
    for name, tensors in (("quantised", stored), ("exact", exact), ("plain", plain)):
        more = {"quantization_config": config} if name == "quantised" else {}
        write_file(to / name / "model.safetensors", tensors)
        (to / name / "config.json").write_text(json.dumps({**fields, **more}))
