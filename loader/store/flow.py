"""How many ranges a rank reads at once: as many as pay.

A bucket serves a connection at some rate, whatever the link would carry, and a range begins with a wait. So more at
once bring more, up to what the link, the bucket or this host can do; beyond that they bring nothing but memory and
requests. Where that is shows only when it is tried.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 64
"""Ranges at once, at most: 5.4 GB/s at 85 MB/s a connection, what a 400 Gbit/s link has for each of 8 ranks."""

PLACE_BYTES = 100 * 1024
"""What a place takes beside the range: its thread's stack and its connection, as measured."""

PLACES_SHARE = 32
"""Places beyond the first take 1/32 of a memory budget at most."""

WINDOW = 2
"""How many ranges each place has read when it is looked what they bring."""

PAYS = 1.2
"""Twice the places pay where they bring at least a fifth more."""

CALM = 10.0
"""Seconds after a server has asked for fewer requests until one more is tried again, and between that and the next."""


def most_places(first: int, memory_budget: int) -> int:
    """How many there may be, of `first`, in a budget of so many bytes: 64 of 16 in 512 MiB, 36 in 64, 18 in 8."""
    return max(first, min(MOST, first + memory_budget // PLACES_SHARE // PLACE_BYTES))


class Flow:
    """The places for ranges that are read at once, given in the order in which they are asked for."""

    def __init__(self, places: int, most: int) -> None:
        """`places` are had at first, `most` at most."""
        self._first = places
        self.places = places
        self.most = most
        self._taken = 0
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()
        self._growing = places < most
        self._calm_at: float | None = None
        self._rate = 0.0
        self._doubted = False
        self._ranges = self._bytes = 0
        self._since = 0.0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Wait for a place, and take it."""
        given = threading.Event()
        with self._lock:
            self._waiting.append(given)
            self._admit()
        given.wait()
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1
                self._admit()

    def arrived(self, size: int) -> None:
        """A range of `size` bytes has been read."""
        with self._lock:
            if self._calm_at is not None:
                self._regain(self._calm_at)
            elif self._growing:
                self._measure(size)

    def begin(self) -> None:
        """What is read from here on is of another kind, ranges after headers: how many at once pay is to be seen."""
        with self._lock:
            if self._calm_at is None:
                self._rate, self._growing = 0.0, self._first < self.most
                self._give(self._first)

    def throttled(self) -> None:
        """The server asked for fewer requests: half of the places go, once for those who were asked side by side."""
        with self._lock:
            now = time.monotonic()
            if self._calm_at is None or now > self._calm_at - CALM + 1:
                self._give(max(1, self.places // 2))
            self._calm_at = now + CALM

    def _measure(self, size: int) -> None:
        if not self._ranges:
            self._since = time.monotonic()  # from the end of a range on: the wait before the first is no rate
        else:
            self._bytes += size
        self._ranges += 1
        if self._ranges <= WINDOW * self.places:
            return
        rate = self._bytes / max(1e-9, time.monotonic() - self._since)
        if rate < PAYS * self._rate:
            if not self._doubted:  # a stall of another's making may be in it: once more
                self._doubted, self._ranges, self._bytes = True, 0, 0
                return
            self._growing = False
            self._give(self.places // 2)
        else:
            self._rate = rate
            self._growing = 2 * self.places <= self.most
            self._give(min(2 * self.places, self.most))

    def _regain(self, calm_at: float) -> None:
        now = time.monotonic()
        if now > calm_at and self.places < self.most:
            self._give(self.places + 1)
            self._calm_at = now + CALM

    def _give(self, places: int) -> None:
        self.places = places
        self._doubted = False
        self._ranges = self._bytes = 0
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._taken < self.places:
            self._taken += 1
            self._waiting.popleft().set()
