"""What a rank must fill: the local tensors of a module or a state dict, and the boxes of the FQN that each holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from loader.errors import BuilderError
from loader.place.boxes import shard_boxes
from loader.plan.geometry import Box

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What torch.compile and activation checkpointing put into a name; a state dict's FQNs leave it out."""

Boxes = tuple[tuple[Box, tuple[int, ...]], ...]
"""Regions of a tensor, each with its offsets in the local tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One tensor to fill. `names` are all its FQNs (tied parameters have several), in module order.

    `tensor` is the local tensor to write to: plain, detached, sharing the parameter's storage. `shape` is the global
    one. `boxes` are the regions held, each with its offsets in `tensor`; none where this rank holds nothing.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    shape: tuple[int, ...]
    boxes: Boxes

    @property
    def fqn(self) -> str:
        return self.names[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor of a model under all its names, in module order: `tensor` as it is there, `local` what this rank has."""

    names: tuple[str, ...]
    tensor: torch.Tensor
    local: torch.Tensor


def targets_of(target: nn.Module | Mapping[str, torch.Tensor]) -> list[Target]:
    """Every parameter and persistent buffer of a module, or every tensor of a flat state dict, in its order.

    Tensors that share their memory are one target with all their names. A plain tensor is replicated: one box. Raises
    BuilderError, naming the FQN, for what cannot be filled: what `held_in` refuses, and what is on meta or Partial.
    """
    return [target_of(held) for held in held_in(target)]


def held_in(target: nn.Module | Mapping[str, torch.Tensor]) -> list[Held]:
    """As `targets_of`, of what may be on meta. Raises BuilderError for what is expanded, lazy, sparse, or a subclass
    with a layout of its own."""
    pairs = tensors_of_module(target) if isinstance(target, nn.Module) else iter(target.items())
    found: dict[object, tuple[list[str], torch.Tensor, torch.Tensor]] = {}
    for fqn, tensor in pairs:
        local = _local_tensor(fqn, tensor)
        names, _, _ = found.setdefault(_memory(local), ([], tensor, local))
        names.append(fqn)
    return [Held(tuple(names), tensor, local) for names, tensor, local in found.values()]


def clean_fqn(name: str) -> str:
    """The FQN as `torch.distributed.checkpoint.state_dict` names it: without the names of wrapping modules."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def tensors_of_module(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer by FQN, a tied one under each of its names."""
    if isinstance(module, DistributedDataParallel):
        module = module.module
    for prefix, owner in module.named_modules(remove_duplicate=False):
        persistent = {k: v for k, v in owner._buffers.items() if k not in owner._non_persistent_buffers_set}  # noqa: SLF001
        for name, tensor in {**owner._parameters, **persistent}.items():  # noqa: SLF001
            if tensor is not None:
                yield clean_fqn(f"{prefix}.{name}" if prefix else name), tensor


def _local_tensor(fqn: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise BuilderError(f"{fqn}: expected a tensor, found {type(tensor).__name__}; a state dict to load is flat")
    if is_lazy(tensor):
        raise BuilderError(f"{fqn} has no shape yet: run a lazy module once, or give it its sizes, before loading")
    with torch.no_grad():  # else `to_local` records a graph, and hands out a copy of the view
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    if (
        type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or local.layout is not torch.strided
        or local.is_quantized
    ):
        kind = f"{type(local).__name__} with layout {local.layout}"
        raise BuilderError(f"{fqn}: a {kind} cannot be filled; load first, then convert the module")
    if any(stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)):
        raise BuilderError(f"{fqn} is an expanded view whose elements share memory: make it `.contiguous()`")
    return local


def target_of(held: Held) -> Target:
    """`held` as a target. Raises BuilderError for what is on meta or Partial."""
    fqn, tensor = held.names[0], held.tensor
    if held.local.is_meta:
        raise BuilderError(f"{fqn} is on the meta device: give it memory first, as with `model.to_empty(device=...)`")
    boxes: Boxes = ()
    if not isinstance(tensor, DTensor):
        boxes = boxes_at(fqn, tensor.shape, (), (), ())
    elif (coordinate := tensor.device_mesh.get_coordinate()) is not None:
        boxes = boxes_at(fqn, tensor.shape, tensor.device_mesh.shape, coordinate, tensor.placements)
    return Target(held.names, held.local, tuple(tensor.shape), boxes)


def boxes_at(
    fqn: str,
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> Boxes:
    """`shard_boxes`, its BuilderError naming the FQN. A plain tensor is on a mesh without dims: whole."""
    try:
        return tuple(shard_boxes(shape, mesh_shape, coordinate, placements))
    except BuilderError as error:
        raise BuilderError(f"{fqn}: {error.message}") from error


def _memory(local: torch.Tensor) -> object:
    """What two tensors have in common exactly when they are tied, on every rank: empty shards have storages too."""
    storage = local.untyped_storage()._cdata  # noqa: SLF001 - the storage's identity; an empty one has no address
    return storage, local.storage_offset(), local.shape, local.stride(), local.dtype
