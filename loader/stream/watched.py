"""Work that may hang in a transport, watched by a thread that does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from loader.errors import LostRankError
from loader.exchange.control import Control

DRAIN = 8.0
"""Seconds for the rounds in flight to end after an error, before the rank gives up on them: all must end within 10."""


def watched(work: Callable[[], object], control: Control, name: str, look: Callable[[], object] = lambda: None) -> None:
    """Do `work` in a thread that may block in gloo, while this one watches for the job's error.

    After an error the work is to end by itself; a lost rank it may wait for for ever, so it is left behind.
    """

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told to all ranks
            control.fail(error)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    give_up = float("inf")
    while thread.is_alive():
        thread.join(0.1)
        look()
        if control.error is not None:
            give_up = min(give_up, time.monotonic() + DRAIN)
            if isinstance(control.error, LostRankError) or time.monotonic() > give_up:
                break
    if control.error is not None:
        raise control.error
