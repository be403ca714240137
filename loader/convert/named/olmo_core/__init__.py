"""`convert: olmo_core`: from HF's names and layouts to those of OLMo-core 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from loader.convert.family import head_key, making
from loader.convert.named.olmo_core.families import Family, family_of
from loader.convert.named.olmo_core.layer import Layer, Table

__all__ = ["convert", "convert_dropless"]


def convert(
    checkpoint: Mapping[str, Tensor], hf_config: Any, *, dropless: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield OLMo-core's FQNs and their tensors, each in its key's dtype.

    Bit for bit what OLMo-core's `convert_state_from_hf` makes where that is right. Of model types that it does not list
    (mistral, qwen2, qwen3_moe, olmoe) it gives two norms one name: here each stands where the HF model has it. Gemma's
    norms are `weight + 1.0` in the key's dtype, as there: in bfloat16 the sum is rounded. `lm_head.w_out.weight` is
    made from the embedding where the config ties them. Experts are [experts * d_model, hidden_size], as OLMo-core's
    `MoEMLP` has them; `dropless` makes w1 and w3 [experts * hidden_size, d_model] for its `DroplessMoEMLP`, which
    OLMo-core's own conversion does not fit.

    Raises ConversionError for a model type that is not in `FAMILIES`, a missing key, and shapes that are not the
    config's.
    """
    family = family_of(hf_config.model_type)
    config = getattr(hf_config, "text_config", None) or hf_config
    root = _root(checkpoint)
    whole = Layer(checkpoint, "", config, -1, dropless)
    yield from _outputs("", _ends(root, whole), whole, family)
    for number in range(config.num_hidden_layers):
        layer = Layer(checkpoint, f"{root}layers.{number}.", config, number, dropless)
        yield from _outputs(f"blocks.{number}.", family.block(layer), layer, family)


convert_dropless = partial(convert, dropless=True)
"""As `convert`, for an OLMo-core model whose experts are dropless."""


def _outputs(prefix: str, table: Table, layer: Layer, family: Family) -> Iterator[tuple[str, Tensor]]:
    for name, source in table.items():
        with making(prefix + name):
            tensor = layer[source] if isinstance(source, str) else source()
        yield prefix + name, tensor + 1.0 if family.norms_less_one and name.endswith("norm.weight") else tensor


def _root(checkpoint: Mapping[str, Tensor]) -> str:
    """The prefix of the text model's keys: a model of images and text has it one level down."""
    roots = ("model.", "model.language_model.", "language_model.model.")
    return next((root for root in roots if f"{root}embed_tokens.weight" in checkpoint), roots[0])


def _ends(root: str, whole: Layer) -> Table:
    """Before the first block and after the last."""
    head = "language_model.lm_head.weight" if root.startswith("language_model.") else "lm_head.weight"
    table: Table = {
        "embeddings.weight": f"{root}embed_tokens.weight",
        "lm_head.norm.weight": f"{root}norm.weight",
        "lm_head.w_out.weight": lambda: whole[
            head_key(whole.checkpoint, whole.config, head, f"{root}embed_tokens.weight")
        ],
    }
    if whole.has("embed_norm"):
        table["embedding_norm.weight"] = f"{root}embed_norm.weight"
    return table
