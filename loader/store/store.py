"""The store: ranges of pinned files, read with one retry layer, and counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import tenacity

from loader.errors import CatalogError, StoreError
from loader.store.base import Access, Scheme, Stat, Transient
from loader.store.schemes import open_scheme
from loader.uri import public_uri

T = TypeVar("T")

FIRST_WAIT = 0.1
LONGEST_WAIT = 10.0
"""Full jitter between 0 and min(10 s, 0.1 s x 2^attempt): AWS's advice against synchronised retries."""


@dataclass(slots=True)
class Tally:
    """What was asked of the bucket, as the bucket sees it: ranged GETs of files, and bytes of their bodies."""

    gets: int = 0
    fetched_bytes: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, gets: int = 0, fetched_bytes: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.gets += gets
            self.fetched_bytes += fetched_bytes
            self.retries += retries


class Store:
    """A directory of checkpoint files, or one file.

    `retries` is how often one range is tried again; `deadline` (seconds) bounds all work on the store together. Methods
    block and may be called from many threads; `close` ends them.
    """

    def __init__(self, access: Access, *, retries: int, deadline: float) -> None:
        directory, self.only = split_uri(access.uri)
        self.uri = public_uri(access.uri)
        self.tally = Tally()
        self._directory = public_uri(directory)
        self._retries = retries
        self._until = time.monotonic() + deadline
        self._closed = threading.Event()
        try:
            self._scheme: Scheme = open_scheme(
                Access(directory, access.storage_options, access.concurrency, access.timeout)
            )
        except (ImportError, ValueError, TypeError) as error:
            raise CatalogError(f"{self.uri}: cannot be opened: {error}") from error

    def names(self) -> list[str] | None:
        """Names of the files in the directory, sorted; None where the scheme cannot list. Raises CatalogError."""
        if self.only is not None:
            return [self.only]
        try:
            found = self._try(self._scheme.names, "the listing")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CatalogError(f"{self.uri}: no such directory, bucket or prefix ({error})") from error
        except PermissionError as error:
            raise self._forbidden(error) from error
        return None if found is None else sorted(found)

    def stat(self, name: str) -> Stat | None:
        """Size and pin of a file, None where there is none. Raises CatalogError without permission, StoreError."""
        try:
            return self._try(lambda: self._scheme.stat(name), name)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise self._forbidden(error) from error

    def read_small(self, name: str, stat: Stat) -> bytes:
        """A whole small object (config, index): not counted as a GET of a checkpoint file."""
        buffer = bytearray(stat.size)
        if buffer:
            self._fill(name, stat.pin, 0, memoryview(buffer), counted=False)
        return bytes(buffer)

    def read(self, name: str, pin: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on, of the version `pin`. Raises StoreError, PinError."""
        if len(buffer):
            self._fill(name, pin, start, buffer, counted=True)

    def close(self) -> None:
        """End waiting between tries: what is still being read fails."""
        self._closed.set()

    def _fill(self, name: str, pin: str, start: int, buffer: memoryview, *, counted: bool) -> None:
        filled = 0

        def attempt() -> None:
            nonlocal filled
            got = 0
            try:
                self._scheme.read(name, pin, start + filled, buffer[filled:])
                got = len(buffer) - filled
            except Transient as error:
                got = error.filled
                raise
            finally:
                filled += got
                if counted:
                    self.tally.add(gets=1, fetched_bytes=got)

        where = f"{name} bytes {start}-{start + len(buffer) - 1}"
        try:
            self._try(attempt, where)
        except PermissionError as error:
            raise StoreError(
                f"{self._directory}: {where}: {error}: the credentials worked before, and no more"
            ) from error

    def _try(self, call: Callable[[], T], what: str) -> T:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(1 + self._retries),
                tenacity.stop_when_event_set(self._closed),
                tenacity.stop_before_delay(max(0.0, self._until - time.monotonic())),
            ),
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=lambda _: self.tally.add(retries=1),
            reraise=True,
        )
        try:
            return retrying(call)
        except Transient as error:
            tries = retrying.statistics["attempt_number"]
            raise StoreError(
                f"{self._directory}: {what}: {error} ({tries} tries; read.retries is {self._retries}). "
                "Check the endpoint and the network, or raise read.retries or read.deadline"
            ) from error

    def _forbidden(self, error: Exception) -> CatalogError:
        return CatalogError(
            f"{self.uri}: {error}. Check the credentials (the usual chain: environment, profile, instance role; or "
            "source.storage_options) and that they may list and read this prefix"
        )


def split_uri(uri: str) -> tuple[str, str | None]:
    """Directory and file name of a source: the name is None where the URI names a directory.

    s3://b/llama/model.safetensors -> (s3://b/llama, model.safetensors); s3://b/llama/ -> (s3://b/llama, None)
    """
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    if path.endswith(".safetensors"):
        directory, _, name = path.rpartition("/")
        return (directory or ".") + mark + query, name
    return (path.rstrip("/") or "/") + mark + query, None
