"""The few ranges of a file that are read to find its tensors."""

from __future__ import annotations

import io
import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

Span = tuple[int, int]
"""Bytes [start, stop) of a file."""

Fetch = Callable[[Sequence[Span]], list[bytes]]
"""Reads spans, side by side."""

EARLY = 64 * 1024
"""Bytes that may be read beside those asked for, of each file: joining spans over small gaps saves requests."""


class Ranges(io.RawIOBase):
    """A file of `size` bytes that knows what was read of it; to `zipfile`, a file. What it lacks, it fetches."""

    def __init__(self, fetch: Fetch, size: int, most: int) -> None:
        """No single read is longer than `most` bytes: a stranger decides what is asked for."""
        self.size = size
        self.asked = 0
        self._fetch = fetch
        self._most = most
        self._at = 0
        self._held: list[tuple[int, bytes]] = []
        self._early = EARLY

    def want(self, spans: Sequence[Span]) -> None:
        """Fetch what is not held of `spans`, side by side, joined over small gaps. Raises ValueError as `get`."""
        for span in spans:
            self._check(*span)
        missing = sorted({span for span in spans if span[0] < span[1] and self._find(span) is None})
        joined = self._joined(missing)
        for (start, _), data in zip(joined, self._fetch(joined), strict=True):
            self._held.insert(bisect_right(self._held, start, key=lambda held: held[0]), (start, data))

    def guess(self, start: int, stop: int) -> None:
        """Fetch [start, stop), as far as it is in the file, though not all of it may be of use."""
        self.want([(max(0, start), min(stop, self.size))])
        self._early = max(0, self._early - (stop - start))

    def get(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises ValueError for what is not in the file, or too much."""
        self._check(start, stop)
        if start == stop:
            return b""
        if self._find((start, stop)) is None:
            self.want([(start, stop)])
        found = self._find((start, stop))
        assert found is not None
        begin, data = found
        self.asked += stop - start
        return data[start - begin : stop - begin]

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"bytes [{start}, {stop}) are not in the file, which has {self.size}")
        if stop - start > self._most:
            raise ValueError(f"{stop - start} bytes at once, of what is at most {self._most} in a checkpoint")

    def _find(self, span: Span) -> tuple[int, bytes] | None:
        """The held bytes that contain `span`."""
        at = bisect_right(self._held, span[0], key=lambda held: held[0])
        for begin, data in self._held[max(0, at - 1) : at]:
            if span[1] <= begin + len(data):
                return begin, data
        return None

    def _joined(self, spans: Sequence[Span]) -> list[Span]:
        """The smallest gaps are bridged first, as far as may be read early."""
        bridged = set()
        gaps = sorted((max(0, b[0] - a[1]), n) for n, (a, b) in enumerate(itertools.pairwise(spans)))
        for gap, n in gaps:
            if gap > self._early:
                break
            self._early -= gap
            bridged.add(n)
        result: list[Span] = []
        for n, (start, stop) in enumerate(spans):
            if n - 1 in bridged:
                result[-1] = (result[-1][0], max(stop, result[-1][1]))
            else:
                result.append((start, stop))
        return result

    # What `zipfile` asks of a file.

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self.size)[whence]
        if at < 0:
            raise ValueError(f"byte {at} is before the file")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """For a reader of what is not yet known to be of use."""
        start, stop = self._at, min(self.size, self._at + len(buffer))
        self.guess(start, stop)
        data = self.read(stop - start)
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        begin = min(self._at, self.size)
        stop = self.size if size is None or size < 0 else min(self.size, begin + size)
        data = self.get(begin, stop)
        self._at = stop
        return data
