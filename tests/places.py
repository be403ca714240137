"""Directories of checkpoints on a real server, behind a proxy that misbehaves and can change them meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from tests.misbehaving import FILE, Fault, Misbehaving
from tests.proxy import CountingProxy


@dataclasses.dataclass(frozen=True)
class Place:
    """What each rank is given: a URI of its own way there, and storage_options."""

    uris: list[str]
    options: list[dict[str, Any]]
    misbehaving: Misbehaving
    proxy: CountingProxy


@contextlib.contextmanager
def misbehaving_place(
    scheme: str, server: Any, root: Path, other: Path, faults: Mapping[str, Fault], ranks: int
) -> Iterator[Place]:
    """Serve the directories of `root` from `server`: an S3Server, a GCSServer, or for https the URL of the one that
    serves `root` itself. A file that changes becomes `other`."""
    files = scheme == "https"  # over http: TLS is no matter of these
    uri = server if files else server.put(root)

    def change(directory: str, how: str) -> None:
        if files:
            change_file(root / directory / FILE, how, other)
            return
        fs = fsspec.filesystem(scheme, **server.storage_options, skip_instance_cache=True)
        if how == "delete":
            fs.rm_file(f"{uri}/{directory}/{FILE}")
        else:
            fs.put_file(str(other if how == "overwrite" else root / directory / FILE), f"{uri}/{directory}/{FILE}")

    with CountingProxy(uri if files else server.endpoint, listeners=ranks) as proxy:
        misbehaving = Misbehaving(faults, change)
        proxy.on_request(misbehaving)
        urls = [proxy.url_for(rank) for rank in range(ranks)]
        options = [{} if files else server.at(url).storage_options for url in urls]
        try:
            yield Place(urls if files else [uri] * ranks, options, misbehaving, proxy)
        finally:
            misbehaving.stop.set()


def change_file(path: Path, how: str, other: Path) -> None:
    """`how` is overwrite, delete, again: the same bytes in a new file, or hang: whoever opens it waits for ever."""
    before = path.read_bytes()
    path.unlink()
    if how == "hang":
        os.mkfifo(path)
    elif how != "delete":
        path.write_bytes(other.read_bytes() if how == "overwrite" else before)
