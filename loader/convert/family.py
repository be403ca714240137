"""What the conversions by model type have in common: how they say what does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from loader.convert.lazy import OutputError
from loader.errors import ConversionError


@contextmanager
def making(fqn: str) -> Iterator[None]:
    """An error in it is told as `fqn`'s."""
    try:
        yield
    except ConversionError as error:
        raise OutputError(f"{fqn}: {error.message}") from error


def unknown(convert: str, model_type: str, known: Collection[str]) -> ConversionError:
    near = difflib.get_close_matches(model_type, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    found = f"model_type {model_type!r}" if model_type else "no model_type"
    return ConversionError(
        f"config.json has {found}, and convert: {convert} knows {', '.join(known)}{hint}. "
        'Write a function for it and name that: convert: "package.module:function"'
    )


def check_heads(key: str, tensor: Tensor, dim: int, *, count: str, heads: int, size: int) -> None:
    """Raise ConversionError unless `dim` of the key's tensor is that of `heads` heads, the config's `count`."""
    if tensor.shape[dim] != heads * size:
        raise ConversionError(
            f"key {key} is {list(tensor.shape)}, but the config's {count} {heads}, of {size} each, make its dim {dim} "
            f"{heads * size} long: is it the checkpoint of this config?"
        )


def head_key(checkpoint: Mapping[str, Tensor], config: Any, head: str, embeddings: str) -> str:
    """The key of the output projection: that of the embeddings where the config ties them and there is no other."""
    if head in checkpoint:
        return head
    if getattr(config, "tie_word_embeddings", False):
        return embeddings
    raise ConversionError(
        f"the checkpoint has no key {head!r}, and its config does not tie it to {embeddings} "
        "(tie_word_embeddings): is a file missing, or is config.json that of another model?"
    )
