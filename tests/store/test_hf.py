"""`hf://`: one commit, its signed URLs, and what the hub refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loader.errors import CatalogError, PinError, StoreError
from loader.store.base import Access, Backend
from loader.store.store import Store
from tests.hub import Hub, hub_server
from tests.proxy import CountingProxy, Reply
from tests.store.buckets import PATIENCE

NAME = "model.safetensors"
OLD, NEW = b"old weights" * 1000, b"new weights" * 1000
TOKEN = "hf_that-nobody-may-read"


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def directory(tmp_path) -> Path:
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / NAME).write_bytes(OLD)
    (directory / "config.json").write_text("{}")
    return directory


def open_store(hub: Hub, uri: str, backend: Backend = "auto", **options: object) -> Store:
    return Store(Access(uri, {**hub.storage_options, **options}, 4, PATIENCE, backend), retries=2, deadline=60)


def read(store: Store, pin: str, start: int = 0) -> bytes:
    buffer = bytearray(100)
    store.read(NAME, pin, start, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
def test_a_branch_that_moves_changes_nothing(hub, directory, backend):
    old = hub.put(directory, "org/name")
    store = open_store(hub, "hf://org/name", backend)
    pin = store.stat(NAME).pin
    assert pin.startswith(f"{old}/")
    (directory / NAME).write_bytes(NEW)
    new = hub.put(directory, "org/name")
    assert read(store, pin) == OLD[:100]
    for uri, data in {f"@{old}": OLD, "@main": NEW, f"@{new}": NEW, "": NEW}.items():
        store = open_store(hub, f"hf://org/name{uri}", backend)
        assert read(store, store.stat(NAME).pin) == data[:100]


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
def test_a_directory_in_the_repository(hub, directory, tmp_path, backend):
    (tmp_path / "whole").mkdir()
    directory.rename(tmp_path / "whole" / "sub")
    hub.put(tmp_path / "whole", "org/name")
    store = open_store(hub, "hf://org/name/sub", backend)
    assert store.names() == ["config.json", NAME]
    assert read(store, store.stat(NAME).pin, 11) == OLD[11:111]
    assert open_store(hub, "hf://org/name").names() == []
    with pytest.raises(CatalogError, match="no files in other/"):
        open_store(hub, "hf://org/name/other").names()


def test_through_the_file_system_no_more_is_read_than_asked_for(hub, directory):
    (directory / NAME).write_bytes(bytes(8 << 20))
    hub.put(directory, "org/name")
    with CountingProxy(hub.endpoint) as proxy:
        store = open_store(hub.at(proxy.url), "hf://org/name", "fsspec")
        pin = store.stat(NAME).pin
        proxy.reset()
        for start in range(5):
            read(store, pin, start << 20)
        asked = [request.range for request in proxy.requests if request.range]
        assert set(asked) == {f"bytes={start << 20}-{(start << 20) + 99}" for start in range(5)}


def test_the_hub_is_asked_once_for_a_files_url_and_again_when_it_has_expired(hub, directory):
    hub.put(directory, "org/name")
    hub.token = TOKEN  # the server refuses a signed URL that comes with it
    with CountingProxy(hub.endpoint) as proxy:
        store = open_store(hub.at(proxy.url), "hf://org/name")
        pin = store.stat(NAME).pin
        for start in range(5):
            read(store, pin, start)
        assert [r.method for r in proxy.requests] == ["GET", "HEAD", *5 * ["GET"]]
        expired = iter([True])
        proxy.on_request(
            lambda r, forward: (
                Reply(403, [("Content-Length", "0")]) if "/lfs/" in r.path and next(expired, False) else forward(r)
            )
        )
        assert read(store, pin) == OLD[:100]
        assert store.tally.retries == 1
        assert sum(r.method == "HEAD" for r in proxy.requests) == 2


@pytest.mark.parametrize("path", ["/api/", "/resolve/", "/lfs/"])
@pytest.mark.parametrize("backend", ["direct", "fsspec"])
def test_a_connection_that_is_cut_is_tried_again(hub, directory, backend, path):
    """Whichever HTTP client the hub's library has: its errors are of that client's types."""
    hub.put(directory, "org/name")
    cut = []

    def once(request, forward):
        if path in request.path and not cut:
            cut.append(request.method)
            raise ConnectionResetError
        return forward(request)

    with CountingProxy(hub.endpoint) as proxy:
        proxy.on_request(once)
        store = open_store(hub.at(proxy.url), "hf://org/name", backend)
        assert read(store, store.stat(NAME).pin) == OLD[:100]
    assert cut
    assert store.tally.retries or backend == "fsspec"  # whose client may have tried again itself


@pytest.mark.parametrize("what", ["X-Linked-ETag", "X-Repo-Commit"])
def test_other_contents_under_a_commit_are_told(hub, directory, what):
    hub.put(directory, "org/name")
    with CountingProxy(hub.endpoint) as proxy:
        store = open_store(hub.at(proxy.url), "hf://org/name")
        pin = store.stat(NAME).pin

        def other(request, forward):
            reply = forward(request)
            return Reply(reply.status, [(n, "another" if n == what else v) for n, v in reply.headers], reply.chunks)

        proxy.on_request(other)
        with pytest.raises(PinError, match=f"pinned {pin}, found .*another"):
            read(store, pin)


def test_what_the_hub_refuses(hub, directory):
    hub.put(directory, "org/name")
    for uri, says in {
        "hf://org/other": "no such directory, bucket or prefix: .*give a token",
        "hf://org/name@nowhere": "no such directory, bucket or prefix: .*Revision",
        "hf://name": "cannot be opened",
    }.items():
        with pytest.raises(CatalogError, match=f"(?s){says}"):
            open_store(hub, uri).names()
    hub.token = TOKEN
    with pytest.raises(CatalogError) as raised:
        open_store(hub, "hf://org/name", token="hf_a-wrong-one").names()
    assert "wrong-one" not in str(raised.value)
    store = open_store(hub, "hf://org/name")
    pin = store.stat(NAME).pin
    hub.token = "hf_another"
    with pytest.raises(StoreError, match=r"status 401.*refuses now"):
        read(store, pin)
