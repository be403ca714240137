"""A trainer of its own that starts by `dcp.load`. One line is changed, and it reads Hugging Face checkpoints.

torchrun --nproc-per-node 8 configs/train_dcp.py s3://mine/llama-3-8b
"""

from __future__ import annotations

import json
import sys

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from train_fsdp import shard, start, train  # the file beside this one
from transformers import AutoConfig, AutoModelForCausalLM

import loader


def main(uri: str) -> None:
    """Load, and train."""
    mesh = start()
    with fsspec.open(f"{uri}/config.json") as file:
        config = AutoConfig.for_model(**json.load(file))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # DCP fills memory that is there
    shard(model, mesh)

    state = get_model_state_dict(model)
    dcp.load(state, storage_reader=loader.StorageReader(uri))  # was: dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(model, state)
    train(model, mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
