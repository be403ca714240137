"""How a server is reached whose ranges are read straight over HTTP: its connections, the environment's proxies, users
and passwords in URLs, and characters that are to be encoded."""

from __future__ import annotations

import contextlib
import gc
import select
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator

import psutil
import pytest

from loader.errors import CatalogError, StoreError
from loader.store import connections
from loader.store.base import Access, Backend
from loader.store.store import Store
from tests.proxy import CountingProxy, Reply
from tests.servers import http_server
from tests.store.test_tls import self_signed

DATA = bytes(range(256)) * 40
NAME = "model.safetensors"
ALLOWED = f"Basic {b64encode(b'me:pa/ss').decode()}"
NAMED = "me:pa%2Fss@"


def _patiently(_: float) -> None:
    """However long nothing comes."""


def store_at(url: str, backend: Backend = "direct", **options: object) -> Store:
    return Store(Access(url, dict(options), 4, 30.0, backend), retries=0, deadline=60)


def read(store: Store, name: str = NAME) -> bytes:
    buffer = bytearray(1000)
    stat = store.stat(name)
    assert stat is not None
    store.read(name, stat.pin, 100, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
def served(tmp_path) -> Iterator[CountingProxy]:
    (tmp_path / NAME).write_bytes(DATA)
    with http_server(tmp_path) as url, CountingProxy(url) as proxy:
        yield proxy


def gets(proxy: CountingProxy) -> list:
    return [request for request in proxy.requests if request.range]


def test_a_connection_is_kept_for_as_long_as_no_server_closes_it(served, monkeypatch):
    monkeypatch.setattr(connections, "FRESH", 60.0)
    store = store_at(served.url)
    for _ in range(3):
        assert read(store) == DATA[100:1100]
    assert len({request.client_port for request in gets(served)}) == 1
    monkeypatch.setattr(connections, "FRESH", 0.0)
    assert read(store) == DATA[100:1100]
    assert len({request.client_port for request in gets(served)}) == 2
    assert {request.headers["User-Agent"] for request in gets(served)} == {connections.AGENT}
    store.close()


def test_a_header_is_sent_once_however_its_name_is_written(served):
    store = store_at(served.url, headers={"user-agent": "me", "accept-encoding": "gzip", "X-Mine": "1"})
    assert read(store) == DATA[100:1100]
    (request,) = gets(served)
    for name, values in {"User-Agent": ["me"], "Accept-Encoding": ["identity"], "X-Mine": ["1"]}.items():
        assert request.headers.get_all(name) == values


def test_a_server_that_says_that_it_closes_a_connection(served):
    def closing(request, forward):
        reply = forward(request)
        return Reply(reply.status, [*reply.headers, ("Connection", "close")], reply.chunks)

    served.on_request(closing)
    store = store_at(served.url)
    for _ in range(3):
        assert read(store) == DATA[100:1100]
    assert len({request.client_port for request in gets(served)}) == 3
    assert store.tally.retries == 0


NAMES = ["model 1.safetensors", "modèle+1.safetensors", "model%201.safetensors", "100%.safetensors"]


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_asked_for_as_the_schemes_own_client_does(served, tmp_path, backend, name):
    (tmp_path / "model 1.safetensors").write_bytes(DATA)
    (tmp_path / name).write_bytes(DATA)
    store = store_at(served.url, backend)
    assert read(store, name) == DATA[100:1100]
    assert len({request.target for request in served.requests}) == 1, "as it was asked for its size"


@contextlib.contextmanager
def hasty_server() -> Iterator[tuple[int, list[bytes]]]:
    """Answers one request of each connection and closes it, without having said so; gives its port, and what came."""
    came: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    came.append(connection.recv(65536))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], came
        server.shutdown(socket.SHUT_RDWR)


def test_a_server_that_closes_an_idle_connection_without_a_word():
    reader = connections.Connections(10.0)
    with hasty_server() as (port, came):
        for number in range(3):
            with reader.lent(f"http://127.0.0.1:{port}/{number}") as lent:
                assert lent.get({}, _patiently).read() == b"ok"
            assert select.select([lent.socket], [], [], 10)[0], "the end of the connection has come"
    assert len(came) == 3
    reader.close()


