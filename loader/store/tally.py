"""What was asked of the bucket."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(slots=True)
class Tally:
    """As the bucket sees it: ranged GETs of files, and bytes of their bodies. Of these,
    `hedged_bytes` may have come twice, for the first reply was late; of the retries, `throttled` follow a reply that
    asked for fewer requests."""

    gets: int = 0
    fetched_bytes: int = 0
    retries: int = 0
    hedged_bytes: int = 0
    throttled: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(
        self, *, gets: int = 0, fetched_bytes: int = 0, retries: int = 0, hedged_bytes: int = 0, throttled: int = 0
    ) -> None:
        with self._lock:
            self.gets += gets
            self.fetched_bytes += fetched_bytes
            self.retries += retries
            self.hedged_bytes += hedged_bytes
            self.throttled += throttled


class Asked(NamedTuple):
    """What one range took. A GET is no retry where it asks again for what was late. It was first asked for after it had
    `waited` so many seconds: for a place among those that are read at once, and in a pause."""

    gets: int
    retries: int
    waited: float
