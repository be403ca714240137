"""A trainer of its own, in plain FSDP2, that takes over what `llama-local.yaml` left on its node.

torchrun --nproc-per-node 8 configs/train_local.py /dev/shm/init
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import loader

STEPS = 3


def main(directory: str) -> None:
    """Attach, and train some steps on random tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))

    config = AutoConfig.from_pretrained(directory)  # the init step copied it there
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loader.attach(model, directory, verify="fingerprint", remove=True)  # in place of reading a checkpoint

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    torch.manual_seed(dist.get_rank())
    for step in range(STEPS):
        tokens = torch.randint(config.vocab_size, (1, 32), device=device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)  # noqa: T201 - what a trainer shows
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
