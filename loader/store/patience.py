"""How long a read may be silent before the rest of it is asked for again, on another connection: the hedge.

One connection in many stalls, for no reason that it tells. Whoever waits for it waits for nothing, for all others
deliver; so what a read may wait is taken from what reads took lately, far below the time-out of a network that fails.
It is looked at again while the read waits: of the first ones nothing is known when they are asked for.
"""

from __future__ import annotations

import math
import threading
from collections import deque

LATELY = 64
"""Reads that count: what passes for slow follows a bucket that slows down, or a link that fills up."""

KNOWN = 8
"""Without as many reads nothing is known of how long they take."""

SLOW = 0.9
"""Of the reads, as many are not slow: the slowest tenth may have been late themselves."""

TIMES = 2.0
"""A read that has been silent for so many times what a slow one takes in all is late. What is waited beyond is lost at
the end of a load, and where each round in flight has a read that stalls."""

LEAST = 0.5
"""Seconds that any read may be silent: a new connection and a bucket's first byte take less than a third of that."""

SHARE = 0.02
"""Of the bytes that are to be read, or were, what may be asked for twice."""


class Patience:
    """What one rank's reads know of each other. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=LATELY)
        self._read_bytes = 0
        self._expected_bytes = 0
        self._again_bytes = 0
        self._lock = threading.Lock()

    def expect(self, size: int) -> None:
        """So many bytes are to be read."""
        with self._lock:
            self._expected_bytes = size

    def took(self, seconds: float, size: int) -> None:
        """A read of `size` bytes ended well after `seconds`."""
        with self._lock:
            self._took.append(seconds)
            self._read_bytes += size

    def seconds(self) -> float:
        """How long a read may be silent: for ever, while nothing is known.

        Of 64 reads of 0.3 to 0.4 s: 0.8 s. Of as many of 10 ms: 0.5 s.
        """
        with self._lock:
            if len(self._took) < KNOWN:
                return math.inf
            slow = sorted(self._took)[int(SLOW * len(self._took))]
            return max(LEAST, TIMES * slow)

    def late(self, silent: float, again: int) -> bool:
        """Whether to give up a read that has been `silent` for so many seconds, for `again` bytes that may come twice:
        these are counted if so."""
        if silent <= self.seconds():
            return False
        with self._lock:
            if self._again_bytes + again > SHARE * max(self._read_bytes, self._expected_bytes):
                return False
            self._again_bytes += again
            self._took.append(silent)
            return True
