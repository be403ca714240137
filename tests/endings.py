"""How long all ranks take to end once one has given up: whatever a slow machine needed to come so far, and without the
time for which it kept them waiting meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from loader.errors import LoaderError
from loader.exchange.watch import Watch
from tests.processes import LOOK

SOON = 10.0
"""Seconds, as promised. Every time-out that must not be waited for is longer."""


class Ending(NamedTuple):
    """One rank's: when it first told the others of an error, when it raised one itself, and the moments at which its
    process came `late` to a look at the clock, with the seconds; all on the machine's clock."""

    told: float
    raised: float
    late: tuple[tuple[float, float], ...]

    def seconds(self, since: float) -> float:
        return self.raised - since - sum(seconds for at, seconds in self.late if at > since)


class Giving:
    """Notes when this rank gives up, while `patch` lasts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._told: list[float] = []
        self._late: list[tuple[float, float]] = []
        fail = Watch.fail

        def noted(watch: Watch, error: BaseException) -> LoaderError:
            self._told.append(time.monotonic())
            return fail(watch, error)

        patch.setattr(Watch, "fail", noted)
        threading.Thread(target=self._look, daemon=True).start()

    def end(self) -> Ending:
        """To be called where the load's error is caught."""
        now = time.monotonic()
        return Ending(min(self._told, default=now), now, tuple(self._late))

    def _look(self) -> None:
        """All that this thread does is sleep: how late it wakes the machine has kept the whole process waiting."""
        now = time.monotonic()
        while True:
            time.sleep(LOOK)
            before, now = now, time.monotonic()
            self._late.append((now, now - before - LOOK))


def took(endings: Iterable[Ending]) -> float:
    """Seconds from the first rank's giving up to the last one's end."""
    every = list(endings)
    since = min(each.told for each in every)
    return max(each.seconds(since) for each in every)
