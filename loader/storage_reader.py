"""`loader.StorageReader`: a Hugging Face checkpoint, wherever it is, for `torch.distributed.checkpoint.load`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from loader.config import Read
from loader.convert.graph import Node
from loader.convert.lazy import Convert
from loader.errors import BuilderError
from loader.exchange.control import Control
from loader.job import Job, conversion_of
from loader.place.targets import Target, targets_of
from loader.plan.geometry import Box


class StorageReader(storage.StorageReader):
    """`dcp.load(state_dict, storage_reader=loader.StorageReader("s3://models/llama-3-8b"))`

    Arguments are those of `loader.load`: `uri` is a directory in Hugging Face layout, or one `.safetensors` or `.bin`
    file, on any fsspec scheme; `read` takes the YAML's keys and values. The state dict has the checkpoint's names, or
    those that `convert` makes; what `config.json` ties is there under each name. What was quantised is dequantised.
    Keys that the state dict lacks are not read; which names it may have that the checkpoint lacks, DCP's planner says.
    Each tensor is cast to its own dtype in the state dict.

    With `read.share: world` each byte that DCP's plan asks for leaves the bucket once over all ranks: what several read
    items need is read by one rank, and sent. What `dcp.load` is given as `process_group` or `no_dist` is to be given
    here as well, for DCP does not tell: the ranks of that group then read together (errors tell them by their numbers
    in it), or each process for itself. A shard of several boxes, which DCP takes for one, is a BuilderError.

    Errors are those of `loader.errors`, the same on every rank, wrapped in DCP's own: of the catalog in words, within
    the message of its AssertionError, of a read as they are, in `CheckpointException.failures`. DCP then meets in a
    collective: where a rank was lost it ends when that does, at the latest after the group's time-out.
    """

    def __init__(
        self,
        uri: str,
        *,
        convert: str | Convert | None = None,
        storage_options: Mapping[str, Any] | None = None,
        ignore: Sequence[str] = (),
        strip_prefix: str = "",
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        **read: Any,
    ) -> None:
        """Raises ConfigError for a value that `read` or `convert` cannot have. Nothing is opened yet."""
        self._uri = uri
        self._convert = conversion_of(convert)
        self._options = dict(storage_options or {})
        self._ignore, self._strip_prefix = ignore, strip_prefix
        self._read = Read(**read)
        self._process_group = process_group
        self._no_dist = no_dist
        self._job: Job | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, with the checkpoint at `checkpoint_id` if that is given. DCP calls it first."""
        if checkpoint_id is not None:
            self._uri = str(checkpoint_id)
        if self._job is not None:
            self._job.store.close()
            self._job = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What is in the checkpoint, from its headers, which one rank reads. Collective. Raises CatalogError, …"""
        with self._control() as control:
            job = Job(self._uri, self._options, self._read, control)
            job.trace(self._convert, self._ignore, self._strip_prefix)
            with control.phase("ties"):
                ties = {fqn: job.outputs[tied] for fqn, tied in job.declared_ties().items() if tied in job.outputs}
            job.outputs = {**ties, **job.outputs}
        self._job = job
        described: dict[str, STORAGE_TYPES] = {
            fqn: _described(node, job.dtype_of(node)) for fqn, node in job.outputs.items()
        }
        return Metadata(state_dict_metadata=described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing: the catalog is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what `plan`, this rank's, asks for, together with the other ranks. Collective. Raises StoreError, …"""
        job = self._job
        assert job is not None, "DCP reads the metadata first"
        with self._control() as control:
            with control.phase("items"):
                _check_shards(getattr(planner, "state_dict", {}))
                found = [(item, planner.resolve_tensor(item).detach()) for item in plan.items]
                targets = [_target(item, tensor, job.outputs) for item, tensor in found if tensor.numel()]
            job.fill(targets, (), control, show=None)
            with control.phase("commit"):
                for item, tensor in found:
                    planner.commit_tensor(item, tensor)
        self.reset()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it may be an address: what is there, `read_metadata` says."""
        return bool(str(checkpoint_id))

    def _control(self) -> Control:
        return Control(None, 0, 1) if self._no_dist else Control.of_group(self._process_group)


def _check_shards(state_dict: Mapping[str, Any]) -> None:
    """Raise BuilderError for a shard of several boxes: of these, DCP's plan has one box of the same size, elsewhere."""
    sharded = {fqn: tensor for fqn, tensor in state_dict.items() if isinstance(tensor, DTensor)}
    for target in targets_of(sharded):
        if len(target.boxes) > 1:
            raise BuilderError(
                f"{target.fqn}: this rank's shard is {len(target.boxes)} boxes of the tensor, under placements "
                f"{sharded[target.fqn].placements}, and torch.distributed.checkpoint would read one: use loader.load"
            )


def _described(node: Node, dtype: torch.dtype) -> TensorStorageMetadata:
    shape = torch.Size(node.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=shape, chunks=[chunk])


def _target(item: ReadItem, tensor: Tensor, outputs: Mapping[str, Node]) -> Target:
    """The box of an output that the item reads, and the memory it goes to."""
    fqn = item.storage_index.fqn
    box = Box(tuple(item.storage_offsets), tuple(item.lengths))
    return Target((fqn,), tensor, outputs[fqn].shape, ((box, (0,) * len(box.sizes)),))
