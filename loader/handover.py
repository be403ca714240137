"""`loader.attach`: the shards that the init step left on this node, as the memory of a trainer's model."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loader.errors import BuilderError, CatalogError, ConfigError, CoverageError, FingerprintError
from loader.exchange.control import Control
from loader.place.layout import layout_of, with_local
from loader.place.materialise import materialise
from loader.place.targets import Held, held_in, target_of, tensors_of_module
from loader.sinks.directory import remove as remove_shards
from loader.sinks.manifest import AGAIN, Manifest, Shard, data_path, read_manifest
from loader.stream.planning import alike_on_all_ranks
from loader.stream.verify import agree_on_fingerprint

_WAYS = "build it alike there and here, or hand over through output.checkpoint, which any layout loads"


def attach(
    model: nn.Module, directory: str, *, verify: Literal["fingerprint"] | None = None, remove: bool = False
) -> None:
    """Give a model on meta the shards that `output.local: directory` left on this node, without reading them.

    `model` has its parameters and persistent buffers on meta, DTensors or plain (replicated), in the layout that the
    init step had: the same world size, and for each FQN the same mesh, coordinate, placements, shape, dtype and ties.
    Parameters keep their identity. Non-persistent buffers get their values as in a load: from transformers, or from
    the module's `init_buffers(device)`. A plain tensor goes to the device of the DTensors' mesh, or else to the CPU.

    On the CPU shards are memory-mapped: a page is there when it is first used. The mapping is private, so what training
    writes is copied, a page at a time, and the files stay as they are; other devices get a copy, a tensor at a time.
    `remove` removes the directory when all ranks have their shards. Then the mapping is shared: training writes to the
    pages that are there, and nothing is held twice. (FSDP2 copies what it pads: shards of uneven sizes.)

    `verify="fingerprint"` makes the fingerprint of what was mapped, before the model gets it, and compares it with the
    one that the init step made, under its `verify: fingerprint`.

    Collective: every rank of the default process group calls it; without a group it is one process. Raises the same on
    every rank, and the group stays usable: CatalogError where the directory holds no complete shards of one run, or
    damaged ones; CoverageError for another layout, naming FQN, found and expected; BuilderError where a tensor has
    memory already, or a buffer gets no value; FingerprintError, or CorruptionError where replicas differ; ConfigError
    for `verify` without a fingerprint to compare with; SinkError where the directory cannot be removed.
    """
    directory = str(directory)
    with Control.of_group() as control:
        with control.phase("manifest"):
            if verify not in {None, "fingerprint"}:
                raise ConfigError(f'verify: should be "fingerprint" or None, found {verify!r}: nothing is read here')
            manifest = read_manifest(directory, control.rank, control.world_size)
            if not alike_on_all_ranks(control, "run", manifest.run):
                raise CatalogError(
                    f"{directory} holds the shards of one run on one node, and of another elsewhere: {AGAIN}"
                )
            if verify and manifest.fingerprint is None:
                raise ConfigError(
                    f"{directory} has no fingerprint to be compared with: set verify to fingerprint in the init step's "
                    "config as well, or leave it out here"
                )
        with control.phase("layout"):
            matched = _matched(held_in(model), manifest, directory)
        with control.phase("map"):
            device = _device(model)
            mapped = _Mapped(directory, manifest, private=not remove)
            held = [replace(each, local=mapped.tensor(shard).to(device)) for each, shard in matched]
        if verify:
            found = agree_on_fingerprint(control, [target_of(each) for each in held])
            if found != manifest.fingerprint:
                raise FingerprintError(
                    f"the fingerprint of the shards in {directory} is {found}, expected {manifest.fingerprint}, "
                    f"which they had as they were written: a file was written to since, or a bit flipped; {AGAIN}"
                )
        with control.phase("attach"):
            made = {name: with_local(each.tensor, each.local) for each in held for name in each.names}
            by_id = {id(tensor): made[name] for name, tensor in tensors_of_module(model)}
            materialise(model, device, lambda tensor: by_id.get(id(tensor)))
        if remove:
            with control.phase("remove"):
                remove_shards(directory, lambda: control.agree("attached"))


def _matched(model: Sequence[Held], manifest: Manifest, directory: str) -> list[tuple[Held, Shard]]:
    """Each tensor of the model with its shard. Raises BuilderError and CoverageError."""
    by_name = {name: shard for shard in manifest.shards for name in shard.names}
    wanted = {name for held in model for name in held.names}
    for names, told in (
        (wanted - by_name.keys(), f"the model has it, and {directory} does not"),
        (by_name.keys() - wanted, f"{directory} has it, and the model does not"),
    ):
        if names:
            more = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
            raise CoverageError(
                f"{min(names)}{more}: {told}: attach takes the model that the init step loaded; {_WAYS}"
            )
    pairs = [(held, by_name[held.names[0]]) for held in model]
    for held, shard in pairs:
        _check(held, shard, directory)
    return pairs


def _check(held: Held, shard: Shard, directory: str) -> None:
    fqn = held.names[0]
    if not held.local.is_meta:
        raise BuilderError(
            f"{fqn} has memory already, on {held.local.device}: attach gives a model its memory, so build it under "
            'torch.device("meta") and leave `to_empty` out; loader.load fills one that has memory'
        )
    if set(held.names) != set(shard.names):
        raise CoverageError(
            f"{fqn}: found one tensor of the names {', '.join(shard.names)} in {directory}, expected "
            f"{', '.join(held.names)}, as the model ties them; {_WAYS}"
        )
    wanted = layout_of(held)
    if differing := [part for part, value in wanted.items() if shard.layout[part] != value]:
        of_one, of_other = ({part: layout[part] for part in differing} for layout in (shard.layout, wanted))
        raise CoverageError(
            f"{fqn}: found {_shown(of_one)} in {directory}, expected {_shown(of_other)}, as the model has it; {_WAYS}"
        )


def _shown(layout: Mapping[str, object]) -> str:
    return ", ".join(f"{part.replace('_', ' ')} {value}" for part, value in layout.items())


def _device(model: nn.Module) -> torch.device:
    kinds = [tensor.device_mesh.device_type for _, tensor in tensors_of_module(model) if isinstance(tensor, DTensor)]
    if not kinds or kinds[0] == "cpu":
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


class _Mapped:
    """A rank's file in memory; a tensor of it keeps it there."""

    def __init__(self, directory: str, manifest: Manifest, *, private: bool) -> None:
        self._memory = None
        path = data_path(directory, manifest.rank)
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        try:
            with path.open("r+b" if not private else "rb") as file:
                if manifest.size:
                    self._memory = mmap.mmap(file.fileno(), manifest.size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise CatalogError(f"{path} cannot be mapped: {type(error).__name__}: {error}; {AGAIN}") from error

    def tensor(self, shard: Shard) -> Tensor:
        """A tensor over its bytes, with a storage of its own: saving one does not save them all."""
        if not shard.size:
            return torch.empty(shard.local_shape, dtype=shard.torch_dtype)
        assert self._memory is not None
        found = torch.frombuffer(self._memory, dtype=torch.uint8, count=shard.size, offset=shard.start)
        return found.view(shard.torch_dtype).view(shard.local_shape)
