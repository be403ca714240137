"""The command's own process group, and where each rank puts its shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # the stubs hide it

from loader.errors import ConfigError


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default group, as torchrun's environment describes it; without torchrun, a group of this process alone.

    NCCL with gloo beside it on CUDA, gloo on CPU. It is taken down at the end of a load that went well: after an error
    the process ends, and nothing may wait.
    """
    os.environ.setdefault(
        "TORCH_GLOO_LAZY_INIT", "1"
    )  # connect pairs that talk; a mesh of thousands is out of question
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    """A default group that talks to nobody, in which this process is `rank` of `world_size`: to look at meshes.

    torch caches meshes by what they are equal in, which is not their rank: a DTensor that an op has made may have the
    mesh of an earlier group, and that one's coordinate.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend as well

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_device(wanted: str) -> torch.device:
    """`auto` is this rank's CUDA device where there is one, else the CPU. Raises ConfigError where there is no CUDA."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("model.device: cuda, but torch finds no CUDA device here: set it to auto or cpu")
    index = device_index(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def device_index(local_rank: int, count: int) -> int:
    """Which of a host's `count` visible CUDA devices is this rank's. Raises ConfigError where it would be another's.

    The one that LOCAL_RANK numbers; the only one, where a launcher shows each rank its own alone.
    """
    if 1 < count <= local_rank:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device of its own: there are {count} here. "
            "Start as many ranks on a host as it has devices"
        )
    return 0 if count == 1 else local_rank
