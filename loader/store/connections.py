"""HTTP connections that are kept, each lent to one thread at a time, through the environment's proxies.

They are the standard library's: urllib3's pool and replies took 15% more CPU for ranges of 8 MiB on 16 threads.
"""

from __future__ import annotations

import os
import platform
import re
import select
import ssl
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, InvalidURL
from io import BufferedReader, RawIOBase
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi

from loader.ground.caller import LOOK
from loader.store.base import Transient, Unusable, told

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

FRESH = 2.0
"""Seconds for which an idle connection is used again. Many servers close one after 5."""

AGENT = f"Python/{platform.python_version()} http.client"
"""Who asks, unless the address says: some servers refuse whoever does not tell."""

AS_IT_IS = "!#$%&'()*+,/:;=?@[]~"
"""What is not to be encoded: characters with a meaning in a URL, and those of what is encoded already."""


class Origin(NamedTuple):
    """Where a connection leads."""

    tls: bool
    host: str
    port: int

    @property
    def written(self) -> str:
        """As in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


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

    def get(self, headers: Mapping[str, str], look: Callable[[float], None]) -> HTTPResponse:
        """The reply, whose body is to be read to its end. While nothing comes, `look` is called with the seconds for
        which that has been so, and may raise. Raises Transient and Unusable."""
        try:
            said = ({"User-Agent": AGENT}, self.way.headers, headers)  # each instead of those before, in any case
            once = {name.title(): value for each in said for name, value in each.items()}
            self.connection.request("GET", self.way.target, headers=once)
            self.socket.settimeout(LOOK)
            self.connection.response_class = partial(_Heard, look)  # type: ignore[assignment]  # it is but called
            return self.connection.getresponse()
        except InvalidURL:  # whose text has the URL, and that a signature
            raise Unusable("this is no valid URL") from None
        except (OSError, HTTPException) as error:
            raise Transient(told(error)) from error
        except ValueError:
            raise Unusable("a header of the request has characters that HTTP does not allow") from None


class _Heard(HTTPResponse):
    """A reply, and who listens to it."""

    def __init__(self, look: Callable[[float], None], connection: socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)
        self.fp = BufferedReader(_Listening(self.fp.detach(), connection, look))


class _Listening(RawIOBase):
    """What comes on a connection. A time-out of its socket is no end of it: then it is looked at, and waited on.

    Connections are closed when their last file is: `file`, which is open for nothing else.
    """

    def __init__(self, file: RawIOBase, connection: socket, look: Callable[[float], None]) -> None:
        self._file = file
        self._connection = connection
        self._look = look

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Buffer) -> int:
        since = time.monotonic()
        while True:
            try:
                return self._connection.recv_into(memory)
            except TimeoutError:
                self._look(time.monotonic() - since)

    def close(self) -> None:
        super().close()
        self._file.close()


class Connections:
    """Its methods may be called from many threads."""

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds is for a connection to be made, and a request to be sent."""
        self._timeout = timeout
        self._closed = False
        self._ways: dict[str, Way] = {}
        self._idle: dict[tuple[Origin, Origin | None], deque[tuple[float, HTTPConnection]]] = {}

    @contextmanager
    def lent(self, url: str) -> Iterator[Lent]:
        """A connection for `url`.

        It is kept, unless the context ends with an error: what is left of a reply would be taken for the next one.
        Raises Transient where none can be made, and Unusable for a URL, a proxy or a certificate that does not do.
        """
        way = self._ways.get(url) or self._ways.setdefault(url, self._way(url))
        connection = _last(way.idle) or way.connect()
        try:
            connection.sock.settimeout(self._timeout)
            yield Lent(way, connection, connection.sock)
        except BaseException:
            connection.close()
            raise
        if self._closed or connection.sock is None:  # the server has said that it closes it
            connection.close()
        else:
            way.idle.append((time.monotonic(), connection))

    def prepare(self, url: str) -> None:
        """Read the certificates, where `url` takes any."""
        if url.startswith("https://"):
            _ = self._trusted

    def close(self) -> None:
        """Close those that nobody uses, and keep no other."""
        self._closed = True
        for idle in list(self._idle.values()):
            for _ in range(len(idle)):
                with suppress(IndexError):  # another thread took it
                    idle.pop()[1].close()

    def _way(self, url: str) -> Way:
        try:
            parts = urlsplit(url)
            origin = _origin(parts)
        except ValueError:
            raise Unusable("this is no valid URL") from None
        proxy, via = _proxy_for(parts.scheme, origin)
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        target = quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", path), safe=AS_IT_IS)
        headers, allowed = _basic("Authorization", parts), _basic("Proxy-Authorization", proxy)
        if via and not origin.tls:
            target, headers = f"http://{origin.written}{target}", {**headers, **allowed}
        connect = partial(self._connect, origin, via, allowed)
        return Way(target, headers, connect, self._idle.setdefault((origin, via), deque()))

    def _connect(self, origin: Origin, via: Origin | None, allowed: dict[str, str]) -> HTTPConnection:
        _, host, port = via or origin
        if origin.tls:
            connection: HTTPConnection = HTTPSConnection(host, port, timeout=self._timeout, context=self._trusted)
            if via:
                connection.set_tunnel(origin.host, origin.port, allowed)
        else:
            connection = HTTPConnection(host, port, timeout=self._timeout)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise Unusable(f"the server's certificate was not accepted: {told(error)}") from error
        except (OSError, HTTPException) as error:
            raise Transient(told(error)) from error
        return connection

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """The authorities': those that the environment names, as others read it, or certifi's."""
        named = (os.environ.get(name) for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"))
        path = Path(next(filter(None, named), certifi.where()))
        many = path.is_dir()
        try:
            context = ssl.create_default_context(cafile=None if many else path, capath=path if many else None)
        except OSError as error:
            raise Unusable(f"the certificates of authorities at {path} cannot be read: {told(error)}") from error
        context.set_alpn_protocols(["http/1.1"])
        return context


def _last(idle: deque[tuple[float, HTTPConnection]]) -> HTTPConnection | None:
    """Of the idle connections, the one that was used last, unless that is long ago, or the server has closed it. Those
    that are not used any more are closed."""
    with suppress(IndexError):
        while True:
            used, connection = idle.pop()
            if time.monotonic() - used < FRESH and not _says_something(connection.sock):
                return connection
            connection.close()
    return None


def _says_something(idle: socket) -> bool:
    """Whether the server has, though it was asked for nothing: that it closes the connection, as a rule."""
    poll = select.poll()  # and not `select`, which takes no file number above 1,023
    poll.register(idle, select.POLLIN)
    return bool(poll.poll(0))


def _origin(parts: SplitResult) -> Origin:
    """Raises ValueError where the URL leads to none."""
    if parts.scheme not in {"http", "https"} or not parts.hostname or re.search(r"[\x00-\x20\x7f]", parts.hostname):
        raise ValueError(parts)
    tls = parts.scheme == "https"
    return Origin(tls, parts.hostname.encode("idna").decode(), parts.port or (443 if tls else 80))


def _proxy_for(scheme: str, origin: Origin) -> tuple[SplitResult | None, Origin | None]:
    """The environment's, if it names one. Raises Unusable for one that is not served."""
    named = "" if proxy_bypass(origin.host) else getproxies().get(scheme, "")
    if not named:
        return None, None
    try:
        proxy = urlsplit(named if "://" in named else f"http://{named}")
        via = _origin(proxy)
    except ValueError:
        raise Unusable(f"what the environment names as the proxy for {scheme}:// is no http:// URL") from None
    if via.tls or (origin.tls and ":" in origin.host):  # the library writes such a host so that no proxy reads it
        raise Unusable("a proxy over TLS, or one to an IPv6 address, is left to read.backend: fsspec")
    return proxy, via


def _basic(header: str, parts: SplitResult | None) -> dict[str, str]:
    """The `header` for the user and password that a URL names, if it does."""
    if parts is None or parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {b64encode(pair.encode()).decode()}"}
