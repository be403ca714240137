"""What a storage scheme provides, and the errors it speaks in.

A scheme is one module in `loader.store.schemes`. It opens a directory (or one file) and answers three questions: which
names are there, what is an object's size and pin, and what are the bytes of a range of exactly that version.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from loader.errors import PinError
from loader.ground.crc import Algorithm

T = TypeVar("T")

PIECE = 256 * 1024
"""Bytes that are received at once, at most: what came of them before a reset or a silence is read again."""

Backend = Literal["auto", "direct", "fsspec"]
"""Who reads the ranges: `direct` over HTTP (see `loader.store.direct`), `fsspec` the scheme's own client library,
`auto` the first where the scheme and its options allow it."""


IsLate = Callable[[float], bool]
"""Whether a read is to be given up that has been silent for so many seconds. It is asked again while it is not."""


class Stat(NamedTuple):
    """An object's size in bytes, and its pin."""

    size: int
    pin: str


class Checksum(NamedTuple):
    """What a store says of all of an object's bytes."""

    algorithm: Algorithm
    value: int


class Listed(Protocol):
    """One place that objects are read from. Every method blocks, and may be called from any thread."""

    def names(self) -> list[str] | None:
        """Names of the files directly in the directory; None where the scheme cannot list."""

    def stat(self, name: str) -> Stat:
        """Size and pin of one file. Raises FileNotFoundError, PermissionError, `Unusable` or `Transient`."""

    # A scheme may have besides
    #     def checksum(self, name: str, pin: str) -> Checksum | str
    # The whole object's of that version, or why there is none. Raises as `read` does.


class Scheme(Listed, Protocol):
    """One that reads them through a client library."""

    def read(self, name: str, pin: str, start: int, buffer: memoryview, late: IsLate) -> None:
        """Fill `buffer` with the bytes from `start` on, of the version that `pin` names.

        While nothing comes, `late` is asked whether to give it up as `Late`; a scheme that can only wait for its
        time-out does that.
        Raises PinError when the reply is of another, FileNotFoundError when the store says that there is no such
        range of that version, PermissionError, `Unusable`, and `Transient` for whatever another try may mend.
        """


class Address(NamedTuple):
    """Where a version of a file is read, for a while: a signed URL, or a token among the headers."""

    url: str
    headers: Mapping[str, str]


class Addressed(Listed, Protocol):
    """One whose files are to be had over HTTP, by whoever has their address (see `loader.store.direct`)."""

    direct: bool
    """Whether they are, with the options given."""

    def address(self, name: str, pin: str) -> Address:
        """Where `name` is now, with fresh credentials. Raises as `read` does."""

    def pin_of(self, headers: Mapping[str, str], pin: str) -> str:
        """The pin of the version that a reply with these headers is of; `pin` where they do not tell."""

    def refusal(self, status: int, reason: str, body: bytes) -> Exception | None:
        """What an unsuccessful reply means, as one of the errors of `read`."""

    # One may have besides
    #     def any_address(self) -> Address
    # That of no file, for what making the first address takes: credentials, a region. Raises as `read` does.


