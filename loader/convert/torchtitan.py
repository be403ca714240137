"""From Hugging Face's layout to torchtitan's: what its models and its checkpoints hold, for each model type.

A family is a table from torchtitan's names within a layer to the key they come from, or to a function that makes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loader.errors import ConversionError


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


def convert(checkpoint: Mapping[str, Tensor], hf_config: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict of torchtitan's model of this type, in the checkpoint's dtypes; q, k and v apart.

    llama is torchtitan's llama3, its q and k rows reordered for complex rotary embeddings; qwen3, qwen3_moe, gpt_oss
    (not quantised) and deepseek_v3 (with the checkpoint's MTP layers) are themselves, experts stacked. A tied lm_head
    is there under both names. A load-balancing bias that the checkpoint lacks is zeros, as in a new model. Raises
    ConversionError for another model type, a key that is missing, and heads that do not fit.
    """
    family = _family(hf_config.model_type)
    yield "tok_embeddings.weight", checkpoint["model.embed_tokens.weight"]
    for number in range(hf_config.num_hidden_layers):
        yield from _layer(family, Layer(checkpoint, hf_config, number), f"layers.{number}.", {})
    number = hf_config.num_hidden_layers
    while "eh_proj.weight" in (layer := Layer(checkpoint, hf_config, number)):  # multi-token prediction, last
        yield from _layer(family, layer, f"mtp_layers.{number - hf_config.num_hidden_layers}.", _MTP)
        number += 1
    yield "norm.weight", checkpoint["model.norm.weight"]
    tied = hf_config.tie_word_embeddings and "lm_head.weight" not in checkpoint
    yield "lm_head.weight", checkpoint["model.embed_tokens.weight" if tied else "lm_head.weight"]


def convert_fused(checkpoint: Mapping[str, Tensor], hf_config: Any) -> Iterator[tuple[str, Tensor]]:
    """As `convert`, with q, k and v as the one parameter `wqkv` of models built with torchtitan's `fuse_qkv`.

    Its rows are, for each key-value head: the query heads that share it, then it, then its values.
    """
    waiting: list[Tensor] = []
    for fqn, tensor in convert(checkpoint, hf_config):
        if ".qkv_linear." not in fqn:
            yield fqn, tensor
            continue
        waiting.append(tensor.view(hf_config.num_key_value_heads, -1, _head_dim(hf_config), *tensor.shape[1:]))
        if len(waiting) == 3:
            yield fqn.replace(".wv.", ".wqkv."), torch.cat(waiting, dim=1).flatten(0, 2)
            waiting = []


def _layer(family: Callable[[Layer], Table], layer: Layer, prefix: str, more: Table) -> Iterator[tuple[str, Tensor]]:
    for fqn, source in {**family(layer), **more}.items():
        yield prefix + fqn, layer[source] if isinstance(source, str) else source(layer)


def _rotary(name: str) -> Callable[[Layer], Tensor]:
    """Rows of each head from halves to pairs: HF rotates row i with i + head_dim / 2, torchtitan 2i with 2i + 1."""

    def make(layer: Layer) -> Tensor:
        weight, head_dim = layer[name], _head_dim(layer.config)
        heads = layer.config.num_attention_heads if ".q_proj." in name else layer.config.num_key_value_heads
        if weight.shape[0] != heads * head_dim:
            raise ConversionError(
                f"{layer.key(name)} is {list(weight.shape)}; the config's {heads} heads of {head_dim} take "
                f"{heads * head_dim} rows: is it the checkpoint of this config?"
            )
        return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)

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


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


_NORMS: Table = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_ATTENTION: Table = {
    "attention.qkv_linear.wq.weight": "self_attn.q_proj.weight",
    "attention.qkv_linear.wk.weight": "self_attn.k_proj.weight",
    "attention.qkv_linear.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
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
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
}
_LATENT_QUERY: Table = {
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
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
_MTP: Table = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "mtp_norm.weight": "shared_head.norm.weight",
}


def _llama(_: Layer) -> Table:
    return {**_NORMS, **_ATTENTION, **_ROTARY, **_DENSE}


def _qwen3(layer: Layer) -> Table:
    return {**_NORMS, **_ATTENTION, **_QK_NORMS, **(_EXPERTS if "mlp.gate.weight" in layer else _DENSE)}


def _deepseek_v3(layer: Layer) -> Table:
    query = _LATENT_QUERY if layer.config.q_lora_rank else {"attention.wq.weight": "self_attn.q_proj.weight"}
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


def _family(model_type: str) -> Callable[[Layer], Table]:
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f" (the nearest is {near[0]})" if near else ""
    raise ConversionError(
        f"convert: torchtitan knows {', '.join(FAMILIES)}, not model_type {model_type!r}{hint}: "
        'write convert: "package.module:function" for it'
    )
