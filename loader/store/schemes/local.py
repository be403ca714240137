"""`file://` and plain paths: positioned reads straight into the buffer."""

from __future__ import annotations

import os
from pathlib import Path

from fsspec.core import url_to_fs

from loader.store.base import Access, Filler, Scheme, Stat, Transient, changed, told

SCHEMES = ("file", "local")
CLIENT_BYTES = 6 << 20  # the threads that read, and what a rank does the first time


class LocalScheme:
    """A directory of a mounted file system."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        return [entry.name for entry in os.scandir(self.directory) if entry.is_file()]

    def stat(self, name: str) -> Stat:
        found = (self.directory / name).stat()
        return Stat(found.st_size, _pin(found))

    def read(self, name: str, pin: str, start: int, buffer: memoryview) -> None:
        try:
            descriptor = os.open(self.directory / name, os.O_RDONLY)
        except FileNotFoundError as error:
            raise changed(name, pin, "no such file") from error
        try:
            if (found := _pin(os.fstat(descriptor))) != pin:
                raise changed(name, pin, found)
            filler = Filler(buffer)
            while filler.filled < len(buffer):
                count = os.preadv(descriptor, [buffer[filler.filled :]], start + filler.filled)
                if not count:
                    break
                filler.filled += count
            filler.finish()
        except OSError as error:
            raise Transient(told(error)) from error
        finally:
            os.close(descriptor)


def _pin(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"


def open_scheme(access: Access) -> Scheme:
    _, path = url_to_fs(access.uri)
    return LocalScheme(Path(path))
