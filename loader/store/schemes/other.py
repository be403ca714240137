"""Any other fsspec file system, through its generic interface."""

from __future__ import annotations

import math
from typing import Any

from fsspec.core import url_to_fs

from loader.store.aside import Aside
from loader.store.base import Access, Filler, Scheme, Stat, Transient, changed, told

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


class OtherScheme:
    """A directory of an fsspec file system. A pin is as strong as what the system's `info` tells of a version."""

    def __init__(self, fs: Any, path: str, until: float) -> None:
        """At `until` (monotonic) all calls end: no more is known of a client's own patience."""
        self.fs = fs
        self.path = path
        self._aside = Aside(math.inf, until)
        self.close = self._aside.close

    def names(self) -> list[str]:
        found = self._aside.call(lambda _: self.fs.ls(self.path, detail=True, refresh=True))
        return [item["name"].rsplit("/", 1)[-1] for item in found if item["type"] == "file"]

    def stat(self, name: str) -> Stat:
        return self._aside.call(lambda _: self._stat(name))

    def read(self, name: str, pin: str, start: int, buffer: memoryview, _: float) -> None:
        self._aside.call(lambda _: self._read(name, pin, start, buffer))

    def _stat(self, name: str) -> Stat:
        found = self.fs.info(f"{self.path}/{name}")
        versions = [f"{field}={found[field]}" for field in PIN_FIELDS if found.get(field) is not None]
        return Stat(int(found["size"]), " ".join([f"size={found['size']}", *versions]))

    def _read(self, name: str, pin: str, start: int, buffer: memoryview) -> None:
        filler = Filler(buffer)
        try:
            if (found := self._stat(name).pin) != pin:
                raise changed(name, pin, found)
            filler.add(self.fs.cat_file(f"{self.path}/{name}", start=start, end=start + len(buffer)))
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            raise Transient(told(error)) from error
        filler.finish()


def open_scheme(access: Access) -> Scheme:
    fs, path = url_to_fs(access.uri, **access.storage_options)
    return OtherScheme(fs, path.rstrip("/"), access.until)