class Transient(Exception):  # noqa: N818 - it is a verdict on an error, told apart from errors that end the load
    """Another try may mend it, unless nothing is left: `filled` bytes at the front of the buffer are right already.

    `throttled` says that the server asked for fewer requests, `retry_after` in how many seconds it asked for the next;
    `tries` is how many there were, once there are to be no more.
    """

    def __init__(
        self, message: str, *, filled: int = 0, throttled: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.filled = filled
        self.throttled = throttled
        self.retry_after = retry_after
        self.tries = 1


class Late(Transient):
    """No byte came for longer than others took."""


class Unusable(Exception):  # noqa: N818 - as above
    """No other try will mend it, and it is no question of credentials: a request that the server calls wrong."""


class Hung(Exception):  # noqa: N818 - as above
    """It does not return, and cannot be interrupted: to try again would fill what the first try may still fill."""


def checksum_of(scheme: Listed, name: str, pin: str) -> Checksum | str:
    """The scheme's `checksum`, where it has any."""
    ask: Callable[[str, str], Checksum | str] | None = getattr(scheme, "checksum", None)
    return ask(name, pin) if ask else "the store has no checksums that could be joined from those of ranges"


def told(error: BaseException) -> str:
    """`error` in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def refusal(status: int, what: str) -> Exception | None:
    """What an unsuccessful HTTP status means for a read; None where it is no such status. `what` is the answer.

    The classes of error, for all schemes: another object (FileNotFoundError), credentials (PermissionError), throttled
    and transient (Transient), fatal (Unusable).
    """
    if status in (404, 410, 412, 416):  # also: another object than asked for, or a shorter one
        return FileNotFoundError(what)
    if status in (401, 403):
        return PermissionError(what)
    if status in (408, 425, 429) or status >= 500:
        return Transient(what, throttled=status in (429, 503))
    return Unusable(what) if status >= 300 else None


def by_status(status: int, reason: str, _: bytes = b"") -> Exception | None:
    """`refusal` of a reply that says no more than its status line."""
    return refusal(status, f"status {status} {reason}".rstrip())


def asked_wait(retry_after: str | None) -> float | None:
    """Seconds that the header Retry-After asks for, as a number or as a date; None where it says nothing clear."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a zone
        return None


@dataclass(frozen=True, slots=True)
class Access:
    """How a scheme is opened: where, with which client options, how patiently, and who reads the ranges.

    `timeout` is in seconds, for a connection, and between two arrivals of bytes; `concurrency` is how many ranges may
    be read at once. `until`, which the store sets, is when all reading ends, on the monotonic clock.
    """

    uri: str
    storage_options: dict[str, Any] = field(repr=False)
    concurrency: int
    timeout: float
    backend: Backend = "auto"
    until: float = math.inf


def check_reply(*, status: int, content_range: str | None, start: int, size: int) -> None:
    """Check that a reply is the range `[start, start + size)`: 206 and a Content-Range of exactly that.

    Raises Transient for anything else, so that no body is read which is not the range.
    """
    if status != 206:
        told = "ignored the Range and sent the whole object" if status == 200 else f"answered with status {status}"
        raise Transient(f"the server {told}")
    unit, _, rest = (content_range or "").partition(" ")
    if unit != "bytes" or rest.partition("/")[0] != f"{start}-{start + size - 1}":
        raise Transient(f"expected Content-Range bytes {start}-{start + size - 1}, found {content_range!r}")


class Filler:
    """Copies arriving chunks into a buffer, never past its end."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.filled = 0

    def add(self, chunk: bytes) -> None:
        stop = self.filled + len(chunk)
        if stop > len(self.buffer):
            self.filled = 0  # it was no reply to this request: nothing of it counts
            raise Transient(f"the body is longer than the {len(self.buffer)} bytes asked for")
        self.buffer[self.filled : stop] = chunk
        self.filled = stop

    def finish(self) -> None:
        if self.filled < len(self.buffer):
            raise Transient(f"the body ended {len(self.buffer) - self.filled} bytes early", filled=self.filled)


def changed(name: str, pin: str, found: str) -> PinError:
    """The error for an object that is not the one that was catalogued."""
    return PinError(
        f"{name}: changed while it was read: pinned {pin}, found {found}. "
        "Nothing was mixed: start again, and keep a checkpoint's files unchanged under one URI"
    )


def run_on_loop(loop: Any, call: Callable[[], Awaitable[T]], until: float = math.inf) -> T:
    """Run a coroutine on fsspec's event-loop thread and wait for it, until `until` (monotonic) at the latest.

    Raises Transient where it is not done by then: a reply may bring a byte now and then for ever.
    """
    import asyncio

    async def awaited() -> T:
        return await call()

    future = asyncio.run_coroutine_threadsafe(awaited(), loop)
    try:
        return future.result(None if until == math.inf else max(0.0, until - time.monotonic()))
    except TimeoutError:
        if future.cancel():
            raise Transient("the reply had not ended") from None
        raise  # the call's own
