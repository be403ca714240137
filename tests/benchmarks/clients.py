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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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


def through_store(backend: Backend) -> Callable[[S3Server, str, int], Reader]:
    def open_reader(s3: S3Server, uri: str, concurrency: int) -> Reader:
        store = Store(Access(uri, s3.storage_options, concurrency, 30.0, backend), retries=0, deadline=600)
        pin = store.stat(NAME).pin
        return lambda start, buffer: store.read(NAME, pin, start, buffer)

    return open_reader


def through_http_client(s3: S3Server, uri: str, concurrency: int) -> Reader:
    scheme = open_scheme(Access(uri, s3.storage_options, concurrency, 30.0, "direct"))
    assert isinstance(scheme, Direct)
    address = scheme._scheme.address(NAME, scheme.stat(NAME).pin)
    parts = urlsplit(address.url)
    mine = threading.local()

    def read(start: int, buffer: memoryview) -> None:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        wanted = {**address.headers, "Range": f"bytes={start}-{start + len(buffer) - 1}"}
        mine.connection.request("GET", f"{parts.path}?{parts.query}", headers=wanted)
        reply = mine.connection.getresponse()
        filled = 0
        while filled < len(buffer):
            filled += reply.readinto(buffer[filled:])
        reply.read()

    return read


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


def measure(read: Reader, size: int, step: int, concurrency: int) -> tuple[float, float]:
    """CPU seconds and seconds, for all ranges of the object."""
    starts, lock = iter(range(0, size, step)), threading.Lock()

    def work(_: int) -> None:
        buffer = memoryview(mmap.mmap(-1, step))
        buffer[:] = bytes(step)  # touched before the clock would see it
        ready.wait()
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            read(start, buffer[: min(step, size - start)])

    ready = threading.Barrier(concurrency + 1)
    with ThreadPoolExecutor(concurrency) as pool:
        done = [pool.submit(work, n) for n in range(concurrency)]
        ready.wait()
        cpu, begun = _cpu(), time.perf_counter()
        for each in done:
            each.result()
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
