"""The one retry layer: what is tried again, how often and when; and the pause that being throttled makes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from loader.ground.pause import Pause
from loader.store.base import Transient

T = TypeVar("T")

FIRST_WAIT = 0.1
LONGEST_WAIT = 10.0
"""Full jitter between 0 and min(10 s, 0.1 s x 2^attempt): AWS's advice against synchronised retries."""

LONGEST_ASKED = 60.0
"""Seconds that a server's Retry-After is heeded, at most. Jitter comes on top, for it asks all ranks alike."""


class Retry:
    """Tries calls again that raise Transient, from any thread: `retries` times, until `until` (monotonic) or `closed`.

    None is made in a `pause`, which one that was throttled makes longer. `again` is told of each new try: of what,
    why, and in how many seconds.
    """

    def __init__(
        self,
        retries: int,
        until: float,
        closed: threading.Event,
        pause: Pause,
        again: Callable[[str, Transient, float], None],
    ) -> None:
        self._until = until
        self._closed = closed
        self._pause = pause
        self._again = again
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=_wait,
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(1 + retries),
                tenacity.stop_when_event_set(closed),
                self._no_time_left,  # type: ignore[arg-type]  # any callable does
            ),
            sleep=tenacity.sleep_using_event(closed),
            before=lambda _: self.wait_out_the_pause(),
            before_sleep=self._try_again_later,
            reraise=True,
        )

    def __call__(self, call: Callable[[], T], what: str) -> T:
        """What `call()` returns, which is to get `what`; or what it raises, but for Transient: then the last one, with
        the number of `tries`."""
        try:
            return self._retrying(lambda _: call(), what)
        except Transient as error:
            error.tries = self._retrying.statistics["attempt_number"]  # this thread's
            raise

    def wait_out_the_pause(self) -> None:
        """And as long again at most, by chance: else all whom it held would come at once."""
        while (left := self._pause.until - (now := time.monotonic())) > 0 and now < self._until:
            if self._closed.wait(min(left + random.uniform(0, left), self._until - now)):
                return

    def _no_time_left(self, state: tenacity.RetryCallState) -> bool:
        return time.monotonic() + state.upcoming_sleep >= self._until

    def _try_again_later(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, Transient), "nothing else is tried again"
        seconds = state.next_action.sleep if state.next_action else 0.0
        self._again(state.args[0], error, seconds)
        if error.throttled:
            self._pause.extend(time.monotonic() + seconds)


_jittered = tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: with full jitter, and no less than the server asked for, within reason."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Transient) else None
    return _jittered(state) + min(asked or 0.0, LONGEST_ASKED)
