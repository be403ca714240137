"""How long a read may be silent before the rest of it is asked for again, on another connection: the hedge.

One connection in many stalls, for no reason that it tells. Whoever waits for it waits for nothing, for all others
deliver; so what a read may wait is taken from what reads took lately, far below the time-out of a network that fails.
"""

from __future__ import annotations

import threading
from collections import deque

LATELY = 64
"""Reads that count: what passes for slow follows a bucket that slows down, or a link that fills up."""

KNOWN = 16
"""Without as many reads nothing is known of how long they take."""

SLOW = 0.9
"""Of the reads, as many are not slow: the slowest tenth may have been late themselves."""

TIMES = 4.0
"""A read that has been silent for so many times what a slow one takes in all is late."""

LEAST = 0.5
"""Seconds that any read may be silent: a new connection and a bucket's first byte take less than a third of that."""

SHARE = 0.02
"""Of the bytes that were read, what may be asked for twice."""


class Patience:
    """What one rank's reads know of each other. Methods may be called from any thread."""

    def __init__(self, timeout: float) -> None:
        """`timeout` (seconds) is what a read may be silent while nothing is known, and at most."""
        self._timeout = timeout
        self._took: deque[float] = deque(maxlen=LATELY)
        self._read_bytes = 0
        self._again_bytes = 0
        self._lock = threading.Lock()

    def took(self, seconds: float, size: int) -> None:
        """A read of `size` bytes ended well, or was late after `seconds`."""
        with self._lock:
            self._took.append(seconds)
            self._read_bytes += size

    def seconds(self, again: int) -> float:
        """How long a read may be silent that would cost `again` bytes asked for twice.

        Of 64 reads of 0.1 to 0.2 s: 0.8 s. Of as many of 10 ms: 0.5 s.
        """
        with self._lock:
            if len(self._took) < KNOWN or self._again_bytes + again > SHARE * self._read_bytes:
                return self._timeout
            slow = sorted(self._took)[int(SLOW * len(self._took))]
            return min(max(LEAST, TIMES * slow), self._timeout)

    def late(self, seconds: float, again: int) -> None:
        """A read was given up after `seconds` of silence, for `again` bytes that may come twice."""
        self.took(seconds, 0)
        with self._lock:
            self._again_bytes += again
