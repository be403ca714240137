"""Quantised checkpoints: each quantised weight and its scales, seen as one tensor. A module for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loader.convert.graph import Node, dequantises, keys_of
from loader.convert.quantised import mxfp4, scaled
from loader.errors import ConversionError
from loader.formats.strict_json import quote

_FIELDS = ("quantization_config", "compression_config")
"""Where config.json tells of it; the second is compressed-tensors' old name."""

_SCHEMES = {"fp8": scaled.block_scaled, "compressed-tensors": scaled.compressed_tensors, "mxfp4": mxfp4.weights}


def quantisation(hf_config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What config.json says of the quantisation, for the model or for its text tower; None where it says nothing."""
    fields = hf_config or {}
    for owner in (fields, fields.get("text_config") or {}):
        for name in _FIELDS:
            if owner.get(name):
                found: Mapping[str, Any] = owner[name]
                return found
    return None


def unquantised(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model without quantisation."""
    fields = {name: value for name, value in hf_config.items() if name not in _FIELDS}
    if isinstance(fields.get("text_config"), Mapping):
        fields["text_config"] = {k: v for k, v in fields["text_config"].items() if k not in _FIELDS}
    return fields


def dequantise(keys: Mapping[str, Node], config: Mapping[str, Any]) -> dict[str, Node]:
    """The keys, each quantised weight in float32 in place of what it is stored as; `config` is `quantisation`'s.

    A weight's scales are seen no more: they are needs of the weight. Scales of activations and of caches beside it are
    left out, since a model that computes in full precision has no use for them; so are zero points, which are zero for
    all that is read here. What only looks like a scale stays, for the proof of coverage to find. Raises ConversionError
    for a quantisation that is not known, for a quantised weight without scales, and where shapes do not fit.
    """
    method = config.get("quant_method", "compressed-tensors" if "config_groups" in config else None)
    if not isinstance(method, str) or method not in _SCHEMES:
        how = (
            f"that the checkpoint is quantised as {quote(method)}"
            if method
            else "of a quantization_config, and no quant_method"
        )
        raise ConversionError(
            f"config.json tells {how}; {', '.join(_SCHEMES)} can be dequantised. Use a checkpoint that is not "
            "quantised, or keep it as it is with model.dequantize: false"
        )
    made = {weight.stored[0]: weight for weight in _SCHEMES[method](keys, config)}
    names = {weight.name for weight in made.values()}
    gone = {name for weight in made.values() for name in (*weight.stored, *weight.needless)}
    seen: dict[str, Node] = {}
    for key, node in keys.items():
        if key in made:
            seen[made[key].name] = made[key].node
        elif key not in gone:
            if key in names:
                raise ConversionError(f"{key} is there, and quantised too: leave one of them out by source.ignore")
            seen[key] = node
    return seen


def undeclared(keys: Mapping[str, Node]) -> str | None:
    """Why keys of which config.json says nothing cannot be plain weights; None where they can.

    Float8 alone may be what somebody computes with. With scales beside it, its values are not the weight's.
    """
    for key, node in keys.items():
        ends = ("_scale_inv", "_scale") if scaled.is_float8(node.dtype) else ()
        if scales := next((key + end for end in ends if key + end in keys), None):
            return (
                f"{key} is {node.dtype}, with {scales} beside it, but config.json has no quantization_config: put it "
                "back as it was published, or keep both as they are stored with model.dequantize: false"
            )
    return None


def dtype_of(node: Node, hf_config: Mapping[str, Any] | None) -> torch.dtype:
    """An output's dtype where nobody asks for another: its own, and of what was dequantised the config's.

    That is `dtype` or `torch_dtype` of config.json, bfloat16 where it names none.
    """
    if node.dtype != torch.float32 or not dequantises(node):
        return node.dtype
    fields = hf_config or {}
    for owner in (fields, fields.get("text_config") or {}):
        for name in ("dtype", "torch_dtype"):
            found = getattr(torch, str(owner.get(name)).removeprefix("torch."), None)
            if isinstance(found, torch.dtype):
                return found
    return torch.bfloat16


def is_packed(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype mean nothing without their scales: one byte, or several weights in an int32."""
    return dtype == torch.int32 or (dtype.itemsize == 1 and dtype != torch.bool)


def quantised_keys(keys: Mapping[str, Node]) -> set[int]:
    """Positions of keys that are packed or beside such in their module: scales, zero points, biases."""
    packed = {name for name, node in keys.items() if is_packed(node.dtype)}
    modules = {name.rpartition(".")[0] for name in packed} | packed  # bitsandbytes has weight.absmax beside weight
    return set(keys_of(*(node for name, node in keys.items() if name.rpartition(".")[0] in modules)))
