"""Every family of a trainer on every layout: one checkpoint that holds them all, and one load of it for each layout.

A load of its own for each family would cost a tenth of a second on four ranks, hundreds of times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import loader
from loader.job import conversion_of
from loader.place.mesh import make_mesh
from loader.place.transformers_builder import config_of
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard

LAYOUTS: dict[str, tuple[dict[str, int], list[Placement]]] = {
    "1 rank": ({"dp_shard": 1}, [Shard(0)]),
    "FSDP 2": ({"dp_shard": 2}, [Shard(0)]),
    "TP 2, dim 1": ({"tp": 2}, [Shard(1)]),
    "TP 2, dim 2": ({"tp": 2}, [Shard(2)]),
    "FSDP 4": ({"dp_shard": 4}, [Shard(0)]),
    "HSDP 2 x 2": ({"dp_replicate": 2, "dp_shard": 2}, [Replicate(), Shard(0)]),
    "FSDP 2 x TP 2, dim 0": ({"dp_shard": 2, "tp": 2}, [_StridedShard(0, split_factor=2), Shard(0)]),
    "FSDP 2 x TP 2, dim 1": ({"dp_shard": 2, "tp": 2}, [Shard(0), Shard(1)]),
    "FSDP 2 x TP 2, dim 2": ({"dp_shard": 2, "tp": 2}, [Shard(0), Shard(2)]),
}
"""TP takes each dim of every parameter in turn, so the converted ones too; dim 0 on 2 ranks is FSDP 2."""


class Family(NamedTuple):
    """A checkpoint: its keys, its config.json, its conversion as `convert:` names it; and what that is to make."""

    keys: Mapping[str, Tensor]
    config: Mapping[str, Any]
    convert: str
    expected: Mapping[str, Tensor]


def write(directory: Path, families: Mapping[str, Family]) -> None:
    """All families as one checkpoint, whose keys and FQNs begin with "family: "."""
    directory.mkdir(exist_ok=True)
    configs = {name: {"config": each.config, "convert": each.convert} for name, each in families.items()}
    (directory / "config.json").write_text(json.dumps({"families": configs}))
    (directory / "expected").mkdir()
    for file, part in (("model.safetensors", "keys"), ("expected/model.safetensors", "expected")):
        tensors = {f"{name}: {key}": t for name, each in families.items() for key, t in getattr(each, part).items()}
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / file)


def wrong_shards(directory: Path, world_size: int) -> list[str]:
    """`layout, family: fqn`, for every shard on any rank that is not torch's own of what is expected."""
    found = run_ranks(world_size, _load_on_each_layout, directory)
    return sorted({name for names in found for name in names})


def _load_on_each_layout(directory: Path) -> list[str]:
    wrong = []
    expected = load_file(directory / "expected/model.safetensors")
    for layout, (dims, placements) in LAYOUTS.items():
        if math.prod(dims.values()) == dist.get_world_size():
            mesh = make_mesh(dims, "cpu")
            sharded = {name: shard(tensor, mesh, placements) for name, tensor in expected.items()}
            state = {name: blank(tensor) for name, tensor in sharded.items()}
            loader.load(state, str(directory), convert=convert)
            wrong += [f"{layout}, {name}" for name in differences(state, sharded)]
    return wrong


def convert(
    checkpoint: Mapping[str, Tensor], hf_config: Any, *, only: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every family's conversion of its own keys, or of those of `only`."""
    for name in only or hf_config.families:
        family = hf_config.families[name]
        keys = {key.removeprefix(f"{name}: "): t for key, t in checkpoint.items() if key.startswith(f"{name}: ")}
        for fqn, tensor in conversion_of(family["convert"])(keys, config_of(family["config"])):
            yield f"{name}: {fqn}", tensor
