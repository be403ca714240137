"""The model types that `convert: torchtitan` knows. A new one is one entry of `FAMILIES`.

A family is a table for one layer: FQN (without "layers.3.") to key (without "model.layers.3."), or to a function that
makes the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loader.convert.family import check_heads, unknown


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the checkpoint: `layer["mlp.gate.weight"]` is `model.layers.N.mlp.gate.weight`."""

    checkpoint: Mapping[str, Tensor]
    config: Any
    number: int

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint[self.key(name)]

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.checkpoint

    def key(self, name: str) -> str:
        return f"model.layers.{self.number}.{name}"


Table = Mapping[str, str | Callable[[Layer], Tensor]]


def _heads(name: str) -> Callable[[Layer], Tensor]:
    """A projection to heads or, o_proj, from them: as it is, if it has as many as the config says."""

    def make(layer: Layer) -> Tensor:
        count = "num_key_value_heads" if ".k_proj." in name or ".v_proj." in name else "num_attention_heads"
        dim, heads = int(".o_proj." in name), getattr(layer.config, count)
        check_heads(layer.key(name), layer[name], dim, count=count, heads=heads, size=head_dim(layer.config))
        return layer[name]

    return make


def _rotary(name: str) -> Callable[[Layer], Tensor]:
    """Rows of each head from halves to pairs: HF rotates row i with i + head_dim / 2, torchtitan 2i with 2i + 1."""

    def make(layer: Layer) -> Tensor:
        weight, size = _heads(name)(layer), head_dim(layer.config)
        return weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    return make


def _latent(name: str, *parts: str) -> Callable[[Layer], Tensor]:
    """A projection of latent attention, of whose heads each is of the config's `parts` together."""

    def make(layer: Layer) -> Tensor:
        size, heads = sum(getattr(layer.config, part) for part in parts), layer.config.num_attention_heads
        dim = int(".o_proj." in name)
        check_heads(layer.key(name), layer[name], dim, count="num_attention_heads", heads=heads, size=size)
        return layer[name]

    return make


def _experts(projection: str) -> Callable[[Layer], Tensor]:
    """One projection of all experts: [experts, out, in]."""

    def make(layer: Layer) -> Tensor:
        count = _expert_count(layer.config)
        return torch.stack([layer[f"mlp.experts.{number}.{projection}.weight"] for number in range(count)])

    return make


def _no_bias(layer: Layer) -> Tensor:
    return torch.zeros(_expert_count(layer.config))


def _expert_count(config: Any) -> int:
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    return int(next(getattr(config, name) for name in names if getattr(config, name, None)))


def _transposed(name: str) -> Callable[[Layer], Tensor]:
    """[experts, in, out], as HF keeps gpt_oss where it is not quantised, to [experts, out, in]."""
    return lambda layer: layer[name].transpose(1, 2)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


_NORMS: Table = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_ATTENTION: Table = {
    "attention.qkv_linear.wq.weight": _heads("self_attn.q_proj.weight"),
    "attention.qkv_linear.wk.weight": _heads("self_attn.k_proj.weight"),
    "attention.qkv_linear.wv.weight": _heads("self_attn.v_proj.weight"),
    "attention.wo.weight": _heads("self_attn.o_proj.weight"),
}
_ATTENTION_BIASES: Table = {
    "attention.qkv_linear.wq.bias": "self_attn.q_proj.bias",
    "attention.qkv_linear.wk.bias": "self_attn.k_proj.bias",
    "attention.qkv_linear.wv.bias": "self_attn.v_proj.bias",
    "attention.wo.bias": "self_attn.o_proj.bias",
}
_ROTARY: Table = {
    "attention.qkv_linear.wq.weight": _rotary("self_attn.q_proj.weight"),
    "attention.qkv_linear.wk.weight": _rotary("self_attn.k_proj.weight"),
}
_QK_NORMS: Table = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
_LATENT_ATTENTION: Table = {
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": _latent("self_attn.kv_b_proj.weight", "qk_nope_head_dim", "v_head_dim"),
    "attention.wo.weight": _latent("self_attn.o_proj.weight", "v_head_dim"),
}
_LATENT_QUERY: Table = {
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": _latent("self_attn.q_b_proj.weight", "qk_nope_head_dim", "qk_rope_head_dim"),
}
_WHOLE_QUERY: Table = {
    "attention.wq.weight": _latent("self_attn.q_proj.weight", "qk_nope_head_dim", "qk_rope_head_dim"),
}
_DENSE: Table = {
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_EXPERTS: Table = {
    "moe.expert_bias_E": _no_bias,
    "moe.router.gate.weight": "mlp.gate.weight",
    "moe.routed_experts.inner_experts.w1_EFD": _experts("gate_proj"),
    "moe.routed_experts.inner_experts.w2_EDF": _experts("down_proj"),
    "moe.routed_experts.inner_experts.w3_EFD": _experts("up_proj"),
}
_SHARED_EXPERTS: Table = {
    "moe.expert_bias_E": "mlp.gate.e_score_correction_bias",
    "moe.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "moe.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "moe.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
_GPT_OSS: Table = {
    "attention.sinks": "self_attn.sinks",
    "moe.expert_bias_E": _no_bias,
    "moe.router.gate.weight": "mlp.router.weight",
    "moe.router.gate.bias": "mlp.router.bias",
    "moe.routed_experts.inner_experts.mlp1_weight_EGD": _transposed("mlp.experts.gate_up_proj"),
    "moe.routed_experts.inner_experts.mlp1_bias_EG": "mlp.experts.gate_up_proj_bias",
    "moe.routed_experts.inner_experts.mlp2_weight_EDF": _transposed("mlp.experts.down_proj"),
    "moe.routed_experts.inner_experts.mlp2_bias_ED": "mlp.experts.down_proj_bias",
}
"""torchtitan 0.3.0's own adapter has other names for the experts than its model, which so keeps its random ones."""
MTP: Table = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "mtp_norm.weight": "shared_head.norm.weight",
}
"""What a layer of multi-token prediction has besides."""


def _llama(_: Layer) -> Table:
    return {**_NORMS, **_ATTENTION, **_ROTARY, **_DENSE}


def _qwen3(layer: Layer) -> Table:
    return {**_NORMS, **_ATTENTION, **_QK_NORMS, **(_EXPERTS if "mlp.gate.weight" in layer else _DENSE)}


def _deepseek_v3(layer: Layer) -> Table:
    query = _LATENT_QUERY if layer.config.q_lora_rank else _WHOLE_QUERY
    sparse = layer.number >= layer.config.first_k_dense_replace
    return {**_NORMS, **_LATENT_ATTENTION, **query, **({**_EXPERTS, **_SHARED_EXPERTS} if sparse else _DENSE)}


def _gpt_oss(_: Layer) -> Table:
    return {**_NORMS, **_ATTENTION, **_ATTENTION_BIASES, **_GPT_OSS}


FAMILIES: Mapping[str, Callable[[Layer], Table]] = {
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3,
}


def family_of(model_type: str) -> Callable[[Layer], Table]:
    if model_type not in FAMILIES:
        raise unknown("torchtitan", model_type, FAMILIES)
    return FAMILIES[model_type]
