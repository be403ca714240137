"""A model that an init step and a trainer build alike: sharded evenly, unevenly, to nothing, by TP, tied, and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

FEW = 3
"""Rows: of four ranks the last has none."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)
        self.few = nn.Linear(6, FEW, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(5))
        self.init_buffers(self.steps.device)

    def init_buffers(self, device: torch.device) -> None:
        self.register_buffer("angles", torch.arange(6.0, device=device), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.angles
        hidden = self.norm(hidden + self.down(self.up(hidden).relu()))
        return self.head(hidden * self.few(hidden).sum(-1, keepdim=True)) * self.steps


def build(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """On meta. FSDP over dp_shard, HSDP with dp_replicate, TP over tp, where the mesh has more than one rank there."""
    with torch.device("meta"):
        model = Net()
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    if sizes.get("tp", 1) > 1:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    data = tuple(name for name in ("dp_replicate", "dp_shard") if name in sizes)
    for each in (model.up, model.down, model.few, model):
        fully_shard(each, mesh=mesh[data])
    return model


def write_checkpoint(directory: Path) -> dict[str, Tensor]:
    torch.manual_seed(3)
    tensors = {fqn: tensor.clone() for fqn, tensor in Net().state_dict().items() if fqn != "head.weight"}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"tie_word_embeddings": true}')
    return tensors


def train_a_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(8).view(2, 4)).square().mean().backward()
    optimizer.step()
