"""Models of a user's that a dry run must foresee: what a rank builds depends on where it stands."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

LAYERS, EXPERTS, WIDTH = 4, 3, 96


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.Parameter(torch.empty(EXPERTS, WIDTH, WIDTH))
        self.register_buffer("steps", torch.empty(2, dtype=torch.int64))


class Stages(nn.Module):
    """The layers of one stage, by their numbers in the whole model; what all stages share."""

    def __init__(self, numbers: range) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleDict({str(number): Layer() for number in numbers})


def stages_with_experts(_: Any, mesh: DeviceMesh) -> nn.Module:
    """Half of the layers for each pipeline stage, FSDP within it, experts over all ranks on a mesh of their own."""
    stage = mesh["pp"].get_local_rank()
    half = LAYERS // 2
    with torch.device("meta"):
        model = Stages(range(stage * half, (stage + 1) * half))
    experts = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicas", "ep"))["ep"]
    for layer in model.layers.values():
        layer.experts = nn.Parameter(_shard(layer.experts, experts))
    mine = {layer.experts for layer in model.layers.values()}
    for module in (*model.layers.values(), model):
        fully_shard(module, mesh=mesh["dp_shard"], ignored_params=mine)
    return model


def _shard(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    rows = whole.chunk(mesh.size())  # ceil(3 / 2) for the first rank
    at = mesh.get_local_rank()
    local = torch.empty_like(rows[at] if at < len(rows) else whole[:0])
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def fused(checkpoint: Any, _: Any) -> Any:
    """A conversion that stacks, splits and combines."""
    yield "embed", checkpoint["embed.weight"]
    for layer in range(LAYERS):
        up, bias = (checkpoint[f"layers.{layer}.up.{name}"] for name in ("weight", "bias"))
        first, second = (up * bias.unsqueeze(1)).chunk(2)
        yield f"{layer}.up", torch.stack([first, second]).transpose(1, 2)
        for expert, each in enumerate(checkpoint[f"layers.{layer}.experts"].unbind()):
            yield f"{layer}.expert{expert}", each.t()
        for name in ("norm.weight", "norm.bias", "steps"):
            yield f"{layer}.{name}", checkpoint[f"layers.{layer}.{name}"]


def cut(checkpoint: Any, _: Any) -> Any:
    """A conversion that leaves a row out."""
    return {name: tensor[:-1] if name == "embed.weight" else tensor for name, tensor in checkpoint.items()}
