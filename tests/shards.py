"""Tensors sharded by torch itself, to hold what was loaded against; and checkpoint files laid out byte for byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from loader.formats.safetensors import _DTYPES
from tests.checkpoints import same_bits

DTYPES = {name: dtype for name, dtype in _DTYPES.items() if dtype is not None}
"""Every dtype of safetensors that torch knows, by safetensors' name."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TWINS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file with its tensors in the given order, aligned or not: `save_file` sorts them.

    On meta they are a hole, of their size: nothing but the header is on the disk.
    """
    header, at = {}, 0
    for key, tensor in tensors.items():
        shape = list(tensor.shape)
        if tensor.dtype is torch.float4_e2m1fn_x2:
            shape[-1] *= 2  # safetensors counts elements, torch pairs
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            if not tensor.is_meta:
                file.write(bits(tensor).numpy().tobytes())
        file.truncate(8 + len(text) + at)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, flat."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def shard(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """As torch shards it; on a dim that the tensor lacks, replicated. Without communication: gloo lacks dtypes."""
    fit = [Replicate() if getattr(p, "dim", -1) >= tensor.ndim else p for p in placements]
    twin = distribute_tensor(tensor.view(_TWINS[tensor.itemsize]), mesh, fit, src_data_rank=None)  # F4 has no zeros
    return _like(twin, twin.to_local().view(tensor.dtype))


def blank(sharded: DTensor, dtype: torch.dtype | None = None) -> DTensor:
    """The same shards in other memory, every element wrong; of another dtype, every element -1."""
    found = sharded.to_local()
    if dtype is not None:
        return _like(sharded, torch.full_like(found, -1, dtype=dtype))
    flip = 1 if found.dtype is torch.bool else 0xFF
    return _like(sharded, (bits(found) ^ flip).view(found.dtype).view(found.shape))


def _like(other: DTensor, shard: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        shard, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def differences(loaded: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """The FQNs whose local shards differ in any bit."""
    return [fqn for fqn in expected if not same_bits(local(loaded[fqn]), local(expected[fqn]))]
