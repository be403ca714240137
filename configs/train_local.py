"""A trainer of its own, in plain FSDP2, that takes over what `llama-local.yaml` left on its node.

torchrun --nproc-per-node 8 configs/train_local.py /dev/shm/init
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from train_fsdp import shard, start, train  # the file beside this one
from transformers import AutoConfig, AutoModelForCausalLM

import loader


def main(directory: str) -> None:
    """Attach, and train."""
    mesh = start()
    config = AutoConfig.from_pretrained(directory)  # the init step copied it there
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shard(model, mesh)
    loader.attach(model, directory, verify="fingerprint", remove=True)  # in place of reading a checkpoint
    train(model, mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
