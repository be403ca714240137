"""One object of some bytes, wherever ranges are read, and stores that read it through a proxy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loader.store.base import Access, Backend
from loader.store.store import Store
from tests.hub import hub_server
from tests.misbehaving import FILE, Fault, Misbehaving
from tests.proxy import CountingProxy
from tests.servers import http_server

DATA = bytes(range(256)) * 2000
START, SIZE = 100_000, 300_000
"""The range that is read of it."""
TIMEOUT = 0.5
"""Seconds, where a server falls silent; elsewhere a slow machine must not be taken for one."""
PATIENCE = 30
BACKENDS = [f"{scheme} {backend}" for scheme in ("s3", "gs", "http") for backend in ("direct", "fsspec")]


@dataclasses.dataclass
class Bucket:
    """The object, and how it is read."""

    proxy: CountingProxy
    uri: str
    options: dict[str, Any]
    replace: Callable[[bytes], Any]
    backend: Backend

    def store(
        self, uri: str | None = None, *, retries: int = 2, deadline: float = 60, timeout: float = PATIENCE
    ) -> Store:
        access = Access(uri or self.uri, self.options, concurrency=4, timeout=timeout, backend=self.backend)
        return Store(access, retries=retries, deadline=deadline)

    def misbehave(self, fault: Fault) -> Misbehaving:
        hook = Misbehaving(fault)
        self.proxy.on_request(hook)
        return hook

    def ranges(self) -> list[Any]:
        """The ranged GETs so far."""
        return [request for request in self.proxy.select(FILE) if request.range]


def read(store: Store, pin: str) -> bytes:
    buffer = bytearray(SIZE)
    store.read(FILE, pin, START, memoryview(buffer))
    return bytes(buffer)


def open_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bucket]:
    """`request.param` is a scheme and a backend."""
    scheme, backend = request.param.split()
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / FILE).write_bytes(DATA)

    def write(data: bytes) -> Path:
        (directory / FILE).write_bytes(data)
        return directory

    if scheme == "http":
        with http_server(directory) as url, CountingProxy(url) as proxy:
            yield Bucket(proxy, proxy.url, {}, write, backend)
    elif scheme == "hf":
        with hub_server(tmp_path) as hub, CountingProxy(hub.endpoint) as proxy:
            hub.put(directory, "org/name")
            yield Bucket(proxy, "hf://org/name", hub.at(proxy.url).storage_options, lambda _: None, backend)
    else:
        server = request.getfixturevalue("s3" if scheme == "s3" else "gcs")
        uri = server.put(directory)
        with CountingProxy(server.endpoint) as proxy:
            options = server.at(proxy.url).storage_options
            yield Bucket(proxy, uri, options, lambda data: server.put(write(data), uri), backend)
