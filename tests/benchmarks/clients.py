"""What reading costs by itself: the same ranges of one object through each client, into reused buffers, in one process.

    python tests/benchmarks/clients.py [--size 512MiB] [--repeats 5] [--concurrency 16] [--range 8MiB]

An object of random bytes is on a real S3 server (SeaweedFS) on loopback. Threads take ranges in turn, each with a
buffer of its own:

- `http.client`: `readinto` on a signed URL, no checks: the leanest there is, to which the others are held;
- `direct` and `fsspec`: this loader's store, with all its checks, by `read.backend`;
- `obstore`: `get_range` in threads, and a copy into the buffer (where obstore is installed).

CPU seconds are the process's own, user and system: the server's are not in them. Medians of interleaved runs.
"""

# ruff: noqa: E402 - a command's own folder is on the path, not the repository
from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import itertools
import mmap
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.local_s3 import S3Server, s3_server
from loader.config.values import parse_bytes
from loader.store.base import Access, Backend
from loader.store.direct import Direct
from loader.store.schemes import open_scheme
from loader.store.store import Store

NAME = "object"
Reader = Callable[[int, memoryview], None]
"""Fills a buffer with the object's bytes from a start on."""


class File(NamedTuple):
    size: int
    read: Reader


class Range(NamedTuple):
    """`size` bytes from `start` on, of what `read` reads."""

    read: Reader
    start: int
    size: int


def through_store(backend: Backend) -> Callable[[S3Server, str, int], Reader]:
    def open_reader(s3: S3Server, uri: str, concurrency: int) -> Reader:
        store = Store(Access(uri, s3.storage_options, concurrency, 30.0, backend), retries=0, deadline=600)
        pin = store.stat(NAME).pin
        return lambda start, buffer: store.read(NAME, pin, start, buffer)

    return open_reader


def files_of(uri: str, storage_options: Mapping[str, Any], concurrency: int) -> dict[str, File]:
    """All files there by name, each signed for `http.client`. A thread has one connection for all of them."""
    scheme = open_scheme(Access(uri, storage_options, concurrency, 30.0, "direct"))
    assert isinstance(scheme, Direct)
    mine = threading.local()

    def signed(name: str) -> File:
        size, pin = scheme.stat(name)
        address = scheme._scheme.address(name, pin)
        parts = urlsplit(address.url)

        def read(start: int, buffer: memoryview) -> None:
            if not hasattr(mine, "connection"):
                mine.connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
            wanted = {**address.headers, "Range": f"bytes={start}-{start + len(buffer) - 1}"}
            mine.connection.request("GET", f"{parts.path}?{parts.query}", headers=wanted)
            reply = mine.connection.getresponse()
            assert (reply.status, reply.length) == (206, len(buffer)), reply.read()
            filled = 0
            while filled < len(buffer):
                filled += reply.readinto(buffer[filled:])
            reply.read()

        return File(size, read)

    return {name: signed(name) for name in scheme.names() or ()}


def through_http_client(s3: S3Server, uri: str, concurrency: int) -> Reader:
    return files_of(uri, s3.storage_options, concurrency)[NAME].read


def through_obstore(s3: S3Server, uri: str, _: int) -> Reader:
    import obstore

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    store = obstore.store.S3Store(
        bucket,
        endpoint=s3.endpoint,
        access_key_id=s3.key,
        secret_access_key=s3.secret,
        region="us-east-1",
        client_options={"allow_http": True},
    )

    def read(start: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(obstore.get_range(store, f"{prefix}/{NAME}", start=start, length=len(buffer)))

    return read


CLIENTS = {"http.client": through_http_client, "direct": through_store("direct"), "fsspec": through_store("fsspec")}
if importlib.util.find_spec("obstore"):
    CLIENTS["obstore"] = through_obstore


def ranges_of(file: File, step: int) -> list[Range]:
    return [Range(file.read, start, min(step, file.size - start)) for start in range(0, file.size, step)]


@contextlib.contextmanager
def reading(ranges: Sequence[Range], concurrency: int) -> Iterator[Callable[[], None]]:
    """Threads with a buffer each, touched already. They take the ranges in turn once what is yielded is called, which
    returns when all are read."""
    left, lock, room = iter(ranges), threading.Lock(), max((each.size for each in ranges), default=1)

    def work(_: int) -> None:
        buffer = memoryview(mmap.mmap(-1, room))
        buffer[:] = bytes(room)  # touched before a clock would see it
        ready.wait()
        go.wait()
        while True:
            with lock:
                each = next(left, None)
            if each is None:
                return
            each.read(each.start, buffer[: each.size])

    def read_all() -> None:
        go.wait()
        for each in done:
            each.result()

    ready, go = threading.Barrier(concurrency + 1), threading.Barrier(concurrency + 1)
    with ThreadPoolExecutor(concurrency) as pool:
        done = [pool.submit(work, n) for n in range(concurrency)]
        ready.wait()
        try:
            yield read_all
        finally:
            go.abort()  # for threads that were never let go


def measure(read: Reader, size: int, step: int, concurrency: int) -> tuple[float, float]:
    """CPU seconds and seconds, for all ranges of the object."""
    with reading(ranges_of(File(size, read), step), concurrency) as read_all:
        cpu, begun = _cpu(), time.perf_counter()
        read_all()
        return _cpu() - cpu, time.perf_counter() - begun


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def served(size: int) -> Iterator[tuple[S3Server, str]]:
    with s3_server() as s3:
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, NAME).write_bytes(os.urandom(size))
            uri = s3.put(Path(scratch))
        yield s3, uri


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("512MiB"))
    parser.add_argument("--range", type=parse_bytes, default=parse_bytes("8MiB"))
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CLIENTS}
    with served(given.size) as (s3, uri):
        readers = {name: make(s3, uri, given.concurrency) for name, make in CLIENTS.items()}
        for _, (name, read) in itertools.product(range(given.repeats), readers.items()):
            found[name].append(measure(read, given.size, given.range, given.concurrency))
    floor = statistics.median(cpu for cpu, _ in found["http.client"])
    quickest = statistics.median(seconds for _, seconds in found["http.client"])
    print(f"{'client':<12} {'CPU, of http.client':>20} {'CPU s/GB':>9} {'time, of http.client':>21}")
    for name, runs in found.items():
        cpu, seconds = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:<12} {cpu / floor:>20.2f} {cpu / given.size * 1e9:>9.2f} {seconds / quickest:>21.2f}")


if __name__ == "__main__":
    main()
