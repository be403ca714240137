"""Ranges straight over HTTP: an address is made once, and again when it is refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from loader.errors import CatalogError, StoreError
from loader.store import connections, direct
from loader.store.base import Access
from loader.store.direct import Direct
from loader.store.schemes import open_scheme
from loader.store.store import Store
from tests.proxy import CountingProxy, Reply
from tests.servers import http_server

NAME = "model.safetensors"
DATA = bytes(range(256)) * 400


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / NAME).write_bytes(DATA)
    return tmp_path


def read(store: Store, pin: str, start: int = 0) -> bytes:
    buffer = bytearray(1000)
    store.read(NAME, pin, start, memoryview(buffer))
    return bytes(buffer)


def empty(status: int, *headers: tuple[str, str]) -> Reply:
    return Reply(status, [("Content-Length", "0"), *headers])


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_address_is_made_once_and_again_when_it_is_refused(request, monkeypatch, scheme, directory):
    monkeypatch.setattr(connections, "FRESH", 60.0)
    server = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[scheme])
    uri = server.put(directory)
    with CountingProxy(server.endpoint) as proxy:
        store = Store(Access(uri, server.at(proxy.url).storage_options, 4, 30.0, "direct"), retries=2, deadline=60)
        pin = store.stat(NAME).pin
        for start in range(5):
            assert read(store, pin, start) == DATA[start : start + 1000]
        assert len({r.target for r in proxy.requests if r.range}) == 1
        assert len({r.client_port for r in proxy.requests if r.range}) == 1, "a connection is kept"
        expired = iter([True])
        proxy.on_request(lambda r, forward: empty(403) if r.range and next(expired, False) else forward(r))
        assert read(store, pin) == DATA[:1000]
        assert store.tally.retries == 1
        proxy.on_request(lambda r, forward: empty(403) if r.range else forward(r))
        with pytest.raises(StoreError, match=r"status 403.*refuses now"):
            read(store, pin)
        assert store.tally.retries == 2


def test_a_bucket_in_another_region_is_signed_for_that_one(s3, directory):
    """S3 tells it with every answer to the bucket's HEAD, and sends elsewhere whoever signs for another."""
    uri = s3.put(directory)
    with CountingProxy(s3.endpoint) as proxy:

        def elsewhere(request, forward):
            region = ("x-amz-bucket-region", "eu-west-7")
            if "/eu-west-7/" not in request.headers.get("Authorization", "") and not request.range:
                return empty(301, region)
            reply = forward(request)
            return Reply(reply.status, [*reply.headers, region], reply.chunks)

        proxy.on_request(elsewhere)
        store = Store(Access(uri, s3.at(proxy.url).storage_options, 4, 30.0, "direct"), retries=0, deadline=60)
        assert read(store, store.stat(NAME).pin) == DATA[:1000]
        (asked,) = [r for r in proxy.requests if r.range]
        assert "/eu-west-7/" in parse_qs(urlsplit(asked.target).query)["X-Amz-Credential"][0]


def test_options_that_change_requests_are_left_to_the_schemes_own_client(s3, directory):
    uri, options = s3.put(directory), {**s3.storage_options, "requester_pays": True}
    assert isinstance(open_scheme(Access(uri, s3.storage_options, 4, 30.0)), Direct)
    assert not isinstance(open_scheme(Access(uri, s3.storage_options, 4, 30.0, "fsspec")), Direct)
    assert not isinstance(open_scheme(Access(uri, options, 4, 30.0)), Direct)
    with pytest.raises(CatalogError, match=r"cannot be opened: .*read\.backend direct does not serve this scheme"):
        Store(Access(uri, options, 4, 30.0, "direct"), retries=0, deadline=60)


def test_through_a_proxy_of_the_environments(directory, monkeypatch):
    with http_server(directory) as url, CountingProxy(url) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("no_proxy", "")
        direct = open_scheme(Access(url, {}, 4, 30.0, "direct"))
        pin = direct.stat(NAME).pin
        buffer = bytearray(1000)
        direct.read(NAME, pin, 0, memoryview(buffer), 30.0)
        assert bytes(buffer) == DATA[:1000]
        assert [r.target for r in proxy.requests] == [f"{url}/{NAME}"]


def test_an_error_in_the_stores_words(s3, directory):
    uri = s3.put(directory)
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    with CountingProxy(s3.endpoint) as proxy:
        store = Store(Access(uri, s3.at(proxy.url).storage_options, 4, 30.0, "direct"), retries=0, deadline=60)
        pin = store.stat(NAME).pin
        proxy.on_request(
            lambda r, forward: Reply(503, [("Content-Length", str(len(body)))], [body]) if r.range else forward(r)
        )
        with pytest.raises(StoreError, match=r"status 503, SlowDown: Please reduce your request rate"):
            read(store, pin)


def dripping(request, forward):
    """A byte in a millisecond of each range, but of what begins with byte 5, which is refused."""

    def slowly(body):
        for byte in body:
            yield bytes([byte])
            time.sleep(0.001)

    if request.range and request.range.startswith("bytes=5-"):
        return empty(403)
    reply = forward(request)
    if request.range:
        reply.chunks = slowly(b"".join(map(bytes, reply.chunks)))
    return reply


def begin(store: Store, pin: str) -> tuple[threading.Thread, bytearray]:
    """A thread that reads all, of which something has come."""
    buffer = bytearray(len(DATA))

    def fill():
        with pytest.raises(StoreError):
            store.read(NAME, pin, 0, memoryview(buffer))

    thread = threading.Thread(target=fill)
    thread.start()
    while not any(buffer):
        time.sleep(0.01)
    return thread, buffer


def test_once_it_is_closed_nothing_is_written(s3, directory, monkeypatch):
    """Neither by a connection of today's, nor by one of before the credentials were made anew; also where a thread that
    is to end gets no turn for a while."""

    def late(reply, buffer):
        try:
            receive(reply, buffer)
        finally:
            time.sleep(0.3)
            buffer[-1] = 1

    uri, receive = s3.put(directory), direct._receive
    monkeypatch.setattr(direct, "_receive", late)
    with CountingProxy(s3.endpoint) as proxy:
        store = Store(Access(uri, s3.at(proxy.url).storage_options, 4, 30.0, "direct"), retries=2, deadline=60)
        first, pin = store._scheme, store.stat(NAME).pin
        proxy.on_request(dripping)
        reading = [begin(store, pin)]
        with pytest.raises(StoreError, match="refuses now"):
            read(store, pin, 5)
        assert store._scheme is not first
        reading += [begin(store, pin) for _ in range(2)]
        store.close()
        written = [bytes(buffer) for _, buffer in reading]
        for thread, _ in reading:
            thread.join(20)
            assert not thread.is_alive()
        assert [bytes(buffer) for _, buffer in reading] == written
