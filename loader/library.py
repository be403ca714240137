"""`loader.load`: for a trainer that has its model, or its state dict, already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loader.config import Read
from loader.convert.lazy import Convert
from loader.exchange.control import Control
from loader.job import Job, conversion_of
from loader.report import Report


def load(
    target: nn.Module | Mapping[str, Tensor],
    uri: str,
    *,
    convert: str | Convert | None = None,
    storage_options: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    strip_prefix: str = "",
    **read: Any,
) -> Report:
    """Fill a module's parameters and persistent buffers, or a flat state dict's tensors, from a checkpoint.

    `target` holds DTensors (any mesh, any placements) or plain tensors (replicated), with memory, on any device; they
    are written in place, cast to their own dtype. `uri` is a directory in Hugging Face layout, or one safetensors file,
    on any fsspec scheme. `convert` is a function `(checkpoint, hf_config)` that gives tensors by FQN, or a name as in
    the YAML; None keeps HF names and layouts. `ignore` are globs over keys to leave out; `strip_prefix` is taken off
    keys that begin with it. `read` takes the YAML's keys and values: `share="node"`, `memory_budget="64MiB"`, …

    Collective: every rank of the default process group calls it; without a group it is one process. Raises the same
    class from `loader.errors` on every rank, and leaves the group usable, unless a rank was lost.
    """
    with Control.of_group() as control:
        with control.phase("arguments"):
            conversion = conversion_of(convert)
            reading = Read(**read)
        job = Job(uri, dict(storage_options or {}), reading, control)
        job.trace(conversion, ignore, strip_prefix)
        return job.load(target, mesh=_mesh_of(target))


def _mesh_of(target: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
    """The dims of the largest mesh that a DTensor of the target is on: for the report."""
    tensors = target.parameters() if isinstance(target, nn.Module) else target.values()
    meshes = {id(t.device_mesh): t.device_mesh for t in tensors if isinstance(t, DTensor)}
    if not meshes or not dist.is_initialized():
        return {}
    largest = max(meshes.values(), key=lambda mesh: mesh.size())
    names = largest.mesh_dim_names or tuple(f"dim_{i}" for i in range(largest.ndim))
    return dict(zip(names, largest.shape, strict=True))
