"""olmo3moe: its blocks differ by layer and by option."""

from __future__ import annotations

from functools import partial

import torch

from loader.convert.named.olmo_core.blocks import QK_NORMS, REORDERED_NORMS, attention, mlp
from loader.convert.named.olmo_core.layer import Layer, Table


def olmo3moe(layer: Layer) -> Table:
    kinds: list[str] = getattr(layer.config, "layer_types", None) or []
    dense: list[int] = getattr(layer.config, "dense_layers_indices", None) or []
    linear = bool(kinds) and kinds[layer.number] == "linear_attention"
    table = (_linear_attention() if linear else _gated_attention(layer)) | REORDERED_NORMS
    if layer.has("use_peri_ln"):
        for half in ("attention", "feed_forward"):
            table[f"{half}_input_norm.weight"] = f"pre_{half.replace('_', '')}_layernorm.weight"
    if layer.number in dense:
        return table | (_shared(layer, "mlp.") if layer.has("dense_layers_use_shared_expert") else mlp(layer))
    table |= _routed(layer)
    if layer.has("shared_expert_intermediate_size"):
        table |= _shared(layer, "mlp.shared_expert.")
    return table


def _linear_attention() -> Table:
    """Kimi delta attention: its projections renamed as elsewhere, the rest as HF has it."""
    renamed = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_b": "beta_proj", "w_out": "o_proj"}
    same = ("f_proj_1", "f_proj_2", "g_proj_1", "g_proj_2", "q_conv1d", "k_conv1d", "v_conv1d", "o_norm")
    whole = ("A_log", "dt_bias", "g_proj_2.bias", *(f"{name}.weight" for name in same))
    table: Table = {f"attention.{name}.weight": f"self_attn.{key}.weight" for name, key in renamed.items()}
    return table | {f"attention.{name}": f"self_attn.{name}" for name in whole}


def _gated_attention(layer: Layer) -> Table:
    table = attention(layer) | QK_NORMS
    if layer.has("attention_gate_type"):
        table["attention.w_g.weight"] = "self_attn.g_proj.weight"
    if layer.has("scalable_softmax"):
        table["attention.ssmax_scale"] = "self_attn.ssmax_scale"
    return table


def _routed(layer: Layer) -> Table:
    """Experts stacked: [experts, 2 * hidden_size, d_model], up before gate, and [experts, hidden_size, d_model]."""
    stacked = partial(layer.experts, count="n_routed_experts")
    table: Table = {
        "routed_experts_router.weight": partial(layer.flat, "mlp.router.gate.weight"),
        "routed_experts.w_up_gate": lambda: torch.cat(
            [torch.stack(stacked(key)) for key in ("up_proj", "gate_proj")], dim=1
        ),
        "routed_experts.w_down": lambda: torch.stack([part.t() for part in stacked("down_proj")]),
    }
    if layer.has("latent_moe_dim"):
        kinds = ("weight", "bias") if layer.has("latent_moe_bias") else ("weight",)
        names = [f"latent_{way}_proj.{kind}" for way in ("down", "up") for kind in kinds]
        if layer.has("latent_moe_up_proj_input_norm"):
            names.append("latent_up_proj_input_norm.weight")
        table |= {name: f"mlp.{name}" for name in names}
    return table


def _shared(layer: Layer, prefix: str) -> Table:
    """One expert for all tokens, or a dense MLP as one: [d_model, 2 * hidden_size], up before gate, all turned."""
    return {
        "shared_experts.w_up_gate": lambda: torch.cat(
            [layer[f"{prefix}{key}.weight"].t() for key in ("up_proj", "gate_proj")], dim=1
        ),
        "shared_experts.w_down": lambda: layer[f"{prefix}down_proj.weight"].t().unsqueeze(0),
    }
