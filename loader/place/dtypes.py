"""Dtypes by rules over FQNs: routers and norms in float32, say, in a model of bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from loader.place.targets import tensors_of_module

DtypeRule = tuple[str, torch.dtype]
"""A glob over FQNs, and the dtype of the floating tensors that it matches."""


def dtype_by_rule(fqn: str, rules: Sequence[DtypeRule]) -> torch.dtype | None:
    """What the first rule that matches says; None where none does."""
    return next((dtype for glob, dtype in rules if fnmatchcase(fqn, glob)), None)


def cast_by_rules(module: nn.Module, rules: Sequence[DtypeRule]) -> None:
    """Cast each floating parameter and persistent buffer that a rule matches; a tied one goes by its first name.

    Parameters keep their identity, and so their ties and FSDP2's hold on them.
    """
    wanted: dict[int, torch.dtype] = {}
    for fqn, tensor in tensors_of_module(module):
        dtype = dtype_by_rule(fqn, rules)
        wanted.setdefault(id(tensor), dtype if dtype and tensor.is_floating_point() else tensor.dtype)
    module._apply(lambda tensor: tensor.to(wanted.get(id(tensor), tensor.dtype)))  # type: ignore[no-untyped-call]  # noqa: SLF001 - as `Module.to` does
