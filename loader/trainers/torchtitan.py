"""For torchtitan: a model, in its parts, filled from a bucket through torchtitan's own state-dict adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loader.convert.lazy import needless
from loader.convert.named import torchtitan
from loader.library import load
from loader.place.targets import clean_fqn, tensors_of_module
from loader.report import Report


def load_hf_checkpoint(
    model_parts: nn.Module | Sequence[nn.Module], uri: str, adapter: Any = None, **options: Any
) -> Report:
    """Fill a torchtitan model, parallelised and with memory, from a checkpoint in Hugging Face layout.

    `model_parts` are this rank's pipeline stages, or one model. `adapter` is a `StateDictAdapter` of torchtitan, whose
    `from_hf` is traced as it is; None takes `loader.convert.named.torchtitan`, which knows the same families. What
    modules do to a state dict that they load (a fused `wqkv` from q, k and v) is done here too. `options` are those of
    `loader.load`. Collective; returns and raises as `loader.load` does, ConversionError for what the adapter raises.
    """
    parts = [model_parts] if isinstance(model_parts, nn.Module) else list(model_parts)
    target = {fqn: tensor for part in parts for fqn, tensor in tensors_of_module(part)}

    @needless(torchtitan.prediction_layers)
    def convert(checkpoint: Mapping[str, Tensor], hf_config: Any) -> dict[str, Tensor]:
        if adapter is None:
            state = dict(torchtitan.convert(checkpoint, hf_config))
        else:
            fresh = type(adapter)(
                adapter.model_config, None
            )  # one that has seen `to_hf` expects this rank's experts alone
            predicting = any(fqn.startswith("mtp_layers.") for fqn in target)
            endings = torchtitan.COPIES if predicting else ("",)  # adapters refuse a key that the model lacks
            left = [key for key in torchtitan.prediction_layers(checkpoint, hf_config) if key.endswith(endings)]
            state = fresh.from_hf({key: tensor for key, tensor in checkpoint.items() if key not in left})
        for fqn, tensor in target.items():
            if fqn.endswith(".expert_bias_E"):  # adapters leave it out where the checkpoint has none
                state.setdefault(fqn, torch.zeros(tensor.shape))
        return _as_loaded(parts, state)

    return load(target, uri, convert=convert, **options)


def _as_loaded(parts: Iterable[nn.Module], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict after the hooks that run before `load_state_dict`: they rename and fuse."""
    for part in parts:
        for name, module in part.named_modules():
            for hook in module._load_state_dict_pre_hooks.values():  # noqa: SLF001 - torch has no other way to ask
                hook(state, f"{name}." if name else "", {}, True, [], [], [])
    return {clean_fqn(fqn): tensor for fqn, tensor in state.items()}
