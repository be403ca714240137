"""How far the whole job is: a bar on a terminal, a line now and then in a job's log."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, NoReturn, Self, TextIO

import humanize
from tqdm import tqdm

Show = Literal["bar", "lines"]
"""`bar`: one on a terminal, and lines elsewhere; `lines`: lines everywhere."""

LOOK = 0.5
"""Seconds between looks at how far the ranks are: they tell it as often."""

_log = logging.getLogger("loader.progress")  # as the README names it


class Reached(NamedTuple):
    """How far a rank is: bytes that it has read, of those that it is to read."""

    host: str
    done: int
    todo: int

    @property
    def part(self) -> float:
        return self.done / self.todo if self.todo else 1.0


class Progress:
    """Shows `total_bytes` being loaded, on `stream` (default: stderr), while the context lasts.

    On a terminal it is a tqdm bar. Elsewhere a line is logged when at least `interval` seconds have passed since the
    last one, and one at the end; a failed load ends without it. Where nobody has set up logging, it is printed. `clock`
    gives seconds.
    """

    def __init__(
        self,
        total_bytes: int,
        show: Show = "bar",
        stream: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_bytes
        self._show = show
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval
        self._clock = clock
        self._done = 0
        self._slowest: tuple[int, Reached] | None = None
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Self:
        self._start = self._said = self._clock()
        self._looked = self._start - LOOK
        if self._show == "bar" and self._stream.isatty():
            columns, rows = shutil.get_terminal_size()  # tqdm shows nothing on a terminal that says it has none
            self._bar = tqdm(
                total=self._total,
                desc="loading",
                unit="B",
                unit_scale=True,
                file=self._stream,
                ncols=columns,
                nrows=rows,
            )
        return self

    def look(self, ask: Callable[[], Sequence[Reached]]) -> None:
        """Ask how far every rank is, unless it was asked just now, and show it. No answer is out of date."""
        if self._clock() - self._looked < LOOK:
            return
        self._looked = self._clock()
        ranks = ask()
        if not ranks:
            return
        self._done = max(self._done, min(self._total, sum(each.done for each in ranks)))
        self._slowest = min(enumerate(ranks), key=lambda numbered: numbered[1].part)
        if self._slowest[1].part == 1 or len(ranks) == 1:
            self._slowest = None
        if self._bar is not None:
            self._bar.set_postfix_str(_slowest(self._slowest, host=False), refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif self._clock() - self._said >= self._interval:
            self._say()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._done, self._slowest = self._total, None
        if self._bar is not None:
            self._bar.set_postfix_str(_slowest(self._slowest, host=False), refresh=False)
            self._bar.update(self._done - self._bar.n)
            self._bar.close()
        elif kind is None:
            self._say()

    def _say(self) -> None:
        self._said = self._clock()
        elapsed = self._said - self._start
        text = "  ".join(filter(None, [line(self._done, self._total, elapsed), _slowest(self._slowest)]))
        if not _log.hasHandlers():
            print(text, file=self._stream, flush=True)
            return
        fields = {"done_bytes": self._done, "total_bytes": self._total, "seconds": round(elapsed, 3)}
        if self._slowest is not None:
            rank, reached = self._slowest
            fields |= {"slowest_rank": rank, "slowest_done_bytes": reached.done, "slowest_total_bytes": reached.todo}
        _log.info("%s", text, extra={"fields": fields})


def line(done: int, total: int, elapsed: float) -> str:
    """`loading 1.2 GB of 16.1 GB    7%  830.0 MB/s  eta 00:18`: bytes, bytes, seconds."""
    percent = 100 * done // total if total else 100
    rate = done / elapsed if elapsed > 0 else 0.0
    eta = tqdm.format_interval((total - done) / rate) if rate else "?"
    sizes = f"{humanize.naturalsize(done)} of {humanize.naturalsize(total)}"
    return f"loading {sizes}  {percent:3d}%  {humanize.naturalsize(rate)}/s  eta {eta}"


def _slowest(found: tuple[int, Reached] | None, *, host: bool = True) -> str:
    """`slowest rank 3 on node-0: 24%`; nothing where none is behind."""
    if found is None:
        return ""
    rank, reached = found
    return f"slowest rank {rank}{f' on {reached.host}' if host else ''}: {100 * reached.part:.0f}%"
