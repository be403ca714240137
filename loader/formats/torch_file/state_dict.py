"""Which of what was saved is the state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from loader.errors import CatalogError
from loader.formats.strict_json import quote
from loader.formats.torch_file.machine import Call, Dict
from loader.formats.torch_file.rebuilt import Strided, is_tensor, strided
from loader.formats.torch_file.storages import RESAVE, kind_of, text_of

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Where trainers keep a state dict beside their own things: Lightning, torch's tutorials, many, DeepSpeed."""


class StateDict(NamedTuple):
    """Its tensors in order; and what was left out of it, in words."""

    tensors: list[Strided]
    left_out: list[str]


def state_dict(value: Any, file: str) -> StateDict:
    """The tensors of what was saved: a state dict, or one beside other things, under a name as in NESTED.

    What is no tensor is left out. Raises CatalogError, naming file and key, where there is no state dict, and for
    tensors that cannot be loaded by ranges: quantized, sparse, lazily conjugated, ...
    """
    top = _by_name(value, file)
    nested = [name for name in NESTED if isinstance(top.get(name), Dict) and _tensors(_by_name(top[name], file))]
    left_out = []
    if nested:
        left_out = [f"{quote(name)}" for name in top if name != nested[0]]
        top = _by_name(top[nested[0]], file)
    tensors = _tensors(top)
    if not tensors and top:
        raise CatalogError(
            f"{file}: no tensors in it: expected a state dict, or one under {', '.join(NESTED)}; found "
            f"{_listed(top)}. Save model.state_dict() alone."
        )
    left_out += [f"{quote(name)} in the state dict" for name in top if name not in tensors]
    return StateDict([strided(key, tensor, file) for key, tensor in tensors.items()], left_out)


def _by_name(value: Any, file: str) -> dict[str, Any]:
    if not isinstance(value, Dict):
        raise CatalogError(f"{file}: expected a state dict, found {kind_of(value)}. Save model.state_dict().")
    found: dict[str, Any] = {}
    for key, item in value.pairs:
        name = text_of(key)
        if name is None and is_tensor(item):
            raise CatalogError(f"{file}: a tensor's key should be text, found {quote(key)}. {RESAVE}.")
        if name is not None and name in found:
            raise CatalogError(f"{file}: key {quote(name)} occurs twice. {RESAVE}.")
        found[name if name is not None else quote(key)] = item
    return found


def _tensors(values: Mapping[str, Any]) -> dict[str, Call]:
    return {name: value for name, value in values.items() if is_tensor(value)}


def _listed(values: Mapping[str, Any]) -> str:
    def told() -> Iterator[str]:
        for name, value in list(values.items())[:10]:
            inside = " of tensors" if isinstance(value, Dict) and any(is_tensor(v) for _, v in value.pairs) else ""
            yield f"{quote(name)} ({kind_of(value)}{inside})"

    return ", ".join(told()) or "nothing"
