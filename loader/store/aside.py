"""Calls that may hang in the kernel or in a client library, and cannot be interrupted there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from loader.ground.caller import Caller, end_all
from loader.store.base import Hung, Transient

T = TypeVar("T")


class Aside:
    """Makes such calls in threads of its own, one for each that asks. One that hangs is left behind."""

    def __init__(self, timeout: float, until: float) -> None:
        """`timeout` is in seconds without a sign of life; at `until` (monotonic) all calls end."""
        self._timeout = timeout
        self._until = until
        self._mine = threading.local()
        self._callers: list[Caller] = []
        self._closed = False
        self._lock = threading.Lock()

    def call(self, work: Callable[[Callable[[], None]], T]) -> T:
        """`work(alive)`, which calls `alive` for each sign of life. Raises Hung, and Transient after `close`.

        What it was to fill it may still fill, at any time: then that memory must not be used for anything else.
        """
        seen = time.monotonic()

        def alive() -> None:
            nonlocal seen
            seen = time.monotonic()

        def give_up() -> Hung | None:
            now = time.monotonic()
            if self._closed:
                return Hung("it had not ended when all reading did")
            if now - seen > self._timeout:
                return Hung(f"nothing came for {self._timeout:g} s (read.timeout)")
            return Hung("it had not ended, and read.deadline has passed") if now > self._until else None

        try:
            return self._caller().call(lambda: work(alive), give_up)
        except Hung:
            del self._mine.caller
            raise

    def close(self) -> None:
        """Nobody waits for a call any more, and none is made."""
        with self._lock:
            self._closed = True
        end_all(self._callers)

    def _caller(self) -> Caller:
        with self._lock:
            if self._closed:
                raise Transient("all reading has ended")
            if not hasattr(self._mine, "caller"):
                self._mine.caller = Caller("loader-file")
                self._callers.append(self._mine.caller)
            return self._mine.caller  # type: ignore[no-any-return]
