"""Every scheme that has a server of its own, through the proxy that misbehaves: what is mended, and what is told."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest

from loader.errors import CatalogError, StoreError
from tests.misbehaving import FILE, Fault, Get, cut, first, ignored_range, reset, served, short_206, stall, status, told
from tests.proxy import Reply
from tests.store.buckets import DATA, PATIENCE, SIZE, START, TIMEOUT, read


def short_body(get: Get) -> Reply:
    """Half of the range, told as all of it."""
    reply, body = served(get)
    half = len(body) // 2
    return Reply(206, told(reply, Content_Length=str(half)), [body[:half]])


BUFFER = bytearray(SIZE)
"""Into which the range is read."""


def more(then: Callable[[], bytes]) -> Fault:
    """The range, and when that has arrived, what `then` makes of the rest that was announced."""

    def chunks(get: Get, body: bytes) -> Iterator[bytes]:
        yield body
        while body != BUFFER and not get.server.stop.wait(0.01):  # a reset takes away what has not been read
            pass
        yield then()

    def fault(get: Get) -> Reply:
        reply, body = served(get)
        return Reply(206, told(reply, Content_Length=str(len(body) + 4)), chunks(get, body))

    return fault


def reset_at_the_end() -> bytes:
    raise ConnectionResetError


TROUBLES = {
    "503": (status(503), 2),
    "500": (status(500), 2),
    "429": (status(429), 2),
    "stall": (stall, 1),
    "range ignored": (ignored_range, 1),
    "short 206": (short_206, 1),
    "short body": (short_body, 1),
    "cut": (cut, 2),
    "more than the range": (more(lambda: b"more"), 1),
    "a reset when all had come": (more(reset_at_the_end), 0),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_passes_by_is_tried_again_and_counted(reads, name):
    trouble, retries = TROUBLES[name]
    store = reads.store(timeout=10 * TIMEOUT if name == "stall" else PATIENCE)  # which the second try is to keep
    pin = reads.store().stat(FILE).pin
    server = reads.misbehave(first(max(1, retries), trouble))
    BUFFER[:] = bytes(SIZE)
    store.read(FILE, pin, START, memoryview(BUFFER))
    assert DATA[START : START + SIZE] == BUFFER
    server.stop.set()
    assert (store.tally.retries, store.tally.gets) == (retries, 1 + retries)
    if name in {"cut", "short body"}:
        assert store.tally.fetched_bytes == SIZE
        asked = reads.ranges()
        assert sum(request.body_bytes for request in asked) == SIZE
        begins = [int(re.findall(r"\d+", request.range)[0]) for request in asked]
        assert begins == sorted(set(begins)), "only what is missing is read again"


def test_resets_are_mended(reads):
    store = reads.store()
    pin = store.stat(FILE).pin
    reads.misbehave(first(2, reset))
    assert read(store, pin) == DATA[START : START + SIZE]
    assert store.tally.retries == 2, "no client asks again by itself, a kept connection or not"
    assert len(reads.ranges()) == 3


LASTING = {
    "500": (status(500), "status 500"),
    "range ignored": (ignored_range, "ignored the Range and sent the whole object"),
    "short 206": (short_206, f"expected Content-Range bytes {START}-{START + SIZE - 1}"),
    "stall": (stall, "imeout"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_told_with_file_bytes_and_tries(reads, name):
    trouble, says = LASTING[name]
    store = reads.store(retries=1, timeout=TIMEOUT if name == "stall" else PATIENCE)
    pin = reads.store().stat(FILE).pin
    server = reads.misbehave(trouble)
    begun = time.monotonic()
    with pytest.raises(StoreError, match=re.escape(says)) as raised:
        read(store, pin)
    server.stop.set()
    assert time.monotonic() - begun < PATIENCE
    message = str(raised.value)
    assert message.startswith(f"{reads.uri}: {FILE} bytes {START}-{START + SIZE - 1}: ")
    assert "2 tries; read.retries is 1" in message
    assert type(raised.value) is StoreError


@pytest.mark.parametrize("code", [400, 401, 403])
def test_a_refusal_is_told_soon(bucket, code):
    """Credentials are made anew once; of other refusals another try mends nothing."""
    store = bucket.store()
    stat = store.stat(FILE)
    bucket.proxy.on_request(lambda request, forward: Reply(code, [("Content-Length", "0")]))
    asked = len(bucket.proxy.select(FILE))
    with pytest.raises(StoreError, match=f"{FILE} bytes .*status {code}.*refuses now"):
        read(store, stat.pin)
    assert store.tally.retries == (code != 400)
    assert sum(request.range is not None for request in bucket.proxy.select(FILE)[asked:]) == 1 + (code != 400)
    with pytest.raises(CatalogError, match=f"(?s)status {code}.*credentials"):
        store.stat(FILE)


def test_nobody_answers(bucket):
    bucket.proxy.__exit__()
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"2 tries; read\.retries is 1.*Check the endpoint and the network"):
        bucket.store(retries=1).stat(FILE)
    assert time.monotonic() - begun < PATIENCE


def test_the_deadline_and_closing_end_the_tries(bucket):
    bucket.proxy.on_request(lambda request, forward: Reply(503, [("Content-Length", "0")]))
    closed, hasty = bucket.store(retries=1000), bucket.store(retries=1000, deadline=0.5)
    closed.close()
    begun = time.monotonic()
    with pytest.raises(StoreError):
        hasty.stat(FILE)
    with pytest.raises(StoreError, match="1 tries"):
        closed.stat(FILE)
    assert time.monotonic() - begun < PATIENCE
