"""How long all ranks take to end once one has given up: whatever a slow machine needed to come so far."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from loader.errors import LoaderError
from loader.exchange.watch import Watch

SOON = 20.0
"""Seconds: 10 are promised, the rest is a busy machine's. Every time-out that must not be waited for is longer."""


class Ending(NamedTuple):
    """One rank's: when it first told the others of an error, and when it raised one itself; on the machine's clock."""

    told: float
    raised: float


class Giving:
    """Notes when this rank gives up, while `patch` lasts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._told: list[float] = []
        fail = Watch.fail

        def noted(watch: Watch, error: BaseException) -> LoaderError:
            self._told.append(time.monotonic())
            return fail(watch, error)

        patch.setattr(Watch, "fail", noted)

    def end(self) -> Ending:
        """To be called where the load's error is caught."""
        now = time.monotonic()
        return Ending(min(self._told, default=now), now)


def took(endings: Iterable[Ending]) -> float:
    """Seconds from the first rank's giving up to the last one's end."""
    every = list(endings)
    return max(each.raised for each in every) - min(each.told for each in every)
