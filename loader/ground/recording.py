"""What a rank waited for and was busy with: seconds by name, and, for a timeline, when."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

EVENT_BYTES = 640
"""What an event takes in memory, with four facts, as measured."""


class Event(NamedTuple):
    """A span that has ended: seconds on this host's monotonic clock, and the name of its thread."""

    begun: float
    seconds: float
    name: str
    thread: str
    facts: dict[str, int | str]


class Recorder:
    """One rank's. Methods may be called from any thread.

    `seconds` are by span name, and a span's own: what it spends in spans within it, on the same thread, is theirs.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun = clock()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.left_out: Counter[str] = Counter()
        """How many spans of each name did not stay."""
        self._room = self._count = 0
        self._kept: list[tuple[float, int, Event]] = []  # a heap: the shortest is first
        self._lock = threading.Lock()
        self._innermost = threading.local()

    def keep(self, events: int) -> None:
        """From now on keep events: of more than so many, the longest."""
        self._room = events

    @property
    def kept_bytes(self) -> int:
        """What kept events may take in memory."""
        return self._room * EVENT_BYTES

    def events(self) -> list[Event]:
        """Those kept so far, in the order in which they began."""
        with self._lock:
            return sorted(event for _, _, event in self._kept)

    def span(self, name: str, **facts: int | str) -> Span:
        """A context manager over what is to be timed."""
        return Span(self, name, facts)

    def enter(self, span: Span) -> Span | None:
        """Begin a span on this thread; gives the one that it is in."""
        outer: Span | None = getattr(self._innermost, "span", None)
        self._innermost.span = span
        return outer

    def leave(self, span: Span, outer: Span | None, event: tuple[float, float], own: float) -> None:
        """End a span: when it begun and how long it took, and how much of that was its own."""
        self._innermost.span = outer
        with self._lock:
            self.seconds[span.name] += own
            if self._room:
                self._keep(Event(*event, span.name, threading.current_thread().name, span.facts))

    def _keep(self, event: Event) -> None:
        self._count += 1
        item = (event.seconds, self._count, event)
        if self._count <= self._room:
            heapq.heappush(self._kept, item)
        else:
            self.left_out[heapq.heappushpop(self._kept, item)[2].name] += 1


class Span:
    """A stretch of time on one thread. `facts` may be added to until it ends: then it `took` so many seconds, and spans
    in it took `within` of these."""

    __slots__ = ("_begun", "_outer", "_recorder", "facts", "name", "took", "within")

    def __init__(self, recorder: Recorder, name: str, facts: dict[str, int | str]) -> None:
        self._recorder = recorder
        self.within = 0.0
        self.name = name
        self.facts = facts

    def __enter__(self) -> Self:
        self._outer = self._recorder.enter(self)
        self._begun = self._recorder.clock()
        return self

    def begin_later(self, seconds: float) -> None:
        """Leave out the first `seconds`, which were waited for something else."""
        self._begun += seconds

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        took = self.took = self._recorder.clock() - self._begun
        if kind is not None:
            self.facts["error"] = kind.__name__
        if self._outer is not None:
            self._outer.within += took
        self._recorder.leave(self, self._outer, (self._begun, took), took - self.within)
