"""Checkpoints for tests. Those of whole models are in `launch.local_checkpoints`, for the quickstart needs them too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from launch.local_checkpoints import minilm_dir, tiny_llama

__all__ = ["minilm_dir", "random_checkpoint", "random_tensor", "same_bits", "tiny_llama"]


def random_tensor(dtype: torch.dtype, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random bits, NaNs among them, so that nothing but a copy of the bits passes for the tensor."""
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def random_checkpoint(
    directory: Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    *,
    files: int = 1,
    index: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of random bits, its keys dealt out to `files` files in turn, and return its tensors.

    One file is `model.safetensors` and has no index; several have one unless `index` is False.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {key: random_tensor(dtype, shape, generator) for key, (dtype, shape) in tensors.items()}
    names = [f"model-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)]
    names = names if files > 1 else ["model.safetensors"]
    weight_map = {key: names[n % files] for n, key in enumerate(made)}
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        save_file({key: made[key] for key, file in weight_map.items() if file == name}, directory / name)
    if files > 1 and index:
        content = {"metadata": {"total_size": sum(t.nbytes for t in made.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    return made


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit; `torch.equal` takes 0.0 for -0.0, and no NaN for itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (t.detach().contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)
