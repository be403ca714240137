"""How far the whole job is: a bar on a terminal, a line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self, TextIO

import humanize
from tqdm import tqdm


class Progress:
    """Shows `total_bytes` being loaded, on `stream` (default: stderr), while the context lasts.

    On a terminal it is a tqdm bar. Elsewhere a line is written when at least `interval` seconds have passed since the
    last one, and one at the end; a failed load ends without it. `clock` gives seconds.
    """

    def __init__(
        self,
        total_bytes: int,
        stream: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_bytes
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval
        self._clock = clock
        self._done = 0
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Self:
        self._start = self._said = self._clock()
        if self._stream.isatty():
            self._bar = tqdm(total=self._total, desc="loading", unit="B", unit_scale=True, file=self._stream)
        return self

    def update_to(self, done_bytes: int) -> None:
        """`done_bytes` of the whole job's are loaded; what is less than before is out of date and changes nothing."""
        self._done = max(self._done, done_bytes)
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)
        elif self._clock() - self._said >= self._interval:
            self._say()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._say()

    def _say(self) -> None:
        self._said = self._clock()
        print(line(self._done, self._total, self._said - self._start), file=self._stream, flush=True)


def line(done: int, total: int, elapsed: float) -> str:
    """`loading 1.2 GB of 16.1 GB    7%  830.0 MB/s  eta 00:18`: bytes, bytes, seconds."""
    percent = 100 * done // total if total else 100
    rate = done / elapsed if elapsed > 0 else 0.0
    eta = tqdm.format_interval((total - done) / rate) if rate else "?"
    sizes = f"{humanize.naturalsize(done)} of {humanize.naturalsize(total)}"
    return f"loading {sizes}  {percent:3d}%  {humanize.naturalsize(rate)}/s  eta {eta}"
