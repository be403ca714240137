"""A server that misbehaves on request: a hook for `CountingProxy`, which stands before the real one.

Which fault a load meets, its directory's name says: one server serves many loads, each with a trouble of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

from tests.proxy import Forward, Reply, Request

FILE = "model.safetensors"
FLIPPED = 77
"""The byte of a body whose lowest bit is flipped, or the last of a shorter one."""
TRICKLE = 0.1
"""Seconds between the bytes of a reply that trickles."""


@dataclasses.dataclass(frozen=True)
class Get:
    """One ranged GET of weights: the `number`th of its rank in its load, from 0. The header's is not counted."""

    request: Request
    forward: Forward
    number: int
    server: Misbehaving

    @property
    def directory(self) -> str:
        return self.request.path.rsplit("/", 2)[-2]

    @property
    def first(self) -> int:
        return int(re.findall(r"\d+", self.request.range or "")[0])

    @property
    def size(self) -> int:
        first, last = map(int, re.findall(r"\d+", self.request.range or ""))
        return last + 1 - first


Fault = Callable[[Get], Reply | None]
"""The reply to a GET, or None: as the real server would. It may raise ConnectionError: a reset."""


class Misbehaving:
    """The hook. `faults` by directory, or one for all; `change(directory, how)` makes another object of the file there.

    `failed` counts by directory what was not served as asked; `asked` are the times of each range's GETs.
    """

    def __init__(self, faults: dict[str, Fault] | Fault, change: Callable[[str, str], Any] = lambda *_: None) -> None:
        self._fault_of = faults.get if isinstance(faults, dict) else lambda _: faults
        self.change = change
        self.failed: dict[str, int] = defaultdict(int)
        self.asked: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self._counts: dict[tuple[str, int], itertools.count[int]] = defaultdict(itertools.count)
        self._done: set[object] = set()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.method != "GET" or not request.path.endswith(FILE) or not request.range:
            return forward(request)
        get = Get(request, forward, 0, self)
        fault = self._fault_of(get.directory)
        if get.first == 0 or fault is None:  # the header
            return forward(request)
        with self.lock:
            get = dataclasses.replace(get, number=next(self._counts[get.directory, request.rank]))
            self.asked[get.directory, request.rank, get.first].append(time.monotonic())
        reply: Reply | None = None
        try:
            reply = fault(get)
        except ConnectionError:
            self._count(get.directory)
            raise
        if reply is None:
            return forward(request)
        self._count(get.directory)
        return reply

    def once(self, key: object) -> bool:
        """Whether it is asked with this key for the first time."""
        with self.lock:
            first = key not in self._done
            self._done.add(key)
            return first

    def _count(self, directory: str) -> None:
        with self.lock:
            self.failed[directory] += 1


# When


def first(count: int, fault: Fault) -> Fault:
    """The first `count` GETs of every rank."""
    return lambda get: fault(get) if get.number < count else None


def from_then_on(rank: int, number: int, fault: Fault) -> Fault:
    """Every GET of one rank from its `number`th on."""
    return lambda get: fault(get) if get.request.rank == rank and get.number >= number else None


def at(numbers: Collection[int], fault: Fault) -> Fault:
    """Of every rank's GETs those with these numbers, from 0."""
    return lambda get: fault(get) if get.number in numbers else None


# What


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    given = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return lambda _: Reply(code, [("Content-Length", str(len(body))), *given], [body])


def expired(get: Get) -> Reply:
    """As each service says that a token has expired: S3 with a code under status 400, the others with 401."""
    if "X-Amz-" in get.request.target or "X-Amz-Date" in get.request.headers:
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        return Reply(400, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")], [body])
    return Reply(401, [("Content-Length", "0")])


def reset(_: Get) -> Reply:
    raise ConnectionResetError


def cut(get: Get) -> Reply:
    """A third of the body, and an orderly end of the connection."""
    reply, body = served(get)
    return Reply(reply.status, [*reply.headers, ("Connection", "close")], [body[: len(body) // 3]])


def reset_within(get: Get) -> Reply:
    """Half of the body, then a reset."""

    def chunks(body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        time.sleep(0.05)  # a reset takes away what has not been read
        raise ConnectionResetError

    reply, body = served(get)
    return Reply(reply.status, reply.headers, chunks(body))


def stall(get: Get) -> Reply:
    """Half of the body, then silence."""

    def chunks(body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        get.server.stop.wait()
        raise ConnectionResetError

    reply, body = served(get)
    return Reply(reply.status, reply.headers, chunks(body))


def unanswered(get: Get) -> Reply:
    """Silence at once."""
    get.server.stop.wait()
    raise ConnectionResetError


def trickle(get: Get) -> Reply:
    """A byte now and then."""

    def chunks(body: bytes) -> Iterator[bytes]:
        for at in range(len(body)):
            yield body[at : at + 1]
            if get.server.stop.wait(TRICKLE):
                raise ConnectionResetError

    reply, body = served(get)
    return Reply(reply.status, reply.headers, chunks(body))


def ignored_range(get: Get) -> Reply:
    """The whole object under status 200, without end: so that reading it would show."""
    reply, body = served(get)
    size = str(1 << 40)
    headers = [(name, value) for name, value in told(reply, Content_Length=size) if name.lower() != "content-range"]
    return Reply(200, headers, itertools.repeat(body))


def short_206(get: Get) -> Reply:
    """Half of the range, and honest about it."""
    reply, body = served(get)
    half = len(body) // 2
    span = f"bytes {get.first}-{get.first + half - 1}/*"
    return Reply(206, told(reply, Content_Length=str(half), Content_Range=span), [body[:half]])


def long_206(get: Get) -> Reply:
    """More than the range, told as the range."""
    reply, body = served(get)
    return Reply(206, told(reply, Content_Length=str(len(body) + 9)), [body, b"and more!"])


def other_range(get: Get) -> Reply:
    """As many bytes from elsewhere."""
    reply, body = served(get)
    span = f"bytes {get.first + 1}-{get.first + len(body)}/*"
    return Reply(206, told(reply, Content_Range=span), [body])


def flipped(get: Get) -> Reply:
    reply, body = served(get)
    at = min(FLIPPED, len(body) - 1)
    return Reply(206, reply.headers, [body[:at], bytes([body[at] ^ 1]), body[at + 1 :]])


def changes(how: str) -> Fault:
    """The object becomes another at this GET, and is then served as it is."""

    def fault(get: Get) -> None:
        if get.server.once((get.directory, how)):
            get.server.change(get.directory, how)

    return fault


def another_version(get: Get) -> Reply:
    """The bytes as they are, and headers that say another object's."""
    reply, body = served(get)
    return Reply(reply.status, told(reply, ETag='"another"', X_Goog_Generation="1"), [body])


# What they are made of


def served(get: Get) -> tuple[Reply, bytes]:
    reply = get.forward(get.request)
    return reply, b"".join(map(bytes, reply.chunks))


def told(reply: Reply, **changed: str) -> list[tuple[str, str]]:
    """The reply's headers, some of them changed."""
    names = {name.replace("_", "-").lower() for name in changed}
    kept = [(name, value) for name, value in reply.headers if name.lower() not in names]
    return [*kept, *((name.replace("_", "-"), value) for name, value in changed.items())]
