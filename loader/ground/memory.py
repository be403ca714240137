"""What memory a load took above the shards, as the kernel counts it: not as the planner believes."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
from torch import Tensor

_RSS = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)
NOTICED = 256 << 10
"""Bytes that may land during a sample. After TRIES samples the last counts, however many did."""
TRIES = 10

_CHUNK = 1 << 30
"""Bytes asked about in one mincore call: its answer is then 256 KiB, however large the storage."""


class PeakMemory:
    """The peak of private and shared anonymous memory from `start` on, less what there was at `start`, less `landed()`.

    `landed` gives the bytes of shards first touched since `start`. It is called from the sampling thread, before each
    sample, so what lands in between counts as overhead and never hides any. A sample is one pread and one regular
    expression: 9 µs, and with the thread's wake-ups 0.8 % of a core at the default interval. What comes and goes
    between two samples is not seen.
    """

    def __init__(self, landed: Callable[[], int] = lambda: 0, interval: float = 0.005) -> None:
        self.landed = landed
        self._interval = interval
        self._peak: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def start(self, held: int = 0) -> None:
        """Take the baseline and sample from now on. The first call counts.

        `held` bytes were taken before and count as well: the storage client's, for one.
        """
        if sys.platform == "linux" and self._peak is None:
            self._status = os.open("/proc/self/status", os.O_RDONLY)
            self._baseline = _anonymous(self._status) - held
            self._peak = held
            self._thread.start()

    def stop(self) -> int | None:
        """End sampling and return the peak in bytes; None where the system is not Linux."""
        if self._peak is not None and not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            os.close(self._status)
        return self._peak

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(self._interval)
            self._peak = max(self._peak or 0, self._sample())

    def _sample(self) -> int:
        """Bytes above the baseline and the shards. Once more where much landed meanwhile: on a busy machine this thread
        may stand still between its two looks, and what landed then would pass for overhead."""
        for _ in range(TRIES):
            landed = self.landed()
            found = _anonymous(self._status) - self._baseline - landed
            if self.landed() - landed < NOTICED:
                break
        return found


def anonymous_bytes() -> int:
    """This process's private and shared anonymous memory now; 0 where the system is not Linux."""
    if sys.platform != "linux":
        return 0
    status = os.open("/proc/self/status", os.O_RDONLY)
    try:
        return _anonymous(status)
    finally:
        os.close(status)


def _anonymous(status: int) -> int:
    return sum(int(kilobytes) << 10 for kilobytes in _RSS.findall(os.pread(status, 1 << 14, 0)))


def untouched_bytes(tensors: Iterable[Tensor]) -> int | None:
    """Bytes of the CPU storages under `tensors` that are not resident yet: what a load will touch for the first time.

    Storages are counted whole (padding too) and once, however many tensors share them; other devices count nothing, and
    a DTensor is to be given as its local tensor. None where the system is not Linux. Raises OSError.
    """
    if sys.platform != "linux":
        return None
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    spans = sorted({(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages})
    untouched, seen = 0, 0
    for start, stop in spans:
        for piece in _pieces(max(start, seen), stop):
            untouched += _untouched(*piece)
        seen = max(seen, stop)
    return untouched


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """`[start, stop)` in parts that begin and end at multiples of _CHUNK, but for the first and last."""
    while start < stop:
        end = min(stop, (start // _CHUNK + 1) * _CHUNK)
        yield start, end
        start = end


def _untouched(start: int, stop: int) -> int:
    page = mmap.PAGESIZE
    first, end = start // page * page, -(-stop // page) * page
    resident = np.empty((end - first) // page, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_void_p(resident.ctypes.data)):
        code = ctypes.get_errno()
        raise OSError(code, f"mincore: {os.strerror(code)}")
    missing = resident & 1 == 0
    # The first and the last page may stick out of the range.
    return int(missing.sum()) * page - int(missing[0]) * (start - first) - int(missing[-1]) * (end - stop)
