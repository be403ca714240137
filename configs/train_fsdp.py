"""Plain FSDP2, in the processes that loaded: every rank calls `main`, with the model filled.

torchrun --nproc-per-node 8 -m loader.init_from_hf --config configs/llama-fsdp.yaml source.uri=s3://mine/llama-3-8b
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import loader

STEPS, LENGTH = 3, 32


def main(model: nn.Module, mesh: DeviceMesh, report: loader.Report) -> int:
    """What `output.entrypoint` names. It returns the rank's exit code."""
    train(model, mesh)
    return 0


def train(model: nn.Module, mesh: DeviceMesh) -> None:
    """Train some steps on random tokens, and tell the model's fingerprint before and after them."""
    show(f"weights {loader.fingerprint(model)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    torch.manual_seed(mesh.get_rank())
    for step in range(STEPS):
        tokens = torch.randint(model.config.vocab_size, (1, LENGTH)).to(mesh.device_type)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        show(f"step {step} loss {loss.item():.4f}")
    show(f"weights {loader.fingerprint(model)}")


def show(line: str) -> None:
    """On rank 0 alone."""
    if dist.get_rank() == 0:
        print(line, flush=True)  # noqa: T201 - what a trainer shows


# What a process that the init step did not start does by itself: train_local.py and train_dcp.py.


def start() -> DeviceMesh:
    """The process group, and a mesh of all its ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every layer for itself, and the rest together."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
