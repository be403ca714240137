"""For OLMo-core: `load_hf_model`, with the signature of its own, filling every rank's own shards from a bucket."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from loader.convert.named import olmo_core
from loader.errors import ConfigError
from loader.ground.uri import at_revision
from loader.library import load

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
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

    `model_name_or_path` is a directory, a URL of one on any scheme that the loader reads, or the name of a model on
    the Hugging Face hub, of which `revision` is a branch, tag or commit. `num_embeddings` is the model's number
    of vocabulary rows, where it is not the checkpoint's: rows beyond are not read, rows that lack are zeros (where
    OLMo-core's are what transformers draws for them). For other arguments of `loader.load`, call that with
    `convert="olmo_core"`.

    Not needed, and taken for the signature's sake: `work_dir`, for nothing is downloaded; `model_id`, which is
    deprecated; `process_group`, for it must be all ranks.

    Collective over the default process group. Every tensor of the state dict is filled or the load fails, and none may
    be on meta: OLMo-core leaves what it has no weights for as it is. Raises ConfigError for a smaller process group,
    and what `loader.load` raises.
    """
    del model_id, work_dir
    if process_group is not None and dist.get_world_size(process_group) != dist.get_world_size():
        raise ConfigError(
            f"process_group has {dist.get_world_size(process_group)} of {dist.get_world_size()} ranks: all ranks load "
            "together; leave it out"
        )

    def convert(checkpoint: Mapping[str, Tensor], hf_config: Any) -> Iterator[tuple[str, Tensor]]:
        for fqn, tensor in olmo_core.convert(checkpoint, hf_config):
            yield fqn, tensor if num_embeddings is None or fqn not in _VOCABULARY else _rows(tensor, num_embeddings)

    load(model_state_dict, uri_of(fspath(model_name_or_path), revision), convert=convert)


def uri_of(name_or_path: str, revision: str) -> str:
    """Where it is: `org/name` is the hub's, unless there is such a directory. Qwen/Qwen3-8B -> hf://Qwen/Qwen3-8B@main

    A revision in an hf:// URI stands; what is not on the hub has none.
    """
    if name_or_path.startswith("hf://"):
        return name_or_path if "@" in name_or_path else at_revision(name_or_path, revision)
    if _HUB_NAME.fullmatch(name_or_path) and not Path(name_or_path).exists():
        return at_revision(f"hf://{name_or_path}", revision)
    return name_or_path


def _rows(tensor: Tensor, count: int) -> Tensor:
    """The first `count` rows, zeros where there are no more."""
    return tensor[:count] if count <= len(tensor) else pad(tensor, (0, 0, 0, count - len(tensor)))
