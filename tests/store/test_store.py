"""Every scheme that has a server of its own, through the proxy that misbehaves: what is mended, and what is told."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loader.errors import CatalogError, LoaderError, PinError, StoreError
from loader.store.base import Access, Backend, Filler, Transient, Unusable, check_reply, refusal
from loader.store.secrets import Secrets
from loader.store.store import Store
from loader.uri import split_uri
from tests.hub import hub_server
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.servers import http_server

NAME = "model.safetensors"
DATA = bytes(range(256)) * 2000
TIMEOUT = 0.5
"""Seconds, where a server falls silent; elsewhere a slow machine must not be taken for one."""
PATIENCE = 30
START, SIZE = 100_000, 300_000
SECRET = "word-that-nobody-may-read"


@dataclasses.dataclass
class Bucket:
    """One object behind a proxy, and stores that read it."""

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


BACKENDS = [f"{scheme} {backend}" for scheme in ("s3", "gs", "http") for backend in ("direct", "fsspec")]


@pytest.fixture(params=BACKENDS)
def bucket(request, tmp_path) -> Iterator[Bucket]:
    """What is behind a name can change there."""
    yield from _bucket(request, tmp_path)


@pytest.fixture(params=[*BACKENDS, "hf direct"])
def reads(request, tmp_path) -> Iterator[Bucket]:
    """Wherever ranges are read."""
    if not request.param.startswith("hf"):
        yield from _bucket(request, tmp_path)
        return
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(DATA)
    with hub_server(tmp_path) as hub, CountingProxy(hub.endpoint) as proxy:
        hub.put(tmp_path / "served", "org/name")
        yield Bucket(proxy, "hf://org/name", hub.at(proxy.url).storage_options, lambda _: None, "direct")


def _bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bucket]:
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / NAME).write_bytes(DATA)

    def write(data: bytes) -> Path:
        (directory / NAME).write_bytes(data)
        return directory

    scheme, backend = request.param.split()
    if scheme == "http":
        with http_server(directory) as url, CountingProxy(url) as proxy:
            yield Bucket(proxy, proxy.url, {}, write, backend)
        return
    server = request.getfixturevalue("s3" if scheme == "s3" else "gcs")
    uri = server.put(directory)
    with CountingProxy(server.endpoint) as proxy:
        options = server.at(proxy.url).storage_options
        yield Bucket(proxy, uri, options, lambda data: server.put(write(data), uri), backend)


def _read(store: Store, pin: str) -> bytes:
    buffer = bytearray(SIZE)
    store.read(NAME, pin, START, memoryview(buffer))
    return bytes(buffer)


def _of_reads(trouble: Callable[[Request, int, Forward], Reply | None]) -> Callable[[Request, Forward], Reply]:
    """A hook that troubles the ranged GETs, numbered from 0."""
    count = iter(range(10**6))

    def hook(request: Request, forward: Forward) -> Reply:
        reply = trouble(request, next(count), forward) if request.method == "GET" and request.range else None
        return reply or forward(request)

    return hook


def _whole(reply: Reply) -> bytes:
    return b"".join(map(bytes, reply.chunks))


def _headers(reply: Reply, **changed: str) -> list[tuple[str, str]]:
    names = {name.replace("_", "-").lower() for name in changed}
    kept = [(name, value) for name, value in reply.headers if name.lower() not in names]
    return [*kept, *((name.replace("_", "-"), value) for name, value in changed.items())]


def _status(code: int) -> Callable[[Request, int, Forward], Reply | None]:
    return lambda request, number, forward: Reply(code, [("Content-Length", "0")]) if number < 2 else None


def _reset(request, number, forward):
    if number < 2:
        raise ConnectionResetError


def _stall(request, number, forward):
    if number:
        return None

    def chunks(body):
        yield body[: len(body) // 2]
        time.sleep(10 * TIMEOUT)
        raise ConnectionResetError

    reply = forward(request)
    return Reply(reply.status, reply.headers, chunks(_whole(reply)))


def _ignores_the_range(request, number, forward):
    if number:
        return None
    reply = forward(request)
    _whole(reply)
    kept = [(n, v) for n, v in _headers(reply, Content_Length=str(len(DATA))) if n.lower() != "content-range"]
    return Reply(200, kept, [DATA])


def _short_206(request, number, forward):
    """Half of the range, and honest about it."""
    if number:
        return None
    reply = forward(request)
    half = SIZE // 2
    told = f"bytes {START}-{START + half - 1}/{len(DATA)}"
    return Reply(206, _headers(reply, Content_Length=str(half), Content_Range=told), [_whole(reply)[:half]])


def _short_body(request, number, forward):
    """Half of the range, told as all of it."""
    if number:
        return None
    reply = forward(request)
    half = SIZE // 2
    return Reply(206, _headers(reply, Content_Length=str(half)), [_whole(reply)[:half]])


def _cut(request, number, forward):
    if number > 1:
        return None
    reply = forward(request)
    body = _whole(reply)
    return Reply(reply.status, _headers(reply, Connection="close"), [body[: len(body) // 2]])


def _more(then: Callable[[], bytes]) -> Callable[[Request, int, Forward], Reply | None]:
    """The range, and when that has arrived, what `then` makes of the rest that was announced."""

    def chunks(body):
        yield body
        time.sleep(0.5)
        yield then()

    def trouble(request, number, forward):
        if number:
            return None
        reply = forward(request)
        return Reply(206, _headers(reply, Content_Length=str(SIZE + 4)), chunks(_whole(reply)))

    return trouble


def _reset_at_the_end():
    raise ConnectionResetError


TROUBLES = {
    "503": (_status(503), 2),
    "500": (_status(500), 2),
    "429": (_status(429), 2),
    "stall": (_stall, 1),
    "range ignored": (_ignores_the_range, 1),
    "short 206": (_short_206, 1),
    "short body": (_short_body, 1),
    "cut": (_cut, 2),
    "more than the range": (_more(lambda: b"more"), 1),
    "a reset when all had come": (_more(_reset_at_the_end), 0),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_passes_by_is_tried_again_and_counted(reads, name):
    trouble, retries = TROUBLES[name]
    store = reads.store(timeout=3 * TIMEOUT if name == "stall" else PATIENCE)  # which the second try is to keep
    pin = reads.store().stat(NAME).pin
    reads.proxy.on_request(_of_reads(trouble))
    assert _read(store, pin) == DATA[START : START + SIZE]
    assert (store.tally.retries, store.tally.gets) == (retries, 1 + retries)
    if name in {"cut", "short body"}:
        assert store.tally.fetched_bytes == SIZE
        reads = [request for request in reads.proxy.select(NAME) if request.range]
        assert sum(request.body_bytes for request in reads) == SIZE
        begins = [int(re.findall(r"\d+", request.range)[0]) for request in reads]
        assert begins == sorted(set(begins)), "only what is missing is read again"


def test_resets_are_mended(reads):
    store = reads.store()
    pin = store.stat(NAME).pin
    reads.proxy.on_request(_of_reads(_reset))
    assert _read(store, pin) == DATA[START : START + SIZE]
    assert store.tally.retries == 2, "no client asks again by itself, a kept connection or not"
    assert sum(request.range is not None for request in reads.proxy.select(NAME)) == 3


LASTING = {
    "500": (_status(500), "status 500"),
    "range ignored": (_ignores_the_range, "ignored the Range and sent the whole object"),
    "short 206": (_short_206, f"expected Content-Range bytes {START}-{START + SIZE - 1}"),
    "stall": (_stall, "imeout"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_told_with_file_bytes_and_tries(reads, name):
    trouble, says = LASTING[name]
    store = reads.store(retries=1, timeout=TIMEOUT if name == "stall" else PATIENCE)
    pin = reads.store().stat(NAME).pin
    reads.proxy.on_request(_of_reads(lambda request, number, forward: trouble(request, 0, forward)))
    begun = time.monotonic()
    with pytest.raises(StoreError, match=re.escape(says)) as raised:
        _read(store, pin)
    assert time.monotonic() - begun < PATIENCE
    message = str(raised.value)
    assert message.startswith(f"{reads.uri}: {NAME} bytes {START}-{START + SIZE - 1}: ")
    assert "2 tries; read.retries is 1" in message
    assert type(raised.value) is StoreError


@pytest.mark.parametrize("code", [400, 401, 403])
def test_a_refusal_is_told_soon(bucket, code):
    """Credentials are made anew once; of other refusals another try mends nothing."""
    store = bucket.store()
    stat = store.stat(NAME)
    bucket.proxy.on_request(lambda request, forward: Reply(code, [("Content-Length", "0")]))
    asked = len(bucket.proxy.select(NAME))
    with pytest.raises(StoreError, match=f"{NAME} bytes .*status {code}.*refuses now"):
        _read(store, stat.pin)
    assert store.tally.retries == (code != 400)
    assert sum(request.range is not None for request in bucket.proxy.select(NAME)[asked:]) == 1 + (code != 400)
    with pytest.raises(CatalogError, match=f"(?s)status {code}.*credentials"):
        store.stat(NAME)


def test_an_object_that_changed_is_told_with_both_pins(bucket):
    store = bucket.store()
    before = store.stat(NAME).pin
    bucket.replace(DATA[::-1] + b"more")
    now = bucket.store().stat(NAME).pin
    with pytest.raises(PinError) as raised:
        _read(store, before)
    assert f"pinned {before}, found {now}" in str(raised.value)


def test_a_reply_of_another_version_is_told(bucket):
    """Whatever the store makes of a condition in the request: the reply itself says what it is."""
    store = bucket.store()
    pin = store.stat(NAME).pin

    def another(request: Request, number: int, forward: Forward) -> Reply:
        reply = forward(request)
        return Reply(reply.status, _headers(reply, ETag='"another"', X_Goog_Generation="1"), reply.chunks)

    bucket.proxy.on_request(_of_reads(another))
    with pytest.raises(PinError, match=f"pinned {re.escape(pin)}, found "):
        _read(store, pin)


def test_an_object_that_is_gone_is_told(bucket):
    store = bucket.store()
    pin = store.stat(NAME).pin
    bucket.proxy.on_request(lambda request, forward: Reply(404, [("Content-Length", "0")]))
    with pytest.raises(PinError, match=f"pinned {re.escape(pin)}, found no such object"):
        _read(store, pin)
    assert store.stat(NAME) is None


@pytest.fixture(scope="module")
def versioned(s3) -> str:
    """The URI of a bucket that keeps versions."""
    import s3fs

    fs = s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    fs.call_s3("create_bucket", Bucket="versioned")
    fs.call_s3("put_bucket_versioning", Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    return "s3://versioned"


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
@pytest.mark.parametrize("how", ["not", "again", "overwrite", "delete"])
def test_in_a_bucket_with_versions_an_upload_is_pinned_and_not_only_its_bytes(s3, versioned, tmp_path, backend, how):
    import s3fs

    fs = s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    uri = f"{versioned}/{backend}-{how}"
    fs.pipe_file(f"{uri}/{NAME}", DATA)
    store = Store(Access(uri, s3.storage_options, 4, PATIENCE, backend), retries=2, deadline=60)
    stat = store.stat(NAME)
    etag, version = stat.pin.split()
    assert fs.info(f"{uri}/{NAME}", refresh=True)["ETag"] == etag
    assert store.checksum(NAME, stat.pin).algorithm == "CRC32"
    if how == "not":
        assert _read(store, stat.pin) == DATA[START : START + SIZE]
        return
    if how == "delete":
        fs.rm_file(f"{uri}/{NAME}")
    else:
        fs.pipe_file(f"{uri}/{NAME}", DATA if how == "again" else DATA[::-1])
    now = "no such object" if how == "delete" else Store(Access(uri, s3.storage_options, 4, 30), retries=0, deadline=9)
    told = re.escape(now if isinstance(now, str) else now.stat(NAME).pin)
    for asked in (lambda: _read(store, stat.pin), lambda: store.checksum(NAME, stat.pin)):
        with pytest.raises(PinError, match=f"pinned {re.escape(etag)} {version}, found {told}"):
            asked()


def test_a_file_that_is_said_to_be_gone_and_is_not(reads):
    store = reads.store()
    pin = store.stat(NAME).pin
    reads.proxy.on_request(_of_reads(_status(404)))
    assert _read(store, pin) == DATA[START : START + SIZE]
    assert store.tally.retries == 2


def test_nobody_answers(bucket):
    bucket.proxy.__exit__()
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"2 tries; read\.retries is 1.*Check the endpoint and the network"):
        bucket.store(retries=1).stat(NAME)
    assert time.monotonic() - begun < PATIENCE


def test_the_deadline_and_closing_end_the_tries(bucket):
    bucket.proxy.on_request(lambda request, forward: Reply(503, [("Content-Length", "0")]))
    closed, hasty = bucket.store(retries=1000), bucket.store(retries=1000, deadline=0.5)
    closed.close()
    begun = time.monotonic()
    with pytest.raises(StoreError):
        hasty.stat(NAME)
    with pytest.raises(StoreError, match="1 tries"):
        closed.stat(NAME)
    assert time.monotonic() - begun < PATIENCE


# Secrets


def test_a_signed_urls_query_and_password_are_never_told(tmp_path):
    (tmp_path / NAME).write_bytes(DATA)
    with http_server(tmp_path) as url, CountingProxy(url) as proxy:
        signed = f"{proxy.url.replace('://', f'://me:{SECRET}@')}/?X-Amz-Signature={SECRET}"
        access = Access(signed, {}, 1, TIMEOUT)
        hooks: list[Callable[[Request, Forward], Reply]] = [
            lambda request, forward: Reply(403, [("Content-Length", "0")]),
            lambda request, forward: Reply(500, [("Content-Length", "0")]),
            lambda request, forward: Reply(302, [("Content-Length", "0"), ("Location", request.target)]),
        ]
        for hook in hooks:
            proxy.on_request(hook)
            store = Store(access, retries=0, deadline=10)
            assert SECRET not in repr(access)[: repr(access).index("uri=")]
            with pytest.raises(LoaderError) as raised:
                store.stat(NAME)
            assert not any(SECRET in text for text in _chain(raised.value))
        assert any(SECRET in request.target for request in proxy.requests)


def _chain(error: BaseException | None) -> Iterator[str]:
    """What a traceback would show."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_options_are_never_told():
    secrets = Secrets({"key": "AKIAXYZ", "nested": {"token": [SECRET]}, "endpoint_url": "http://minio:9000", "n": 3})
    told = secrets.hide(f"AKIAXYZ at http://me:pw@minio:9000/b?sig=1&x={SECRET} {SECRET}")
    assert told == "*** at http://minio:9000/b?*** ***"
    inner = ValueError(f"token {SECRET}")
    outer = OSError("no")
    outer.__cause__ = inner
    assert secrets.cause(outer) is None
    inner.args = ("token",)
    assert secrets.cause(outer) is outer
    inner.__cause__ = inner  # as s3fs's may be
    assert secrets.cause(outer) is outer


