"""Ranges of HTTP replies, for the schemes that speak HTTP through aiohttp: `http(s)://` here, `gs://` in its module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from fsspec.core import url_to_fs

from loader.store.base import (
    Access,
    Address,
    Filler,
    IsLate,
    Scheme,
    Stat,
    Transient,
    Unusable,
    asked_wait,
    by_status,
    changed,
    check_reply,
    run_on_loop,
    told,
)

CLIENT_BYTES = 8 << 20
"""Measured: 0.5 MiB as it is open, 3 to 6 with 16 connections at work."""


def check_status(reply: aiohttp.ClientResponse) -> None:
    """Raise what an unsuccessful status means for a read."""
    if (error := by_status(reply.status, reply.reason or "")) is not None:
        if isinstance(error, Transient):
            error.retry_after = asked_wait(reply.headers.get("Retry-After"))
        raise error


async def fill(reply: aiohttp.ClientResponse, start: int, filler: Filler) -> None:
    """Check `reply`'s head, then copy its body."""
    check_status(reply)
    check_reply(
        status=reply.status,
        content_range=reply.headers.get("Content-Range"),
        start=start,
        size=len(filler.buffer),
    )
    async for chunk in reply.content.iter_any():
        filler.add(chunk)
    filler.finish()


def call(loop: Any, coroutine: Any, until: float, filler: Filler | None = None) -> Any:
    """Run on the event loop, until `until`; what the network does to a connection is transient."""
    try:
        return run_on_loop(loop, coroutine, until)
    except Transient as error:
        error.filled = filler.filled if filler else 0
        raise
    except aiohttp.InvalidURL as error:
        raise Unusable("this is no valid URL") from error
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise Transient(told(error), filled=filler.filled if filler else 0) from error


def socket_timeout(seconds: float) -> aiohttp.ClientTimeout:
    """No limit on the whole reply: a large range may take long. One on silence."""
    return aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)


def without_retries(session: aiohttp.ClientSession) -> aiohttp.ClientSession:
    """A session that does not ask again by itself where a kept connection was reset: the one retry layer is ours."""
    session._retry_connection = False  # noqa: SLF001 - as aiohttp's own test client does: there is no option
    return session


class WebScheme:
    """A directory of a web server; it cannot be listed."""

    def __init__(self, fs: Any, access: Access) -> None:
        self.fs = fs
        self.uri = access.uri
        self.timeout = socket_timeout(access.timeout)
        self.until = access.until
        self.direct = not fs.kwargs.keys() - {"headers"}  # what else aiohttp may be told, it must do itself

    def names(self) -> None:
        return None

    def stat(self, name: str) -> Stat:
        async def head() -> Stat:
            async with await self._request("HEAD", name, {}) as reply:
                check_status(reply)
                if "Content-Length" not in reply.headers:
                    raise Unusable("the server does not tell the size of its objects: no Content-Length for a HEAD")
                return Stat(int(reply.headers["Content-Length"]), _pin(reply.headers))

        return call(self.fs.loop, head, self.until)  # type: ignore[no-any-return]

    def read(self, name: str, pin: str, start: int, buffer: memoryview, _: IsLate) -> None:
        filler = Filler(buffer)
        headers = {"Range": f"bytes={start}-{start + len(buffer) - 1}"}

        async def get() -> None:
            async with await self._request("GET", name, headers) as reply:
                if reply.status < 300 and (found := _pin(reply.headers)) != pin:
                    raise changed(name, pin, found)
                await fill(reply, start, filler)

        call(self.fs.loop, get, self.until, filler)

    def address(self, name: str, _: str) -> Address:
        return Address(self._url(name), self.fs.kwargs.get("headers", {}))

    def pin_of(self, headers: Mapping[str, str], _: str) -> str:
        return _pin(headers)

    refusal = staticmethod(by_status)

    async def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        session = without_retries(await self.fs.set_session())
        options = {k: v for k, v in self.fs.kwargs.items() if k != "headers"}
        head = {**self.fs.kwargs.get("headers", {}), **headers, "Accept-Encoding": "identity"}
        return session.request(method, self._url(name), headers=head, timeout=self.timeout, **options)

    def _url(self, name: str) -> str:
        """The file's URL; a query string (a signed directory) stays behind it."""
        parts = urlsplit(self.uri)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _pin(headers: Mapping[str, str]) -> str:
    found = headers.get("ETag") or headers.get("Last-Modified")
    if not found:
        raise Unusable("the server sends neither ETag nor Last-Modified: its objects cannot be pinned")
    return found


def open_scheme(access: Access) -> Scheme:
    fs, _ = url_to_fs(access.uri, **access.storage_options, skip_instance_cache=True)
    return WebScheme(fs, access)
