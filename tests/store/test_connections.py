"""How a server is reached whose ranges are read straight over HTTP: its connections, the environment's proxies, users
and passwords in URLs, and characters that are to be encoded."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator

import pytest

from loader.errors import CatalogError
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


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
@pytest.mark.parametrize("name", ["model 1.safetensors", "modèle+1.safetensors", "model%201.safetensors"])
def test_a_name_is_asked_for_as_the_schemes_own_client_does(served, tmp_path, backend, name):
    (tmp_path / "model 1.safetensors").write_bytes(DATA)
    (tmp_path / name).write_bytes(DATA)
    store = store_at(served.url, backend)
    assert read(store, name) == DATA[100:1100]
    assert len({request.target for request in served.requests}) == 1, "as it was asked for its size"


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
        connections.Connections(10.0).lent(f"{served.url}/{NAME}", 10.0) as lent,
    ):
        lent.get({"Authorization": "Bearer sec\nret"})
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
                with connections.Connections(10.0).lent(f"{url}/{NAME}", 10.0) as lent:
                    assert lent.get({}).readinto(buffer) == len(DATA)
                assert bytes(buffer) == DATA
            else:
                with pytest.raises(connections.Transient, match="407"), reader.lent(f"{url}/{NAME}", 10.0):
                    pass
        assert tunnel.asked == [f"CONNECT {url.removeprefix('https://')} HTTP/1.0"] * 2
        reader.close()


def test_a_proxy_with_a_user_and_without_tls(served, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", served.url.replace("//", f"//{NAMED}"))
    reader = connections.Connections(10.0)
    with reader.lent("http://elsewhere.test/model.safetensors?a=b", 10.0) as lent:
        lent.get({}).read()
    (request,) = served.requests
    assert request.target == "http://elsewhere.test/model.safetensors?a=b"
    assert (request.headers["Host"], request.headers["Proxy-Authorization"]) == ("elsewhere.test", ALLOWED)
    reader.close()


INVALID = ["ftp://host/x", "http://", "http://host:port/x", "http://ho st/x", f"http://{'a' * 64}.b/"]


@pytest.mark.parametrize("url", INVALID)
def test_no_valid_url(url):
    with pytest.raises(connections.Unusable, match="no valid URL"), connections.Connections(10.0).lent(url, 10.0):
        pass


def test_a_proxy_over_tls_is_left_to_the_client_library(monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("https_proxy", "https://proxy.test")
    with (
        pytest.raises(connections.Unusable, match=r"read\.backend: fsspec"),
        connections.Connections(10.0).lent("https://host.test/", 10.0),
    ):
        pass
