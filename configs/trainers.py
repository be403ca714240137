"""Builders for the configs beside it: `builder(hf_config, mesh)` gives a model on meta, sharded as it is trained.

They are examples: a trainer has its own, with its own parallelism. Nothing here is imported by the loader itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def olmo_core_config(hf_config: Any, **more: Any) -> Any:
    """OLMo-core's `TransformerConfig` of an HF Llama's sizes, and `more`."""
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerConfig

    sizes = {
        "d_model": hf_config.hidden_size,
        "vocab_size": hf_config.vocab_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_heads": hf_config.num_attention_heads,
        "n_kv_heads": hf_config.num_key_value_heads,
        "head_dim": hf_config.head_dim,
        "rope_theta": hf_config.rope_parameters["rope_theta"],
        "layer_norm_eps": hf_config.rms_norm_eps,
        "feed_forward": FeedForwardConfig(hf_config.intermediate_size, bias=False),
    }
    return TransformerConfig.llama_like(**{**sizes, **more})


def olmo_core(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """OLMo-core's model of an HF Llama's sizes, under FSDP."""
    model = olmo_core_config(hf_config).build(init_device="meta")
    return _sharded(model, list(model.blocks.values()), mesh)


def olmo_core_moe(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """OLMo-core's model of an HF Qwen3-MoE's sizes: experts over dp_shard, all else HSDP, by its own methods.

    OLMo-core calls these when it is given a mesh; here the mesh is the config's. Its experts compute on GPUs alone.
    """
    from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType
    from olmo_core.nn.transformer import TransformerBlockType, TransformerType

    weights = 1.0 if hf_config.norm_topk_prob else None
    experts = MoEConfig(
        MoEType.dropless,
        num_experts=hf_config.num_experts,
        hidden_size=hf_config.moe_intermediate_size,
        router=MoERouterConfig(top_k=hf_config.num_experts_per_tok, normalize_expert_weights=weights),
    )
    config = olmo_core_config(
        hf_config,
        name=TransformerType.moe,
        block_name=TransformerBlockType.moe,
        feed_forward=None,
        feed_forward_moe=experts,
        qk_norm=True,
        use_head_qk_norm=True,
    )
    model = config.build(init_device="meta")
    model.apply_ep(mesh["dp_shard"])
    model.prepare_experts_for_fsdp(mesh)
    model.apply_fsdp(dp_mesh=mesh)
    return model


TORCHTITANS = {(256, 6): "debugmodel", (2048, 16): "1B", (3072, 28): "3B", (4096, 32): "8B", (8192, 80): "70B"}
"""torchtitan's flavors of llama3, by their width and number of layers."""


def torchtitan(hf_config: Any, mesh: DeviceMesh) -> nn.Module:
    """Torchtitan's llama3, of the flavor that has the checkpoint's sizes. All have q, k and v in one parameter."""
    from torchtitan.models import llama3

    spec = llama3.model_registry(TORCHTITANS[hf_config.hidden_size, hf_config.num_hidden_layers])
    with torch.device("meta"):
        model = spec.model.build()

    def init_buffers(device: torch.device) -> None:
        for module in model.modules():
            if hasattr(module, "_init_self_buffers"):
                module._init_self_buffers(buffer_device=device)  # noqa: SLF001 - its `init_states` fills the weights as well

    model.init_buffers = init_buffers
    return _sharded(model, list(model.layers.values()), mesh)


def _sharded(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> nn.Module:
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
