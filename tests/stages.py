"""Shards that are elsewhere than what is read: on a CUDA device where there is one, else in other host memory."""

from __future__ import annotations

import torch
import torch.distributed as dist

from loader.stream import connect, load
from loader.stream.buffers import Buffer, Memory, own_memory
from loader.stream.stage import HostStage

DEVICES = ["cpu", "elsewhere", *(["cuda"] if torch.cuda.is_available() else [])]
"""What tests run on: `elsewhere` goes a device's way, the exchange's too, with nothing but a CPU."""


class _Apart:
    """What nobody uploads is garbage there."""

    def __init__(self, size: int) -> None:
        self.host = own_memory(size)
        self.there = torch.full((size,), 0xA5, dtype=torch.uint8)

    def free(self) -> None:
        self.host = self.there = own_memory(0)


class Elsewhere(HostStage):
    on_host = False

    def allocate(self, size: int) -> Memory:
        return _Apart(size)

    def upload(self, buffer: Buffer) -> None:
        buffer.there.copy_(buffer.host)


def use(device: str) -> str:
    """From now on this process loads as for shards on `device`, one of DEVICES. Returns the device type of meshes."""
    if device == "elsewhere":
        load.stage_for = lambda _: Elsewhere()
        load.cuda_device = lambda _: torch.device("cpu")
        connect._identity = lambda _: f"the device of rank {dist.get_rank()}"
        return "cpu"
    return device
