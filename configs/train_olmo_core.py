"""OLMo-core's own trainer, from a Hugging Face checkpoint in a bucket: no init step, one call in the trainer's process.

torchrun --nproc-per-node 8 configs/train_olmo_core.py s3://mine/llama-3-8b tokens.npy /data/run

Theirs: the model, FSDP, optimizer, data loader and trainer. Ours: `load_hf_model`, which takes the arguments of theirs.
"""

from __future__ import annotations

import json
import sys

import fsspec
import torch
from olmo_core.config import DType
from olmo_core.data import NumpyDataLoaderConfig, NumpyDatasetDType, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment, teardown_training_environment
from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from train_fsdp import LENGTH, STEPS, show  # the file beside this one
from trainers import olmo_core_config
from transformers import LlamaConfig

import loader
from loader.trainers.olmo_core import load_hf_model


def main(uri: str, tokens: str, save_folder: str) -> None:
    """Train some steps on the tokens of a file of uint16."""
    with fsspec.open(f"{uri}/config.json") as file:
        hf_config = LlamaConfig(**json.load(file))
    train_module = TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH,
        max_sequence_length=LENGTH,
        optim=AdamWConfig(lr=1e-4),
        dp_config=TransformerDataParallelConfig(
            name=DataParallelType.fsdp, param_dtype=DType.float32, reduce_dtype=DType.float32
        ),
    ).build(olmo_core_config(hf_config).build(init_device="meta"))

    load_hf_model(uri, get_model_state_dict(train_module.model))  # was: olmo_core.nn.hf.checkpoint.load_hf_model
    show(f"weights {loader.fingerprint(train_module.model)}")

    ids = TokenizerConfig(hf_config.vocab_size, hf_config.eos_token_id, hf_config.pad_token_id or 0)
    data = NumpyFSLDatasetConfig(
        paths=[tokens], sequence_length=LENGTH, tokenizer=ids, dtype=NumpyDatasetDType.uint16, work_dir=save_folder
    )
    batches = NumpyDataLoaderConfig(global_batch_size=LENGTH * train_module.world_size, seed=0).build(
        data.build(), dp_process_group=train_module.dp_process_group
    )
    trainer = TrainerConfig(
        save_folder=save_folder, max_duration=Duration.steps(STEPS), metrics_collect_interval=1, no_checkpoints=True
    )
    trainer.build(train_module, batches).fit()
    show(f"weights {loader.fingerprint(train_module.model)}")


if __name__ == "__main__":
    prepare_training_environment(seed=0, backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    main(*sys.argv[1:])
    teardown_training_environment()
