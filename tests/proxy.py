"""A proxy that counts, at the server's side, what a server serves, and can make it misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import re
import socket
import socketserver
import struct
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from email.message import Message
from typing import Any, Self


@dataclasses.dataclass
class Request:
    """One request as the proxy saw it. `rank` is its listener's; `body_bytes` counts what was really sent in reply."""

    rank: int
    method: str
    target: str
    headers: Message
    body: bytes
    client_port: int
    status: int = 0
    body_bytes: int = 0

    @property
    def path(self) -> str:
        """Decoded, without the query."""
        return urllib.parse.unquote(self.target.partition("?")[0])

    @property
    def range(self) -> str | None:
        return self.headers["Range"]

    @property
    def span(self) -> tuple[int, int]:
        """The bytes `[first, stop)` of the object that were asked for with a range, all of which were served."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.range or "")
        assert found, self.range
        first, stop = int(found[1]), int(found[2]) + 1
        assert (self.status, self.body_bytes) == (206, stop - first)
        return first, stop


@dataclasses.dataclass
class Reply:
    """What goes back. `chunks` is consumed while it is sent; without a Content-Length in `headers` it is framed."""

    status: int
    headers: list[tuple[str, str]]
    chunks: Iterable[bytes | memoryview] = ()


Forward = Callable[[Request], Reply]
Hook = Callable[[Request, Forward], Reply]


class CountingProxy:
    """A reverse proxy that keeps a record of every request, with a listener for each rank to tell the ranks apart.

    Headers pass unchanged, Host too, for S3 signs it. A hook may stand between: it gets the request and a function that
    forwards it, and returns a reply of its own, or the reply to a changed request, or a changed reply. Where it, or the
    chunks that it gives, raise ConnectionError, the client's connection is reset.
    """

    def __init__(self, target: str, listeners: int = 1, *, address: str = "127.0.0.1") -> None:
        parts = urllib.parse.urlsplit(target)
        assert parts.hostname is not None
        self.target = (parts.hostname, parts.port)
        self.requests: list[Request] = []
        self.hook: Hook = lambda request, forward: forward(request)
        self._listeners = [_Listener(self, rank, address) for rank in range(listeners)]

    def __enter__(self) -> Self:
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
            listener.close_connections()

    def url_for(self, rank: int) -> str:
        address, port = self._listeners[rank].server_address
        return f"http://{address}:{port}"

    @property
    def url(self) -> str:
        return self.url_for(0)

    def on_request(self, hook: Hook) -> None:
        self.hook = hook

    def reset(self) -> None:
        """Forget the requests so far, and the hook."""
        self.requests = []
        self.hook = lambda request, forward: forward(request)

    def select(self, suffix: str = "", *, rank: int | None = None) -> list[Request]:
        """GETs of objects whose name ends with `suffix`."""
        return [
            request
            for request in list(self.requests)
            if request.method == "GET" and request.path.endswith(suffix) and rank in {None, request.rank}
        ]

    def bytes_served(self, suffix: str = "", *, rank: int | None = None) -> int:
        return sum(request.body_bytes for request in self.select(suffix, rank=rank))

    def gets(self, suffix: str = "", *, rank: int | None = None) -> int:
        """How many ranged GETs."""
        return sum(request.range is not None for request in self.select(suffix, rank=rank))


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: CountingProxy, rank: int, address: str) -> None:
        self.proxy = proxy
        self.rank = rank
        self.connections: set[socket.socket] = set()
        super().__init__((address, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close without the usual shutdown before it, which would turn a reset into an orderly end."""
        self.connections.discard(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none; what else goes wrong here is told, as always."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One client connection, with a connection to the server of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(*self.server.proxy.target, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def relay(self) -> None:
        proxy = self.server.proxy
        body = self._read_body()
        request = Request(self.server.rank, self.command, self.path, self.headers, body, self.client_address[1])
        proxy.requests.append(request)
        try:
            self._send(request, proxy.hook(request, self._forward))
        except ConnectionError:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay  # noqa: N815 - the base class's names

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        del self.headers["Transfer-Encoding"]
        body = b"".join(parts)
        self.headers["Content-Length"] = str(len(body))
        return body

    def _forward(self, request: Request) -> Reply:
        for last in (False, True):
            try:
                self.upstream.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
                for name, value in request.headers.items():
                    if name.lower() not in {"connection", "expect"}:
                        self.upstream.putheader(name, value)
                self.upstream.endheaders(request.body or None)
                response = self.upstream.getresponse()
                break
            except (ConnectionError, http.client.CannotSendRequest):
                self.upstream.close()  # the server may have closed a connection that was idle
                if last:
                    raise
        kept = [h for h in response.getheaders() if h[0].lower() not in {"connection", "transfer-encoding"}]
        return Reply(response.status, kept, self._chunks(response))

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(1 << 18))
        try:
            while size := response.readinto(buffer):
                yield buffer[:size]
        finally:
            if not response.isclosed():
                self.upstream.close()  # what is left of the body would be taken for the next reply

    def _send(self, request: Request, reply: Reply) -> None:
        request.status = reply.status
        framed = request.method != "HEAD" and not any(name.lower() == "content-length" for name, _ in reply.headers)
        framed &= reply.status not in {204, 304}
        self.send_response_only(reply.status)
        for name, value in [*reply.headers, *([("Transfer-Encoding", "chunked")] if framed else [])]:
            self.send_header(name, value)
        self.end_headers()
        for chunk in reply.chunks:
            request.body_bytes += len(chunk)  # before it goes: a client that has it may look at once
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if framed else chunk)
        if framed:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        """The record is the log."""
