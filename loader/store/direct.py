"""Ranges over HTTP, received by the reading thread itself straight into its buffer: no event loop and no copy between.

A scheme says where a file is and how a request is signed; what is left is the kernel's and TLS's work.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, ReadTimeoutError, SSLError
from urllib3.util import parse_url

from loader.store.base import (
    PIECE,
    Address,
    Addressed,
    Checksum,
    Late,
    Stat,
    Transient,
    Unusable,
    asked_wait,
    changed,
    check_reply,
    checksum_of,
    told,
)

ERROR_BYTES = 16 * 1024
"""Of an error's body, which says in words what the status does not."""


class Direct:
    """A scheme whose ranges are read so."""

    def __init__(self, scheme: Addressed, *, concurrency: int, timeout: float, until: float) -> None:
        """`concurrency` connections are kept; `timeout` in seconds is for a connection, and between arrivals.

        At `until` (monotonic) all reading ends.
        """
        self._scheme = scheme
        self._timeout = timeout
        self._options: dict[str, Any] = {
            "num_pools": 64,  # of hosts: more than a load's signed URLs name
            "maxsize": concurrency,
            "retries": False,  # the one retry layer is the store's
            "ca_certs": _authorities(),
        }
        self._managers: dict[str, urllib3.PoolManager] = {}  # by proxy
        self._ways: dict[str, Callable[..., urllib3.BaseHTTPResponse]] = {}  # by URL: to parse one takes 0.3 ms
        self._addresses: dict[tuple[str, str], Address] = {}
        self._lock = threading.Lock()
        self._receiving: set[socket.socket] = set()
        self._closed = False
        self._until = until
        self._alarm: threading.Timer | None = None

    def close(self) -> None:
        """End what is being received: a server may send a byte now and then for ever."""
        with self._lock:
            self._closed = True
            for connection in self._receiving:
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS's own would take its state away

    def names(self) -> list[str] | None:
        return self._scheme.names()

    def stat(self, name: str) -> Stat:
        return self._scheme.stat(name)

    def checksum(self, name: str, pin: str) -> Checksum | str:
        return checksum_of(self._scheme, name, pin)

    def read(self, name: str, pin: str, start: int, buffer: memoryview, silence: float) -> None:
        address = self._addresses.get((name, pin))
        if address is None:
            address = self._addresses[name, pin] = self._scheme.address(name, pin)
        wanted = {"Range": f"bytes={start}-{start + len(buffer) - 1}", "Accept-Encoding": "identity"}
        reply = self._get(address, wanted, silence)
        try:
            with self._interruptible(reply):
                self._check(reply, name, pin, start, len(buffer))
                _receive(reply, buffer)
        except BaseException:
            reply.close()  # what is left in it would be taken for the next reply
            raise
        reply.release_conn()

    @contextmanager
    def _interruptible(self, reply: urllib3.BaseHTTPResponse) -> Iterator[None]:
        """Let `close` end the receiving of this reply, and be called when all reading ends."""
        file: Any = reply._original_response.fp  # type: ignore[attr-defined]  # noqa: SLF001 - the connection has let go of a socket that is to be closed
        if file is None:  # there is no body
            yield
            return
        connection = file.raw._sock  # noqa: SLF001
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
                if not self._receiving and self._alarm is not None:
                    self._alarm.cancel()
                    self._alarm = None

    def _check(self, reply: urllib3.BaseHTTPResponse, name: str, pin: str, start: int, size: int) -> None:
        if reply.status != 206 and (error := self._refusal(reply)) is not None:
            raise error
        check_reply(status=reply.status, content_range=reply.headers.get("Content-Range"), start=start, size=size)
        if (found := self._scheme.pin_of(reply.headers, pin)) != pin:
            raise changed(name, pin, found)

    def _refusal(self, reply: urllib3.BaseHTTPResponse) -> Exception | None:
        try:
            body = reply.read(ERROR_BYTES)
        except (HTTPError, OSError) as error:
            return Transient(told(error))
        refused = self._scheme.refusal(reply.status, reply.reason or "", body)
        if isinstance(refused, Transient):
            refused.retry_after = asked_wait(reply.headers.get("Retry-After"))
        return refused

    def _get(self, address: Address, headers: Mapping[str, str], silence: float) -> urllib3.BaseHTTPResponse:
        try:
            return self._way(address.url)(
                headers={**address.headers, **headers},
                preload_content=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=self._timeout, read=min(silence, self._timeout)),
            )
        except LocationParseError as error:
            raise Unusable("this is no valid URL") from error
        except SSLError as error:
            raise Unusable(f"the server's certificate was not accepted: {told(error)}") from error
        except ReadTimeoutError as error:
            raise Late(told(error)) from error
        except (HTTPError, OSError) as error:
            raise Transient(told(error)) from error

    def _way(self, url: str) -> Callable[..., urllib3.BaseHTTPResponse]:
        """How `url` is asked for: through the environment's proxy, or none."""
        if url not in self._ways:
            parts = urlsplit(url)
            proxy = "" if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme, "")
            manager = self._manager(proxy)
            pool = manager if proxy else manager.connection_from_url(url)
            self._ways[url] = partial(pool.urlopen, "GET", url if proxy else parse_url(url).request_uri)
        return self._ways[url]

    def _manager(self, proxy: str) -> urllib3.PoolManager:
        with self._lock:
            if proxy not in self._managers:
                make = urllib3.PoolManager if not proxy else partial(urllib3.ProxyManager, proxy)
                self._managers[proxy] = make(**self._options)
            return self._managers[proxy]


def _receive(reply: urllib3.BaseHTTPResponse, buffer: memoryview) -> None:
    """Fill `buffer` with the reply's body, and see that it ends there."""
    body: Any = reply._original_response  # type: ignore[attr-defined]  # noqa: SLF001 - urllib3's own `readinto` reads into memory of its own first
    filled = 0
    try:
        while filled < len(buffer):
            count = body.readinto(buffer[filled : filled + PIECE])
            if not count:
                raise Transient(f"the body ended {len(buffer) - filled} bytes early", filled=filled)
            filled += count
        if body.read(1):
            raise Transient(f"the body is longer than the {len(buffer)} bytes asked for", filled=0)
    except TimeoutError as error:
        raise Late(told(error), filled=filled) from error
    except (OSError, HTTPException) as error:
        raise Transient(told(error), filled=filled) from error


def _authorities() -> str:
    """The certificates of the authorities to trust: where the environment says, as others read it, or certifi's."""
    named = (os.environ.get(name) for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"))
    return next(filter(None, named), certifi.where())
