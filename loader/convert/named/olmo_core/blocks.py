"""What most blocks are made of: attention, norms, MLP, experts, each as a table."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loader.convert.family import check_heads
from loader.convert.named.olmo_core.layer import Layer, Table
from loader.errors import ConversionError

PRE_NORMS: Table = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
"""A norm before each half of the block: HF calls the second by its place, after the attention."""

REORDERED_NORMS: Table = {
    "attention_norm.weight": "post_attention_layernorm.weight",
    "feed_forward_norm.weight": "post_feedforward_layernorm.weight",
}
"""A norm after each half of the block. One key has the name of another norm in `PRE_NORMS`."""

PERI_NORMS: Table = {
    "attention_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "feed_forward_norm.weight": "pre_feedforward_layernorm.weight",
    "post_feed_forward_norm.weight": "post_feedforward_layernorm.weight",
}
"""A norm before and after each half of the block."""

QK_NORMS: Table = {f"attention.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}

_ATTENTION = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}
_MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def attention(layer: Layer) -> Table:
    """Projections. OLMo-core gives all of them a bias or none: what of it HF lacks (qwen2's o_proj) is zeros."""
    biased = any(f"self_attn.{key}.bias" in layer for key in _ATTENTION.values())
    table: Table = {}
    for name, key in _ATTENTION.items():
        table[f"attention.{name}.weight"] = partial(_projection, layer, key)
        if biased:
            there = f"self_attn.{key}.bias" in layer
            table[f"attention.{name}.bias"] = f"self_attn.{key}.bias" if there else partial(_no_bias, layer, key)
    return table


def _projection(layer: Layer, key: str) -> Tensor:
    """The weight, if its side of the heads is as long as the config says."""
    weight = layer[f"self_attn.{key}.weight"]
    count = "num_key_value_heads" if key in ("k_proj", "v_proj") else "num_attention_heads"
    name, heads = f"{layer.prefix}self_attn.{key}.weight", getattr(layer.config, count)
    check_heads(name, weight, int(key == "o_proj"), count=count, heads=heads, size=_head_size(layer.config))
    return weight


def _head_size(config: Any) -> int:
    if getattr(config, "head_dim", None):
        return int(config.head_dim)
    hidden: int = config.hidden_size
    heads: int = config.num_attention_heads
    if hidden % heads:
        raise ConversionError(
            f"hidden_size {hidden} does not divide by num_attention_heads {heads}, and the config has no head_dim"
        )
    return hidden // heads


def _no_bias(layer: Layer, key: str) -> Tensor:
    weight = layer[f"self_attn.{key}.weight"]
    return torch.zeros(weight.shape[0], dtype=weight.dtype)


def mlp(layer: Layer) -> Table:
    kinds = ("weight", "bias") if "mlp.gate_proj.bias" in layer else ("weight",)
    return {f"feed_forward.{name}.{kind}": f"mlp.{key}.{kind}" for name, key in _MLP.items() for kind in kinds}


def experts(layer: Layer) -> Table:
    """The experts one below the other, each turned; w1 and w3 as they are for a dropless model. The router is flat."""

    def rows(key: str) -> Tensor:
        as_is = layer.dropless and key != "down_proj"
        return torch.cat([part if as_is else part.t() for part in layer.experts(key)])

    table: Table = {f"feed_forward_moe.experts.mlp.{name}": partial(rows, key) for name, key in _MLP.items()}
    return table | {"feed_forward_moe.router.weight": partial(layer.flat, "mlp.gate.weight")}


def experts_or_mlp(layer: Layer) -> Table:
    """Experts in every `decoder_sparse_step`th layer, but for those of `mlp_only_layers`."""
    step: int = getattr(layer.config, "decoder_sparse_step", 1)
    dense: list[int] = getattr(layer.config, "mlp_only_layers", None) or []
    return mlp(layer) if layer.number in dense or (layer.number + 1) % step else experts(layer)
