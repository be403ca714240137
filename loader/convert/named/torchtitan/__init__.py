"""`convert: torchtitan`: from HF's names and layouts to what torchtitan's models and its checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loader.convert.family import head_key, making
from loader.convert.lazy import needless
from loader.convert.named.torchtitan.families import MTP, Layer, Table, family_of, head_dim

__all__ = ["COPIES", "convert", "convert_fused", "prediction_layers"]


COPIES = ("embed_tokens.weight", "shared_head.head.weight")
"""Keys of a layer of multi-token prediction that are the model's own embeddings and head once more."""


def prediction_layers(names: Iterable[str], hf_config: Any) -> dict[str, str]:
    """Keys of the layers of multi-token prediction, which come after all others."""
    first, count = hf_config.num_hidden_layers, getattr(hf_config, "num_nextn_predict_layers", None) or 0
    known = set(names)
    layers = [f"model.layers.{n}." for n in range(first, first + count) if f"model.layers.{n}.eh_proj.weight" in known]
    reason = "a layer of multi-token prediction, which a model may be built without"
    return {name: reason for name in known if name.startswith(tuple(layers))}


@needless(prediction_layers)
def convert(checkpoint: Mapping[str, Tensor], hf_config: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict of torchtitan's model of this type, in the checkpoint's dtypes; q, k and v apart.

    llama is torchtitan's llama3, its q and k rows reordered for complex rotary embeddings; qwen3, qwen3_moe, gpt_oss
    (not quantised) and deepseek_v3 are themselves, experts stacked. A tied lm_head is there under both names. A
    load-balancing bias that the checkpoint lacks is zeros, as in a new model. The layers of multi-token prediction
    that a DeepSeek checkpoint has beyond `num_hidden_layers` are `mtp_layers`; a model without needs no such key.

    Raises ConversionError for another model type, a key that is missing, and heads that do not fit.
    """
    family = family_of(hf_config.model_type)
    yield "tok_embeddings.weight", checkpoint["model.embed_tokens.weight"]
    for number in range(hf_config.num_hidden_layers):
        yield from _layer(family, Layer(checkpoint, hf_config, number), f"layers.{number}.", {})
    number = hf_config.num_hidden_layers
    while "eh_proj.weight" in (layer := Layer(checkpoint, hf_config, number)):  # multi-token prediction, last
        yield from _layer(family, layer, f"mtp_layers.{number - hf_config.num_hidden_layers}.", MTP)
        number += 1
    yield "norm.weight", checkpoint["model.norm.weight"]
    with making("lm_head.weight"):
        head = checkpoint[head_key(checkpoint, hf_config, "lm_head.weight", "model.embed_tokens.weight")]
    yield "lm_head.weight", head


@needless(prediction_layers)
def convert_fused(checkpoint: Mapping[str, Tensor], hf_config: Any) -> Iterator[tuple[str, Tensor]]:
    """As `convert`, with q, k and v as the one parameter `wqkv` of models built with torchtitan's `fuse_qkv`.

    Its rows are, for each key-value head: the query heads that share it, then it, then its values.
    """
    waiting: list[Tensor] = []
    for fqn, tensor in convert(checkpoint, hf_config):
        if ".qkv_linear." not in fqn:
            yield fqn, tensor
            continue
        waiting.append(tensor.view(hf_config.num_key_value_heads, -1, head_dim(hf_config), *tensor.shape[1:]))
        if len(waiting) == 3:
            yield fqn.replace(".wv.", ".wqkv."), torch.cat(waiting, dim=1).flatten(0, 2)
            waiting = []


def _layer(family: Callable[[Layer], Table], layer: Layer, prefix: str, more: Table) -> Iterator[tuple[str, Tensor]]:
    for name, source in {**family(layer), **more}.items():
        with making(prefix + name):
            tensor = layer[source] if isinstance(source, str) else source(layer)
        yield prefix + name, tensor
