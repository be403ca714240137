"""torchtitan's own trainer, from the checkpoint that `torchtitan-dcp.yaml` left: none of our code runs in its process.

torchrun --nproc-per-node 8 configs/train_torchtitan.py 8B s3://mine/llama-3-8b-torchtitan /data/run

Theirs: the model, its parallelism, the optimizer, the checkpointer that reads, and the trainer. Yours is the data. With
a data set and a tokenizer of torchtitan's its own command will do, and this file is not needed:
`--checkpoint.enable --checkpoint.initial_load_path …`. Without a checkpoint in between, and with
`checkpoint.enable` left out: `loader.trainers.torchtitan.load_hf_checkpoint(trainer.model_parts, uri)` before `train`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.llama3 import model_registry
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

LENGTH, STEPS = 32, 3


class RandomTokens(BaseDataLoader):
    """Where yours comes in: batches of inputs, each with its positions, and of labels."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        rows: int = 2048

    def __init__(self, config: Config, *, dp_rank: int, local_batch_size: int, seq_len: int, **_: Any) -> None:
        self.rows, self.shape = config.rows, (local_batch_size, seq_len + 1)
        self.generator = torch.Generator().manual_seed(dp_rank)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            tokens = torch.randint(self.rows, self.shape, generator=self.generator)
            positions = torch.arange(self.shape[1] - 1).expand(self.shape[0], -1)
            yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoTokenizer(BaseTokenizer):
    """For tokens that are numbers already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    encode = decode = get_vocab_size = None


def main(flavor: str, checkpoint: str, dump_folder: str) -> None:
    init_logger()
    spec = model_registry(flavor)
    config = Trainer.Config(
        model_spec=spec,
        dump_folder=dump_folder,
        checkpoint=CheckpointManager.Config(enable=True, initial_load_path=checkpoint, load_only=True),
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        optimizer=default_adamw(lr=1e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=TrainingConfig(local_batch_size=1, seq_len=LENGTH, steps=STEPS, mixed_precision_param="float32"),
        dataloader=RandomTokens.Config(rows=spec.model.vocab_size),
        tokenizer=NoTokenizer.Config(),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),  # plain FSDP2
        metrics=MetricsProcessor.Config(log_freq=1),
    )
    trainer = config.build()
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
