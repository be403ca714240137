"""Tied weights: one tensor under several FQNs in the model, in the checkpoint, in both, or in one of them alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from loader.convert.graph import Combine, Node, seen_in
from loader.errors import CoverageError


def join_ties(
    outputs: Mapping[str, Node], tensors: Iterable[Collection[str]], declared: Callable[[], Mapping[str, str]]
) -> dict[str, Node]:
    """The outputs, fitted to what is tied in the model; `tensors` are the FQNs of each of its tensors.

    A tensor with no source takes the output that the checkpoint's class ties it to, where its config says that it is
    tied (`declared()`: FQN to FQN). A tensor with two sources, from keys of their own, takes both: they must be equal,
    which is seen as they arrive.
    """
    found = dict(outputs)
    ties: Mapping[str, str] | None = None
    for names in tensors:
        known = [name for name in names if name in outputs]
        if not known:
            ties = declared() if ties is None else ties
            found |= {name: outputs[ties[name]] for name in names if ties.get(name) in outputs}
        elif len({frozenset(seen_in(outputs[name])) for name in known}) > 1:
            found |= dict.fromkeys(known, _equal(known, [outputs[name] for name in known]))
    return found


def _equal(names: list[str], nodes: list[Node]) -> Node:
    dtype = nodes[0].dtype
    if any((node.shape, node.dtype) != (nodes[0].shape, dtype) for node in nodes):
        raise _differ(names)
    return Combine(nodes[0].shape, dtype, tuple(nodes), partial(_first_of_equals, names))


def _first_of_equals(names: list[str], first: Tensor, *others: Tensor) -> Tensor:
    bits = [tensor.flatten().view(torch.uint8) for tensor in (first, *others)]
    if not all(torch.equal(bits[0], each) for each in bits[1:]):
        raise _differ(names)
    return first


def _differ(names: list[str]) -> CoverageError:
    return CoverageError(
        f"{' = '.join(names)}: one tensor in the model, and in the checkpoint several that differ. Untie the model "
        "(for the transformers builder: tie_word_embeddings: false in config.json), or leave out what is not wanted "
        "with source.ignore"
    )
