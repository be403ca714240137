"""Calls that may never return, made so that whoever waits for one can give up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any, TypeVar

T = TypeVar("T")

LOOK = 0.2
"""Seconds between looks at whether to give up what is waited for."""


class Caller:
    """A thread that makes calls in turn: a call to a store whose host has gone silent cannot be interrupted."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """What `work()` will return or raise, once its turn has come."""
        future: Future[T] = Future()
        self._calls.put((work, future))
        return future

    def call(self, work: Callable[[], T], give_up: Callable[[], BaseException | None]) -> T:
        """What `work()` returns or raises; or raise what `give_up` returns, as soon as that is an error.

        Raises RuntimeError after `close`: a reader that a failed load left behind may come late.
        """
        future = self.submit(work)
        while True:
            try:
                return future.result(LOOK)
            except NotYet:
                if future.done():
                    raise
                if (error := give_up()) is not None:
                    raise error from None
                if not self._thread.is_alive() and not future.done():
                    raise RuntimeError("no more calls are made") from None

    def close(self) -> None:
        """End the thread after the calls that are waiting; one that never returns is left behind."""
        end_all([self])

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - for the one who waits
                future.set_exception(error)
            del item, work, future


def end_all(callers: Sequence[Caller]) -> None:
    """End their threads, as `close` does one's. It takes no longer if many are left behind."""
    until = time.monotonic() + LOOK
    for caller in callers:
        caller._calls.put(None)  # noqa: SLF001 - of this module
    for caller in callers:
        caller._thread.join(max(0.0, until - time.monotonic()))  # noqa: SLF001


def within(seconds: float, work: Callable[[], object], name: str) -> None:
    """Call `work` on a thread of that name, and wait for it so long at most: then it is left behind."""
    caller = Caller(name)
    done = caller.submit(work)
    try:
        done.result(seconds)
    except NotYet:
        if done.done():
            raise
    finally:
        caller.close()
