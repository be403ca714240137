"""HTTP connections that are kept, each lent to one thread at a time, through the environment's proxies.

They are the standard library's: urllib3's pool and replies took 15% more CPU for ranges of 8 MiB on 16 threads.
"""

from __future__ import annotations

import os
import platform
import ssl
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, InvalidURL
from socket import socket
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi

from loader.store.base import Late, Transient, Unusable, told

FRESH = 2.0
"""Seconds for which an idle connection is used again. Many servers close one after 5, and do not say so."""

AGENT = f"Python/{platform.python_version()} http.client"
"""Who asks, unless the address says: some servers refuse whoever does not tell."""

AS_IT_IS = "!#$%&'()*+,/:;=?@[]~"
"""What is not to be encoded: characters with a meaning in a URL, and those of what is encoded already."""


class Place(NamedTuple):
    """Where a connection leads."""

    tls: bool
    host: str
    port: int


class Way(NamedTuple):
    """How a URL is asked for: what the request says, how a connection is made, and those that are idle, with the time
    (monotonic) since when."""

    target: str
    headers: dict[str, str]
    connect: Callable[[], HTTPConnection]
    idle: deque[tuple[float, HTTPConnection]]


class Lent(NamedTuple):
    """A connection, for one request."""

    way: Way
    connection: HTTPConnection
    socket: socket

    def get(self, headers: Mapping[str, str]) -> HTTPResponse:
        """The reply, whose body is to be read to its end. Raises Late, Transient and Unusable."""
        try:
            said = ({"User-Agent": AGENT}, self.way.headers, headers)  # each instead of those before, in any case
            once = {name.title(): value for each in said for name, value in each.items()}
            self.connection.request("GET", self.way.target, headers=once)
            return self.connection.getresponse()
        except TimeoutError as error:
            raise Late(told(error)) from error
        except (OSError, HTTPException) as error:
            raise Transient(told(error)) from error
        except ValueError:
            raise Unusable("a header of the request has characters that HTTP does not allow") from None


class Connections:
    """Its methods may be called from many threads."""

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds is for a connection to be made."""
        self._timeout = timeout
        self._ways: dict[str, Way] = {}
        self._idle: dict[tuple[Place, Place | None], deque[tuple[float, HTTPConnection]]] = {}

    @contextmanager
    def lent(self, url: str, silence: float) -> Iterator[Lent]:
        """A connection for `url`, on which `silence` seconds without a byte are a TimeoutError.

        It is kept, unless the context ends with an error: what is left of a reply would be taken for the next one.
        Raises Transient where none can be made, and Unusable for a URL, a proxy or a certificate that does not do.
        """
        way = self._ways.get(url) or self._ways.setdefault(url, self._way(url))
        connection = _last(way.idle, time.monotonic() - FRESH) or way.connect()
        try:
            connection.sock.settimeout(silence)
            yield Lent(way, connection, connection.sock)
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None:  # the server has not said that it closes it
            way.idle.append((time.monotonic(), connection))

    def prepare(self, url: str) -> None:
        """Read the certificates, where `url` takes any."""
        if url.startswith("https://"):
            _ = self._trusted

    def close(self) -> None:
        """Close those that nobody uses."""
        for idle in list(self._idle.values()):
            while connection := _last(idle):
                connection.close()

    def _way(self, url: str) -> Way:
        try:
            parts = urlsplit(url)
            place, proxy = _place(parts), _proxy_for(parts)
            via = _place(proxy) if proxy else None
        except ValueError:
            raise Unusable("this is no valid URL") from None
        target = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe=AS_IT_IS)
        headers, allowed = _basic("Authorization", parts), _basic("Proxy-Authorization", proxy)
        if via and via.tls:
            raise Unusable("a proxy that is spoken to over TLS is left to read.backend: fsspec")
        if via and not place.tls:
            target, headers = f"http://{parts.netloc.rpartition('@')[2]}{target}", {**headers, **allowed}
        connect = partial(self._connect, place, via, allowed)
        return Way(target, headers, connect, self._idle.setdefault((place, via), deque()))

    def _connect(self, place: Place, via: Place | None, allowed: dict[str, str]) -> HTTPConnection:
        _, host, port = via or place
        try:
            if place.tls:
                connection: HTTPConnection = HTTPSConnection(host, port, timeout=self._timeout, context=self._trusted)
                if via:
                    connection.set_tunnel(place.host, place.port, allowed)
            else:
                connection = HTTPConnection(host, port, timeout=self._timeout)
            connection.connect()
        except (InvalidURL, UnicodeError):
            raise Unusable("this is no valid URL") from None
        except ssl.SSLCertVerificationError as error:
            raise Unusable(f"the server's certificate was not accepted: {told(error)}") from error
        except (OSError, HTTPException) as error:
            raise Transient(told(error)) from error
        return connection

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """The authorities': those that the environment names, as others read it, or certifi's."""
        named = (os.environ.get(name) for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"))
        return ssl.create_default_context(cafile=next(filter(None, named), certifi.where()))


def _last(idle: deque[tuple[float, HTTPConnection]], since: float = 0.0) -> HTTPConnection | None:
    """Of the idle connections, the one that was used last, if that was after `since`. Older ones are closed."""
    with suppress(IndexError):
        while True:
            used, connection = idle.pop()
            if used > since:
                return connection
            connection.close()
    return None


def _place(parts: SplitResult) -> Place:
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(parts)
    tls = parts.scheme == "https"
    return Place(tls, parts.hostname, parts.port or (443 if tls else 80))


def _proxy_for(parts: SplitResult) -> SplitResult | None:
    """The environment's."""
    proxy = "" if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme, "")
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None


def _basic(header: str, parts: SplitResult | None) -> dict[str, str]:
    """The `header` for the user and password that a URL names, if it does."""
    if parts is None or parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {b64encode(pair.encode()).decode()}"}
