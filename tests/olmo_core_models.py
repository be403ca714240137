"""Tiny random HF checkpoints of the model types that `convert: olmo_core` knows, and OLMo-core's models for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_OLMO3MOE = {
    "model_type": "olmo3moe",
    "attention_hidden_size": 64,
    "head_dim": 16,
    "dense_mlp_intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "dense_layers_indices": [0],
    "layer_types": ["full_attention"] * 3,
    "sliding_window": 8,
    "use_head_qk_norm": True,
}
_EVERYTHING = {
    "dense_layers_use_shared_expert": True,
    "use_peri_ln": True,
    "embed_norm": True,
    "latent_moe_dim": 18,
    "latent_moe_bias": True,
    "latent_moe_up_proj_input_norm": True,
    "attention_gate_type": "elementwise",
    "scalable_softmax": True,
    "use_cache": False,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_MOE, "head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "qwen3_moe, some layers dense": {**_MOE, "head_dim": 8, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {**_MOE, "intermediate_size": 24},
    "flex_olmo": {**_MOE, "intermediate_size": 24},
    "olmo3moe": _OLMO3MOE,
    "olmo3moe, every option": {**_OLMO3MOE, **_EVERYTHING},
}
"""What each differs in from `SMALL`. Its model type is what stands before the comma."""


def hf_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Every parameter random: a norm's as well, for norms of ones would pass for each other."""
    if name.startswith("olmo3moe"):
        from olmo_core.nn.moe.v2.hf.configuration_olmo3moe import Olmo3MoeConfig
        from olmo_core.nn.moe.v2.hf.modeling_olmo3moe import Olmo3MoeForCausalLM

        config: PreTrainedConfig = Olmo3MoeConfig(**{**SMALL, **MODELS[name]})
        model = Olmo3MoeForCausalLM(config)
    else:
        config = AutoConfig.for_model(name.partition(",")[0], **{**SMALL, **MODELS[name]})
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(len(name))
    for parameter in model.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return model.eval()


def save(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], PreTrainedConfig]:
    """As transformers saves it. Returns the checkpoint's tensors, and its config."""
    model = hf_model(name, dtype)
    model.save_pretrained(directory, max_shard_size="40KB")
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors, model.config


def linear_attention(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """An olmo3moe checkpoint with that layer's attention made linear: its model class wants a GPU's kernels."""
    prefix = f"model.layers.{layer}.self_attn."
    names = ["A_log", "dt_bias", "g_proj_2.bias"]
    names += [f"{x}_{kind}.weight" for x in "qkv" for kind in ("proj", "conv1d")]
    names += [f"{x}_proj_{number}.weight" for x in "fg" for number in (1, 2)]
    names += ["beta_proj.weight", "o_norm.weight", "o_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    made = {f"{prefix}{name}": torch.randn(6, 4, generator=generator) for name in names}
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)} | made


def olmo_core_model(hf: PreTrainedConfig, *, dropless: bool = False) -> nn.Module:
    """OLMo-core's model of the HF config's sizes and scheme, in float32, its weights anything."""
    from olmo_core.nn.transformer import TransformerConfig

    common = {
        "d_model": hf.hidden_size,
        "vocab_size": hf.vocab_size,
        "n_layers": hf.num_hidden_layers,
        "n_heads": hf.num_attention_heads,
        "n_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None),
        "layer_norm_eps": hf.rms_norm_eps,
        "tie_word_embeddings": hf.tie_word_embeddings,
    }
    if hf.model_type == "gemma3_text":
        config = TransformerConfig.gemma3_like(
            **common,
            hidden_size=hf.intermediate_size,
            local_window_size=hf.sliding_window,
            local_rope_theta=hf.rope_parameters["sliding_attention"]["rope_theta"],
            global_rope_theta=hf.rope_parameters["full_attention"]["rope_theta"],
        )
    else:
        config = _llama_like(hf, common, dropless=dropless)
    model = config.build(init_device="cpu").eval()
    for block in model.blocks.values():
        if hasattr(block, "feed_forward_moe"):
            experts = block.feed_forward_moe.experts
            experts.forward = functools.partial(_all_experts, experts.mlp)
    return model


def _llama_like(hf: PreTrainedConfig, common: dict[str, Any], *, dropless: bool) -> Any:
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig, TransformerType

    moe = "num_experts_per_tok" in hf.to_dict()
    reordered = hf.model_type in ("olmo2", "olmo3", "flex_olmo")
    kind = ("moe_" if moe else "") + "reordered_norm" if reordered else "moe" if moe else "default"
    feed_forward: dict[str, Any] = {"feed_forward": FeedForwardConfig(hf.intermediate_size, bias=False)}
    if moe:
        router = MoERouterConfig(
            top_k=hf.num_experts_per_tok, normalize_expert_weights=1.0 if hf.norm_topk_prob else None
        )
        hidden = hf.moe_intermediate_size if hf.model_type == "qwen3_moe" else hf.intermediate_size
        name = MoEType.dropless if dropless else MoEType.default
        feed_forward = {
            "feed_forward_moe": MoEConfig(name, num_experts=hf.num_experts, hidden_size=hidden, router=router),
            "name": TransformerType.moe,
        }
    config = TransformerConfig.llama_like(
        **common,
        **feed_forward,
        rope_theta=hf.rope_parameters.get("full_attention", hf.rope_parameters)["rope_theta"],
        block_name=TransformerBlockType(kind),
        qk_norm=hf.model_type not in ("llama", "mistral", "qwen2"),
        use_head_qk_norm=hf.model_type.startswith("qwen3"),
    )
    config.block.sequence_mixer.bias = hf.model_type == "qwen2" or getattr(hf, "attention_bias", False)
    if not moe:
        config.block.feed_forward.bias = getattr(hf, "mlp_bias", False)
    return config


def _all_experts(mlp: nn.Module, x: Tensor, weights: Tensor, indices: Tensor, _: Tensor) -> Tensor:
    """What OLMo-core's kernels, which want a GPU, do: here its own experts and its own router, without dispatch."""
    flat = x.view(-1, x.shape[-1])
    count, size = mlp.num_experts, flat.shape[0]
    if type(mlp).__name__ == "DroplessMoEMLP":
        made = mlp(flat.repeat(count, 1), torch.full((count,), size)).view(count, size, -1)
    else:
        made = mlp(flat.expand(count, size, -1))
    chosen = torch.zeros(size, count).scatter_add(1, indices.view(size, -1), weights.view(size, -1))
    return torch.einsum("ne,end->nd", chosen, made).view_as(x)
