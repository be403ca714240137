"""Ranges over HTTP, received by the reading thread itself straight into its buffer: no event loop and no copy between.

A scheme says where a file is and how a request is signed; what is left is the kernel's and TLS's work.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPException, HTTPResponse

from loader.store.base import (
    PIECE,
    Address,
    Addressed,
    Checksum,
    IsLate,
    Late,
    Stat,
    Transient,
    asked_wait,
    changed,
    check_reply,
    checksum_of,
    told,
)
from loader.store.connections import Connections

ERROR_BYTES = 16 * 1024
"""Of an error's body, which says in words what the status does not."""


class Direct:
    """A scheme whose ranges are read so."""

    ends_when_closed = True

    def __init__(self, scheme: Addressed, *, timeout: float, until: float) -> None:
        """`timeout` in seconds is for a connection, and between arrivals. At `until` (monotonic) all reading ends."""
        self._scheme = scheme
        self._timeout = timeout
        self._connections = Connections(timeout)
        self._addresses: dict[tuple[str, str], Address] = {}
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._receiving: set[socket.socket] = set()
        self._closed = False
        self._until = until
        self._alarm: threading.Timer | None = None

    def close(self) -> None:
        """End what is being received: a server may send a byte now and then for ever. Idle connections are closed.

        When it returns nothing is written to any buffer any more.
        """
        with self._lock:
            self._closed = True
            for connection in self._receiving:
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS's own would take its state away
            self._ended.wait_for(lambda: not self._receiving)
        self._connections.close()

    def prepare(self) -> None:
        """What the first range would wait for, where the scheme tells. Raises as `read` does."""
        if any_address := getattr(self._scheme, "any_address", None):
            self._connections.prepare(any_address().url)

    def names(self) -> list[str] | None:
        return self._scheme.names()

    def stat(self, name: str) -> Stat:
        return self._scheme.stat(name)

    def checksum(self, name: str, pin: str) -> Checksum | str:
        return checksum_of(self._scheme, name, pin)

    def read(self, name: str, pin: str, start: int, buffer: memoryview, late: IsLate) -> None:
        address = self._addresses.get((name, pin))
        if address is None:
            address = self._addresses[name, pin] = self._scheme.address(name, pin)
        wanted = {"Range": f"bytes={start}-{start + len(buffer) - 1}", "Accept-Encoding": "identity"}
        look = partial(self._look, late)
        with (
            self._connections.lent(address.url) as lent,
            self._interruptible(lent.socket),
            closing(lent.get({**address.headers, **wanted}, look)) as reply,  # it may have taken the socket over
        ):
            if self._closed:  # which passes for the head's end
                raise Transient("all reading has ended")
            self._check(reply, name, pin, start, len(buffer))
            _receive(reply, buffer)

    @contextmanager
    def _interruptible(self, connection: socket.socket) -> Iterator[None]:
        """Let `close` end what is received on this connection, and be called when all reading ends."""
        with self._lock:
            if self._closed:
                raise Transient("all reading has ended")
            self._receiving.add(connection)
            if self._alarm is None:
                seconds = min(max(0.0, self._until - time.monotonic()), threading.TIMEOUT_MAX)
                self._alarm = threading.Timer(seconds, self.close)
                self._alarm.name, self._alarm.daemon = "loader-deadline", True
                self._alarm.start()
        try:
            yield
        finally:
            with self._lock:
                self._receiving.discard(connection)
                self._ended.notify_all()
                if not self._receiving and self._alarm is not None:
                    self._alarm.cancel()
                    self._alarm = None

    def _look(self, late: IsLate, silent: float) -> None:
        if silent > self._timeout:
            raise Transient(f"nothing came for {self._timeout:g} s (read.timeout)")
        if late(silent):
            raise Late(f"nothing came for {silent:.1f} s")

    def _check(self, reply: HTTPResponse, name: str, pin: str, start: int, size: int) -> None:
        if reply.status != 206 and (error := self._refusal(reply)) is not None:
            raise error
        check_reply(status=reply.status, content_range=reply.headers.get("Content-Range"), start=start, size=size)
        if (found := self._scheme.pin_of(reply.headers, pin)) != pin:  # type: ignore[arg-type]  # a mapping but by class
            raise changed(name, pin, found)

    def _refusal(self, reply: HTTPResponse) -> Exception | None:
        try:
            body = reply.read(ERROR_BYTES)
        except (HTTPException, OSError, Transient):  # the status says enough
            body = b""
        refused = self._scheme.refusal(reply.status, reply.reason or "", body)
        if isinstance(refused, Transient):
            refused.retry_after = asked_wait(reply.headers.get("Retry-After"))
        return refused


def _receive(reply: HTTPResponse, buffer: memoryview) -> None:
    """Fill `buffer` with the reply's body, and see that it ends there."""
    filled = 0
    try:
        while filled < len(buffer) and (count := reply.readinto(buffer[filled : filled + PIECE])):
            filled += count
        longer = filled == len(buffer) and reply.read(1)
    except Transient as error:  # nothing came
        error.filled = filled
        raise
    except (OSError, HTTPException) as error:
        raise Transient(told(error), filled=filled) from error
    if filled < len(buffer):
        raise Transient(f"the body ended {len(buffer) - filled} bytes early", filled=filled)
    if longer:
        raise Transient(f"the body is longer than the {len(buffer)} bytes asked for", filled=0)
