"""From a round's host memory to where its bytes are converted, exchanged and written: there, or on a CUDA device.

On CUDA a range is read into pinned memory and copied to the device as it is, on a stream of its own, beside whatever
the device does else. Casts, conversions and the copies into the shards are the device's work, on another stream: a
message that is waited for there holds up no range that is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from loader.stream.buffers import Buffer, HostMemory, Memory, own_memory


class Stage(Protocol):
    """`uploading` and `writing` are the streams on which one thread uploads, another writes. `on_host`: shards are
    written from the memory that ranges are read into."""

    on_host: bool

    def allocate(self, size: int) -> Memory:
        """Memory of so many bytes for a slot."""

    def uploading(self) -> AbstractContextManager[Any]: ...

    def writing(self) -> AbstractContextManager[Any]:
        """What was uploaded before is there for whatever is done within."""

    def upload(self, buffer: Buffer) -> None:
        """Begin to copy what was read, on the current stream. Both its tensors stay as they are until `settle`."""

    def arrive(self) -> None:
        """Wait until all that was begun on the stream of uploads is done."""

    def settle(self) -> None:
        """Wait until all that was begun on both streams is done."""


def stage_for(tensors: Iterable[Tensor]) -> Stage:
    """On the CUDA device that any of these shards is on, else in host memory."""
    device = cuda_device(tensors)
    return HostStage() if device is None else CudaStage(device)


def cuda_device(tensors: Iterable[Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)


class HostStage:
    """Everything happens where the bytes are."""

    on_host = True

    def allocate(self, size: int) -> Memory:
        return HostMemory(size)

    def uploading(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def writing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def upload(self, buffer: Buffer) -> None:
        pass

    def arrive(self) -> None:
        pass

    def settle(self) -> None:
        pass


class CudaStage:
    """On a CUDA device, after all that the current stream has been given so far."""

    on_host = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploads, self._writes = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        for stream in (self._uploads, self._writes):
            stream.wait_stream(torch.cuda.current_stream(device))

    def allocate(self, size: int) -> Memory:
        return _PinnedMemory(size, self._device)

    def uploading(self) -> AbstractContextManager[Any]:
        return self._on(self._uploads)

    def writing(self) -> AbstractContextManager[Any]:
        self._writes.wait_stream(self._uploads)
        return self._on(self._writes)

    def upload(self, buffer: Buffer) -> None:
        buffer.there.copy_(buffer.host, non_blocking=True)

    def arrive(self) -> None:
        self._uploads.synchronize()

    def settle(self) -> None:
        self._writes.wait_stream(self._uploads)
        self._writes.synchronize()

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """A thread is on device 0 until told otherwise: to go back there from a stream would make a context on it, of
        hundreds of MB for each rank of the host."""
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield


class _PinnedMemory:
    """Host memory that the device copies from by itself, and as much on the device.

    Registered, since torch's own pinned allocator takes the next power of two and keeps it; until it is freed, or an
    error has left it to nobody.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.host = own_memory(size)
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        self._registered: weakref.finalize[..., _PinnedMemory] | None = None
        if size:
            with torch.cuda.device(device):
                torch.cuda.check_error(_runtime().cudaHostRegister(self.host.data_ptr(), size, 0))
            self._registered = weakref.finalize(self, _unregister, self.host.data_ptr(), device)
            self._registered.atexit = False

    def free(self) -> None:
        if self._registered is not None:
            self._registered()
        self.host = own_memory(0)
        self.there = torch.empty(0, dtype=torch.uint8, device=self.there.device)


def _unregister(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.check_error(_runtime().cudaHostUnregister(address))


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
