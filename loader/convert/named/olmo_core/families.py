"""The model types that `convert: olmo_core` knows. A new one is one entry of `FAMILIES`.

A family is a table for one block: FQN (without "blocks.3.") to key (without "model.layers.3."), or to a function that
makes the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loader.convert.family import unknown
from loader.convert.named.olmo_core.blocks import (
    PERI_NORMS,
    PRE_NORMS,
    QK_NORMS,
    REORDERED_NORMS,
    attention,
    experts,
    experts_or_mlp,
    mlp,
)
from loader.convert.named.olmo_core.layer import Layer, Table
from loader.convert.named.olmo_core.olmo3moe import olmo3moe


@dataclass(frozen=True, slots=True)
class Family:
    """`block` gives a layer's table. `norms_less_one`: HF keeps a norm's weight w as w - 1, OLMo-core as it is."""

    block: Callable[[Layer], Table]
    norms_less_one: bool = False


_LLAMA = Family(lambda layer: attention(layer) | mlp(layer) | PRE_NORMS)
_OLMO = Family(lambda layer: attention(layer) | QK_NORMS | mlp(layer) | REORDERED_NORMS)
_GEMMA = Family(lambda layer: attention(layer) | QK_NORMS | mlp(layer) | PERI_NORMS, norms_less_one=True)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Family(lambda layer: attention(layer) | QK_NORMS | mlp(layer) | PRE_NORMS),
    "qwen3_moe": Family(lambda layer: attention(layer) | QK_NORMS | experts_or_mlp(layer) | PRE_NORMS),
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "olmoe": Family(lambda layer: attention(layer) | QK_NORMS | experts(layer) | PRE_NORMS),
    "flex_olmo": Family(lambda layer: attention(layer) | QK_NORMS | experts(layer) | REORDERED_NORMS),
    "olmo3moe": Family(olmo3moe),
}
"""By HF's model type."""


def family_of(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise unknown("olmo_core", model_type, FAMILIES)
    return FAMILIES[model_type]