def test_a_failed_reply_leaves_no_socket_open(served):
    """Not until the garbage is collected either: a bucket in trouble may close each connection."""
    store = store_at(served.url)
    pin = store.stat(NAME).pin
    told = {"Connection": "close", "Content-Range": "bytes 5-14/100", "Content-Length": "10"}
    served.on_request(lambda *_: Reply(206, [*told.items()], [bytes(10)]))
    gc.disable()
    try:
        before = psutil.Process().num_fds()
        for _ in range(10):
            with pytest.raises(StoreError, match="expected Content-Range"):
                store.read(NAME, pin, 0, memoryview(bytearray(10)))
        until = time.monotonic() + 30
        while psutil.Process().num_fds() > before + 3:  # the proxy, which is in this process, closes its own
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
def test_a_user_and_a_password_in_the_url(served, backend):
    unknown = Reply(401, [("Content-Length", "0")])
    served.on_request(lambda r, forward: forward(r) if r.headers["Authorization"] == ALLOWED else unknown)
    assert read(store_at(served.url.replace("//", f"//{NAMED}"), backend)) == DATA[100:1100]
    with pytest.raises(CatalogError, match="status 401"):
        read(store_at(served.url, backend))


def test_a_header_that_cannot_be_sent_is_not_told(served):
    with (
        pytest.raises(connections.Unusable, match="a header of the request has characters that HTTP does not") as told,
        connections.Connections(10.0).lent(f"{served.url}/{NAME}") as lent,
    ):
        lent.get({"Authorization": "Bearer sec\nret"}, _patiently)
    assert told.value.__cause__ is None
    assert told.value.__suppress_context__


class Tunnel:
    """A proxy that takes CONNECT, from those whom it knows."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]

    @contextlib.contextmanager
    def open(self) -> Iterator[Tunnel]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            request, *headers = head.decode().splitlines()
            self.asked.append(request)
            if f"Proxy-Authorization: {ALLOWED}" not in headers:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            host, port = request.split()[1].rsplit(":", 1)
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_pass_on, args=(server, client))
                back.start()
                _pass_on(client, server)
                back.join()


def _pass_on(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)


def test_tls_through_a_proxy_that_asks_who_it_is(tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(DATA)
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("no_proxy", "")
    with http_server(tmp_path, tls=context) as url, Tunnel().open() as tunnel:
        reader, buffer = connections.Connections(10.0), bytearray(len(DATA))
        for named in ("", NAMED):
            monkeypatch.setenv("https_proxy", f"{named}127.0.0.1:{tunnel.port}")
            if named:
                with connections.Connections(10.0).lent(f"{url}/{NAME}") as lent:
                    assert lent.get({}, _patiently).readinto(buffer) == len(DATA)
                assert bytes(buffer) == DATA
            else:
                with pytest.raises(connections.Transient, match="407"), reader.lent(f"{url}/{NAME}"):
                    pass
        assert [asked.rsplit(" ", 1)[0] for asked in tunnel.asked] == [f"CONNECT {url.removeprefix('https://')}"] * 2
        reader.close()


def test_a_proxy_with_a_user_and_without_tls(served, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", served.url.replace("//", f"//{NAMED}"))
    reader = connections.Connections(10.0)
    with reader.lent("http://elsewhere.test/model.safetensors?a=b") as lent:
        lent.get({}, _patiently).read()
    (request,) = served.requests
    assert request.target == "http://elsewhere.test/model.safetensors?a=b"
    assert (request.headers["Host"], request.headers["Proxy-Authorization"]) == ("elsewhere.test", ALLOWED)
    reader.close()


@pytest.mark.parametrize(
    ("host", "asked"),
    [("bücher.test", "xn--bcher-kva.test"), ("Bucket.TEST", "bucket.test"), ("[::1]:8080", "[::1]:8080")],
)
def test_hosts_through_a_proxy(served, monkeypatch, host, asked):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", served.url.removeprefix("http://"))
    reader = connections.Connections(10.0)
    with reader.lent(f"http://{host}/x") as lent:
        lent.get({}, _patiently).read()
    (request,) = served.requests
    assert (request.target, request.headers["Host"]) == (f"http://{asked}/x", asked)
    reader.close()


INVALID = ["ftp://host/x", "http://", "http://host:port/x", "http://ho st/x", f"http://{'a' * 64}.b/"]


@pytest.mark.parametrize("url", INVALID)
def test_no_valid_url(url):
    with pytest.raises(connections.Unusable, match="no valid URL"), connections.Connections(10.0).lent(url):
        pass


@pytest.mark.parametrize(
    ("proxy", "url", "says"),
    [
        ("https://proxy.test", "https://host.test/", r"a proxy over TLS.*read\.backend: fsspec"),
        ("http://proxy.test", "https://[::1]/", r"to an IPv6 address.*read\.backend: fsspec"),
        ("socks5://me:secret@proxy.test", "https://host.test/", "names as the proxy for https:// is no http:// URL"),
    ],
)
def test_a_proxy_that_does_not_do(monkeypatch, proxy, url, says):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(connections.Unusable, match=says), connections.Connections(10.0).lent(url):
        pass


def test_certificates_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "nowhere.pem"))
    says = r"authorities at .*nowhere\.pem cannot be read"
    with (
        pytest.raises(connections.Unusable, match=says),
        connections.Connections(10.0).lent("https://host.test/"),
    ):
        pass
