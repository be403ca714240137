"""Any other fsspec file system, through its generic interface."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from loader.errors import LoaderError
from loader.store.aside import Aside
from loader.store.base import Access, Filler, IsLate, Scheme, Stat, Transient, changed, told

T = TypeVar("T")

CLIENT_BYTES = 8 << 20  # a guess: as for HTTP

PIN_FIELDS = (
    "ETag",
    "etag",
    "generation",
    "blob_id",
    "checksum",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


def cat_range(fs: Any, path: str, start: int, stop: int) -> bytes:
    """A file's bytes, and no more: fsspec's own `cat_file` would read ahead."""
    generic = type(fs).cat_file is AbstractFileSystem.cat_file
    return bytes(fs.cat_file(path, start=start, end=stop, **({"cache_type": "none"} if generic else {})))


def _verdict(error: Exception) -> Exception:
    """Transient for an OSError that another try may mend, else the error itself."""
    final = not isinstance(error, OSError) or isinstance(
        error, FileNotFoundError | NotADirectoryError | PermissionError
    )
    return error if final else Transient(told(error))


class OtherScheme:
    """A directory of an fsspec file system. A pin is as strong as what the system's `info` tells of a version."""

    def __init__(
        self, fs: Any, path: str, until: float, *, verdict: Callable[[Exception], Exception] = _verdict
    ) -> None:
        """At `until` (monotonic) all calls end: no more is known of a client's own patience. `verdict` is what an error
        of the file system's means."""
        self.fs = fs
        self.path = path
        self.verdict = verdict
        self._looking = threading.Lock()
        self._aside = Aside(math.inf, until)
        self.close = self._aside.close

    def names(self) -> list[str]:
        found = self._call(lambda: self.fs.ls(self.path, detail=True, refresh=True))
        return [item["name"].rsplit("/", 1)[-1] for item in found if item["type"] == "file"]

    def stat(self, name: str) -> Stat:
        return self._call(lambda: self._stat(name))

    def read(self, name: str, pin: str, start: int, buffer: memoryview, _: IsLate) -> None:
        self._call(lambda: self._read(name, pin, start, buffer))

    def _stat(self, name: str) -> Stat:
        with self._looking:
            self.fs.invalidate_cache(self.path)  # what it remembers may be of another version
            found = self.fs.info(f"{self.path}/{name}")
        versions = [f"{field}={found[field]}" for field in PIN_FIELDS if found.get(field) is not None]
        return Stat(int(found["size"]), " ".join([f"size={found['size']}", *versions]))

    def _read(self, name: str, pin: str, start: int, buffer: memoryview) -> None:
        """The version is asked for after the bytes: if it is the pinned one, it was so before."""
        data = cat_range(self.fs, f"{self.path}/{name}", start, start + len(buffer))
        if (found := self._stat(name).pin) != pin:
            raise changed(name, pin, found)
        filler = Filler(buffer)
        filler.add(data)
        filler.finish()

    def _call(self, work: Callable[[], T]) -> T:
        def judged(_: object) -> T:
            try:
                return work()
            except (LoaderError, Transient):
                raise
            except Exception as error:
                raise self.verdict(error) from error

        return self._aside.call(judged)


def open_scheme(access: Access) -> Scheme:
    fs, path = url_to_fs(access.uri, **access.storage_options)
    return OtherScheme(fs, path.rstrip("/"), access.until)
