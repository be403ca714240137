"""Host memory that other processes of the machine may map: a memory file, which they open under its owner's /proc."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Bytes `[offset, offset + size)` of the memory file that a process has open under the number `file`. By its
    `inode` it is told from one that has the number afterwards."""

    file: int
    inode: int
    offset: int
    size: int


class SharedMemory:
    """`size` bytes (uint8): `host` and `there` are the same. Raises OSError."""

    def __init__(self, size: int) -> None:
        self.file: int | None = None
        self.host = torch.empty(0, dtype=torch.uint8)
        if size:
            with ExitStack() as unless_made:
                self.file = os.memfd_create("loader")
                unless_made.callback(os.close, self.file)
                os.ftruncate(self.file, size)
                self.host = torch.frombuffer(mmap.mmap(self.file, size), dtype=torch.uint8)
                unless_made.pop_all()
        self.there = self.host

    def place(self, view: Tensor) -> Place | None:
        """Where a contiguous view of it stands; None where it is of other memory."""
        offset = view.data_ptr() - self.host.data_ptr()
        if self.file is None or not 0 <= offset < self.host.numel():
            return None
        return Place(self.file, os.fstat(self.file).st_ino, offset, view.numel())

    def free(self) -> None:
        """It goes back to the system as soon as no process maps it."""
        self.host = self.there = torch.empty(0, dtype=torch.uint8)
        if self.file is not None:
            os.close(self.file)
            self.file = None


def file_of(pid: int, number: int) -> str:
    """The path by which others open what process `pid` has open under this number."""
    return f"/proc/{pid}/fd/{number}"


def mapped(pid: int, place: Place) -> Tensor:
    """Another process's memory (uint8), as it is now, to be copied from. Raises OSError: FileNotFoundError where it is
    there no more.

    It is opened anew each time: what is held open would not be given back when its owner frees it.
    """
    skipped = place.offset % mmap.ALLOCATIONGRANULARITY
    # Should it be another process's after all, its file may be a pipe, or a terminal.
    path = file_of(pid, place.file)
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if os.fstat(file).st_ino != place.inode:
            raise FileNotFoundError(errno.ENOENT, "another file has its number", path)
        # Private, which torch may have where it could not have what it must not write to.
        memory = mmap.mmap(file, place.size + skipped, mmap.MAP_PRIVATE, offset=place.offset - skipped)
    finally:
        os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8)[skipped:]


def files_are_limited() -> bool:
    """Whether there is a limit for the size of files (ulimit -f), which would be one for memory files too."""
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
