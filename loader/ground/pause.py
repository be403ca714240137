"""A pause that all ranks of a node make together, when the bucket asks one of them for fewer requests."""

from __future__ import annotations

import threading


class Pause:
    """Until when no request is to be made: `until` is on the monotonic clock, which a host's processes share."""

    def __init__(self) -> None:
        self.until = 0.0
        self._lock = threading.Lock()

    def extend(self, until: float) -> None:
        with self._lock:
            self.until = max(self.until, until)
