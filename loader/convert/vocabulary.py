"""Embeddings and heads with more rows than the checkpoint's, or fewer: padded with zeros or cut, where allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from loader.convert.graph import Cat, Constant, Node, Shape, Slice
from loader.errors import CoverageError


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What may be done to the rows of the vocabulary.

    `fqns` are the tensors with a row for each token; where nobody knows them, None, it is those whose output has
    `size` rows, the config's `vocab_size`.
    """

    pad: bool = False
    cut: bool = False
    fqns: Collection[str] | None = None
    size: int | None = None

    def has(self, fqn: str, node: Node) -> bool:
        return node.shape[0] == self.size if self.fqns is None else fqn in self.fqns


def fit_vocabulary(
    outputs: Mapping[str, Node], shapes: Mapping[str, Shape], vocabulary: Vocabulary
) -> Mapping[str, Node]:
    """The outputs, those of the vocabulary with as many rows as `shapes` has for their FQNs.

    Raises CoverageError, with the key that would allow it, where rows are to be added or cut and may not be.
    """
    fitted = {}
    for fqn, shape in shapes.items():
        node = outputs.get(fqn)
        if node is None or not shape or node.shape[1:] != shape[1:] or node.shape[:1] in {(), shape[:1]}:
            continue
        if vocabulary.has(fqn, node):
            fitted[fqn] = _fit(fqn, node, shape, vocabulary)
    return {**outputs, **fitted}


def _fit(fqn: str, node: Node, shape: Shape, vocabulary: Vocabulary) -> Node:
    more = shape[0] - node.shape[0]
    if not (vocabulary.pad if more > 0 else vocabulary.cut):
        key, what = ("pad", f"add {more} rows of zeros") if more > 0 else ("cut", f"leave out the last {-more} rows")
        raise CoverageError(
            f"{fqn}: the model's shape is {list(shape)}, the checkpoint's {list(node.shape)}: another vocabulary. "
            f"model.vocabulary.{key}: true would {what}"
        )
    if more < 0:
        return Slice(shape, node.dtype, node, 0, 0)
    rest = (more, *shape[1:])
    zeros = Constant(rest, node.dtype, torch.zeros((), dtype=node.dtype).expand(rest))
    return Cat(shape, node.dtype, (node, zeros), 0)
