"""A model that an init step and a trainer build alike: sharded evenly, unevenly, to nothing, by TP, tied, and not."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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


def plain(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """64 MiB on meta, without a mesh."""
    with torch.device("meta"):
        return nn.Linear(4096, 4096, bias=False)


def two(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleDict({"big": nn.Linear(256, 256, bias=False), "small": nn.Linear(4, 4, bias=False)})


def wide(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """1 MiB over the mesh's ranks."""
    with torch.device("meta"):
        model = nn.Linear(512, 512, bias=False)
    return fully_shard(model, mesh=mesh)


def there(model: nn.Module, mesh: DeviceMesh, report: Any) -> int:
    """An entrypoint: 0 where a model of `wide` is what the checkpoint holds."""
    expected = load_file(Path(report.source.uri, "model.safetensors"))["weight"]
    return 0 if torch.equal(model.weight.full_tensor(), expected) else 7


def full_disk(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """As `wide`; rank 2 cannot write as much as its part."""
    if mesh.get_rank() == 2:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (128 << 10, most))
    return wide(hf_config, mesh)


def killed(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """As `wide`; rank 2 is killed while it writes to the directory LOCAL: nobody reads from its pipe."""
    if mesh.get_rank() == 2:
        os.mkfifo(f"{os.environ['LOCAL']}/rank-00002.bin")
        threading.Thread(target=_kill_when_writing, daemon=True).start()
    return wide(hf_config, mesh)


def _kill_when_writing() -> None:
    main = threading.main_thread().ident
    while "save" not in {frame.name for frame in traceback.extract_stack(sys._current_frames()[main])}:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


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
