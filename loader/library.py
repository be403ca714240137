"""`loader.load` and `loader.fingerprint`, for a trainer that has its model already, and `loader.iter_convert`, for one
process without one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loader.account import report_on
from loader.config import Proof, Read
from loader.convert.graph import Node, seen_in
from loader.convert.lazy import Convert
from loader.exchange.control import Control
from loader.job import Job, conversion_of
from loader.place.layout import mesh_dims
from loader.place.targets import targets_of, tensors_of_module
from loader.report import Report
from loader.stream.buffers import own_memory
from loader.stream.demand import check_unused
from loader.stream.verify import agree_on_fingerprint
from loader.timeline import traced


def load(
    target: nn.Module | Mapping[str, Tensor],
    uri: str,
    *,
    convert: str | Convert | None = None,
    storage_options: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    strip_prefix: str = "",
    verify: Literal["fingerprint", "checksum"] | None = None,
    expect: str | None = None,
    trace: str | None = None,
    **read: Any,
) -> Report:
    """Fill a module's parameters and persistent buffers, or a flat state dict's tensors, from a checkpoint.

    `target` holds DTensors (any mesh, any placements) or plain tensors (replicated), with memory, on any device; they
    are written in place, cast to their own dtype. `uri` is a directory in Hugging Face layout, or one
    `.safetensors` or `.bin` file, on any fsspec scheme. `convert` is a function `(checkpoint, hf_config)` that gives
    tensors by FQN, or a name as in the YAML; None keeps HF names and layouts. `ignore` are globs over keys to leave
    out; `strip_prefix` is taken off keys that begin with it. `read` takes the YAML's keys and values: `share="node"`,
    `memory_budget="64MiB"`, …

    A quantised checkpoint is dequantised, to each tensor's own dtype. Where a tensor of the target is to hold a packed
    key as it is stored (it has the key's name, and its dtype: float8, uint8, int32, …), all keys are kept as they are
    stored, scales too.

    `verify="fingerprint"` makes the fingerprint of what landed, for the report, and compares replicas; another one than
    `expect` is a FingerprintError. `verify="checksum"` holds what was read against what the bucket, or a `.bin`'s own
    directory, says of it: CorruptionError where it differs, ConfigError where nothing can be checked.

    `trace` is where a timeline of every rank is written, a local path or any fsspec URL: ConfigError before anything
    is read where no file can be made at a local path, and SinkError where it cannot be written in the end.

    Collective: every rank of the default process group calls it; without a group it is one process. Raises the same
    class from `loader.errors` on every rank, and leaves the group usable, unless a rank was lost.
    """
    with Control.of_group() as control:
        with control.phase("arguments"):
            conversion = conversion_of(convert)
            reading = Read(**read)
            proof = Proof(verify=verify, expect=expect)
        with traced(control, trace):
            job = Job(uri, dict(storage_options or {}), reading, control, checksums=proof.verify == "checksum")
            job.trace(conversion, ignore, strip_prefix, held=_dtypes(target))
            return report_on(job, job.load(target, proof=proof), _mesh_of(target))


def fingerprint(target: nn.Module | Mapping[str, Tensor]) -> str:
    """The fingerprint of a module's parameters and persistent buffers, or a flat state dict's tensors: "f1" and 16 hex
    digits.

    It tells FQNs, shapes, dtypes and every bit, and is the same for every mesh, placement, world size and device: a
    trainer can compare it with a report's. `target` is as in `load`; it is read in place, 512 KiB at a time. A tied
    tensor counts under each of its names.

    Collective: every rank of the default process group calls it; without a group it is one process. Raises
    CorruptionError where replicas differ, naming the FQN and the ranks, and BuilderError for a tensor that cannot be
    read, or that is of another shape or dtype on another rank; the same on every rank.
    """
    with Control.of_group() as control:
        with control.phase("place"):
            targets = targets_of(target)
        return agree_on_fingerprint(control, targets)


def iter_convert(
    uri: str,
    *,
    convert: str | Convert | None = None,
    storage_options: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    strip_prefix: str = "",
    **read: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Convert a checkpoint in this process alone, yielding `(fqn, tensor)` in the conversion's order.

    Tensors are whole, on the CPU, in the conversion's dtypes; what was quantised is dequantised, to the config's dtype
    (bfloat16 where that names none). Sources are read as they are needed and freed before the
    next are: beyond what was yielded and kept, memory is `memory_budget`, about half of it for small tensors that are
    read together, or one larger tensor. Arguments and errors are those of `load`.
    `dict(loader.iter_convert(...))` is the whole conversion.
    """
    with Control(None, 0, 1) as control:
        with control.phase("arguments"):
            conversion = conversion_of(convert)
            reading = Read(**read)
        job = Job(uri, dict(storage_options or {}), reading, control)
        job.trace(conversion, ignore, strip_prefix)
        with control.phase("coverage"):
            unused = frozenset(seen_in(*job.keys.values()) - seen_in(*job.outputs.values()))
            check_unused([unused], job.source.catalog.keys)
    waiting = max(0, reading.memory_budget - job.reserved_bytes) // 2
    job.read = reading.model_copy(update={"memory_budget": reading.memory_budget - waiting})
    for batch in _batches(job, waiting):
        tensors = {fqn: _empty(node, job.dtype_of(node)) for fqn, node in batch.items()}
        with Control(None, 0, 1) as control:
            job.fill(targets_of(tensors), (), control, show=None)
        while tensors:
            fqn = next(iter(tensors))
            yield fqn, tensors.pop(fqn)
    job.store.close()


def _batches(job: Job, limit: int) -> Iterator[dict[str, Node]]:
    """Consecutive outputs of at most `limit` bytes together; a larger one alone."""
    batch: dict[str, Node] = {}
    size = 0
    for fqn, node in job.outputs.items():
        needed = math.prod(node.shape) * job.dtype_of(node).itemsize
        if batch and size + needed > limit:
            yield batch
            batch, size = {}, 0
        batch[fqn] = node
        size += needed
    if batch:
        yield batch


def _empty(node: Node, dtype: torch.dtype) -> Tensor:
    return own_memory(math.prod(node.shape) * dtype.itemsize).view(dtype).view(node.shape)


def _dtypes(target: nn.Module | Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    pairs = tensors_of_module(target) if isinstance(target, nn.Module) else target.items()
    return {fqn: tensor.dtype for fqn, tensor in pairs if isinstance(tensor, Tensor)}


def _mesh_of(target: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
    """The dims of the largest mesh that a DTensor of the target is on: for the report."""
    tensors = target.parameters() if isinstance(target, nn.Module) else target.values()
    meshes = {id(t.device_mesh): t.device_mesh for t in tensors if isinstance(t, DTensor)}
    if not meshes or not dist.is_initialized():
        return {}
    largest = max(meshes.values(), key=lambda mesh: mesh.size())
    return mesh_dims(largest)
