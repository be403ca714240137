"""transformers' own Trainer, in the processes that loaded: every rank calls `main`, with the model filled.

torchrun --nproc-per-node 8 -m loader.init_from_hf --config configs/llama-fsdp.yaml \
    output.entrypoint=configs.train_transformers:main source.uri=s3://mine/llama-3-8b

Theirs: data loader, optimizer, schedule, loop and logs (`pip install accelerate`, which the Trainer wants). The model
comes under FSDP2, so that `TrainingArguments` say nothing of it, and accelerate's FSDP plugin is not used.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, Trainer, TrainingArguments

import loader
from configs.train_fsdp import LENGTH, STEPS, show


def main(model: PreTrainedModel, mesh: DeviceMesh, report: loader.Report) -> int:
    """Train some steps on random tokens, and tell the model's fingerprint before and after them."""
    # As `from_pretrained(distributed_config=…)` leaves a model, sharded: else the Trainer would wrap it once more.
    model._is_distributed_loading_by_transformers = True  # noqa: SLF001 - 5.23 has no other way to say so
    arguments = TrainingArguments(
        use_cpu=mesh.device_type == "cpu",
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=1e-4,
        train_sampling_strategy="sequential",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(model.config.vocab_size, (STEPS * mesh.size(), LENGTH), generator=generator)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    show(f"weights {loader.fingerprint(model)}")
    trainer.train()
    show(f"weights {loader.fingerprint(model)}")
    return 0
