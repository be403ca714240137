"""For OLMo-core: `load_hf_model`, with the signature of its own, filling every rank's own shards from a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from loader.convert import olmo_core
from loader.errors import CatalogError, ConfigError
from loader.library import load

_LATER = "names on the Hugging Face Hub are not read yet: copy the model into a bucket or a directory, and name that"
_VOCABULARY = ("embeddings.weight", "lm_head.w_out.weight")


def load_hf_model(
    model_name_or_path: str | PathLike[str],
    model_state_dict: Mapping[str, Any],
    *,
    revision: str = "main",
    model_id: str | None = None,
    num_embeddings: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    work_dir: str | PathLike[str] | None = None,
) -> None:
    """Fill an OLMo-core model's state dict, its DTensors in place, from a checkpoint in Hugging Face layout.

    `model_name_or_path` is a directory, or a URL of one, on any fsspec scheme. `num_embeddings` is the model's number
    of vocabulary rows, where it is not the checkpoint's: rows beyond are not read, rows that lack are zeros (where
    OLMo-core's are what transformers draws for them). For other arguments of `loader.load`, call that with
    `convert="olmo_core"`.

    Not needed, and taken for the signature's sake: `work_dir`, for nothing is downloaded; `model_id`, which is
    deprecated; `revision`, for a bucket has none; `process_group`, for it must be all ranks.

    Collective over the default process group. Every tensor of the state dict is filled or the load fails, and none may
    be on meta: OLMo-core leaves what it has no weights for as it is. Raises ConfigError for a Hub name in a URL and for
    a smaller process group, and what `loader.load` raises.
    """
    del revision, model_id, work_dir
    uri = fspath(model_name_or_path)
    if uri.startswith("hf://"):
        raise ConfigError(f"{uri}: {_LATER}")
    if process_group is not None and dist.get_world_size(process_group) != dist.get_world_size():
        raise ConfigError(
            f"process_group has {dist.get_world_size(process_group)} of {dist.get_world_size()} ranks: all ranks load "
            "together; leave it out"
        )

    def convert(checkpoint: Mapping[str, Tensor], hf_config: Any) -> Iterator[tuple[str, Tensor]]:
        for fqn, tensor in olmo_core.convert(checkpoint, hf_config):
            yield fqn, tensor if num_embeddings is None or fqn not in _VOCABULARY else _rows(tensor, num_embeddings)

    try:
        load(model_state_dict, uri, convert=convert)
    except CatalogError as error:
        if "://" in uri:
            raise
        raise CatalogError(f"{error.message}. If {uri} is a model's name: {_LATER}", rank=error.rank) from error


def _rows(tensor: Tensor, count: int) -> Tensor:
    """The first `count` rows, zeros where there are no more."""
    return tensor[:count] if count <= len(tensor) else pad(tensor, (0, 0, 0, count - len(tensor)))
