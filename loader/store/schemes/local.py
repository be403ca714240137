"""`file://` and plain paths: positioned reads straight into the buffer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fsspec.core import url_to_fs

from loader.store.aside import Aside
from loader.store.base import Access, Filler, IsLate, Scheme, Stat, Transient, changed, told

CLIENT_BYTES = 6 << 20  # the threads that read, and what a rank does the first time


PIECE = 1 << 20
"""Bytes read at once: each is a sign of life."""


class LocalScheme:
    """A directory of a mounted file system, which may hang for ever where its server is gone."""

    def __init__(self, directory: Path, aside: Aside) -> None:
        self.directory = directory
        self._aside = aside
        self.close = aside.close

    def names(self) -> list[str]:
        return self._aside.call(lambda _: [entry.name for entry in os.scandir(self.directory) if entry.is_file()])

    def stat(self, name: str) -> Stat:
        found = self._aside.call(lambda _: (self.directory / name).stat())
        return Stat(found.st_size, _pin(found))

    def read(self, name: str, pin: str, start: int, buffer: memoryview, _: IsLate) -> None:
        self._aside.call(lambda alive: self._read(name, pin, start, buffer, alive))

    def _read(self, name: str, pin: str, start: int, buffer: memoryview, alive: Callable[[], None]) -> None:
        try:
            with (self.directory / name).open("rb", buffering=0) as file:
                if (found := _pin(os.fstat(file.fileno()))) != pin:
                    raise changed(name, pin, found)
                filler = Filler(buffer)
                while count := os.preadv(file.fileno(), [_next(filler)], start + filler.filled):
                    filler.filled += count
                    alive()
                filler.finish()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            raise Transient(told(error)) from error


def _next(filler: Filler) -> memoryview:
    return filler.buffer[filler.filled : filler.filled + PIECE]


def _pin(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"


def open_scheme(access: Access) -> Scheme:
    _, path = url_to_fs(access.uri)
    return LocalScheme(Path(path), Aside(access.timeout, access.until))