@pytest.mark.parametrize(
    "options", [{"key": SECRET}, {"secrett": SECRET}, {"key": SECRET, "secret": SECRET}], ids=["half", "typo", "wrong"]
)
def test_credentials_that_do_not_fit_are_told_without_them(s3, monkeypatch, options):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(CatalogError) as raised:
        Store(Access("s3://loader/x", options, 1, TIMEOUT), retries=0, deadline=10).names()
    assert not any(SECRET in text for text in _chain(raised.value))


# Parts


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/llama/model.safetensors", ("s3://b/llama", NAME)),
        ("s3://b/llama/", ("s3://b/llama", None)),
        ("https://h/llama/model.safetensors?sig=a/b", ("https://h/llama?sig=a/b", NAME)),
        ("/data/what?.safetensors", ("/data", "what?.safetensors")),
        (NAME, (".", NAME)),
        ("/", ("/", None)),
    ],
)
def test_a_uri_names_a_directory_or_a_file(uri, parts):
    assert split_uri(uri) == parts


def test_a_reply_is_the_range_or_nothing():
    check_reply(status=206, content_range="bytes 5-9/100", start=5, size=5)
    for status, told in [(200, None), (204, None), (206, None), (206, "bytes 5-8/100"), (206, "bytes 4-8/100")]:
        with pytest.raises(Transient):
            check_reply(status=status, content_range=told, start=5, size=5)
    filler = Filler(memoryview(bytearray(4)))
    filler.add(b"ab")
    with pytest.raises(Transient, match="ended 2 bytes early") as raised:
        filler.finish()
    assert raised.value.filled == 2
    with pytest.raises(Transient, match="longer than the 4 bytes"):
        filler.add(b"cde")
    assert filler.filled == 0


def test_a_status_means_one_thing_for_all_schemes():
    assert refusal(200, "") is refusal(206, "") is None
    assert {type(refusal(status, "")) for status in (404, 410, 412, 416)} == {FileNotFoundError}
    assert {type(refusal(status, "")) for status in (401, 403)} == {PermissionError}
    assert {type(refusal(status, "")) for status in (408, 429, 500, 502, 503, 504)} == {Transient}
    assert {type(refusal(status, "")) for status in (301, 400, 405)} == {Unusable}
