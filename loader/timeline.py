"""`trace`: what every rank did and when, in Chrome's trace format, which ui.perfetto.dev opens.

Each rank keeps at most KEPT spans, the longest; of more than JOB / KEPT ranks each keeps fewer. The file tells how many
shorter ones are left out. All are on the clock of rank 0 (see `loader.exchange.clocks`).
"""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from loader.errors import LoaderError, LostRankError, SinkError
from loader.exchange.clocks import Offset, clock_offset
from loader.exchange.control import Control
from loader.ground.recording import Event
from loader.sinks.document import check_place, write_document
from loader.stream.planning import pack, unpack

KEPT = 4096
"""Events of a rank: 2.5 MiB of its memory budget, and a minute of 8 MiB ranges at 500 MB/s."""
JOB = 1 << 18
"""Events of a job, at 64 for each of 4,096 ranks: about 40 MB of JSON."""
RESCUE = 1.0
"""Seconds for which rank 0 waits for what the others recorded, after an error."""
LANES = {"MainThread": 0, "loader-rounds": 1, "loader-write": 2}

_log = logging.getLogger(__name__)


class Head(NamedTuple):
    """Of a rank's part: `begun` is when its first span did, on rank 0's clock."""

    rank: int
    host: str
    begun: float
    offset: Offset
    left_out: dict[str, int]


@contextmanager
def traced(control: Control, path: str | None) -> Iterator[None]:
    """Record what is done in this context, and write it to `path` at its end; None does neither. Every rank enters it.

    Raises ConfigError before anything is done where nothing can be written at a local `path`, SinkError at the end.
    After an error what the ranks tell within a second is written, unless the store that they talk through is gone.
    """
    if path is None:
        yield
        return
    control.recorder.keep(max(1, min(KEPT, JOB // control.world_size)))
    with control.phase("clocks"):
        if control.rank == 0:  # which writes it
            check_place(path, "trace")
        offset = clock_offset(control)
    try:
        yield
    except LoaderError as error:
        if not (isinstance(error, LostRankError) and error.rank is None):
            _rescue(control, path, offset)
        raise
    with control.phase("trace"):
        control.put("trace", _part(control, offset))
        if control.rank == 0:
            _write(path, control.take("trace", range(control.world_size)))


def _part(control: Control, offset: Offset) -> bytes:
    events, left_out = control.recorder.events(), dict(control.recorder.left_out)
    begun = events[0].begun - offset.seconds
    head = Head(control.rank, socket.gethostname(), begun, offset, left_out)
    return pack((head, pack([tuple(event) for event in events])))


def _rescue(control: Control, path: str, offset: Offset) -> None:
    with suppress(LoaderError):  # what ended the job stands
        control.show("trace", _part(control, offset))
        if control.rank == 0:
            until = time.monotonic() + RESCUE
            while not all(parts := control.shown("trace", range(control.world_size))) and time.monotonic() < until:
                time.sleep(RESCUE / 20)
            try:
                _write(path, [part for part in parts if part])
            except SinkError as error:
                _log.warning("%s", error)


def _write(path: str, parts: Sequence[bytes]) -> None:
    found = [unpack(part) for part in parts]
    heads: list[Head] = [head for head, _ in found]
    first = min(head.begun for head in heads)
    write_document(path, _chunks(heads, (unpack(events) for _, events in found), first), "trace")


def _chunks(heads: Sequence[Head], parts: Iterator[list[tuple[Any, ...]]], first: float) -> Iterator[str]:
    """The file, a rank at a time."""
    about = {
        "clock": "rank 0's; offset_seconds and error_seconds are what each rank's host's is ahead of it",
        "ranks": [
            {
                "rank": head.rank,
                "host": head.host,
                "offset_seconds": head.offset.seconds,
                "error_seconds": head.offset.error,
                "shorter_spans_left_out": head.left_out,
            }
            for head in heads
        ],
    }
    yield f'{{"displayTimeUnit": "ms",\n"otherData": {json.dumps(about)},\n"traceEvents": [\n'
    for number, (head, events) in enumerate(zip(heads, parts, strict=True)):
        recorded = [Event(*event) for event in events]
        lines = [*_named(head, {event.thread for event in recorded}), *(_slice(head, each, first) for each in recorded)]
        yield (",\n" if number else "") + ",\n".join(map(json.dumps, lines))
    yield "\n]}\n"


def _named(head: Head, threads: set[str]) -> Iterator[dict[str, Any]]:
    """What a viewer calls the rank and its lanes, and how it sorts them."""
    labels = {"name": f"rank {head.rank} on {head.host}"}
    yield {"ph": "M", "pid": head.rank, "name": "process_name", "args": labels}
    yield {"ph": "M", "pid": head.rank, "name": "process_sort_index", "args": {"sort_index": head.rank}}
    for thread in sorted(threads, key=_lane):
        lane = {"ph": "M", "pid": head.rank, "tid": _lane(thread)}
        name = "phases" if thread == "MainThread" else thread.removeprefix("loader-").replace("_", " ")
        yield {**lane, "name": "thread_name", "args": {"name": name}}
        yield {**lane, "name": "thread_sort_index", "args": {"sort_index": _lane(thread)}}


def _slice(head: Head, event: Event, first: float) -> dict[str, Any]:
    """In microseconds from the job's `first` second on rank 0's clock.

    Begin and end are rounded, and not how long it took: Perfetto leaves out a slice that overlaps the one before it, or
    the one that it is in, by however little.
    """
    begun = event.begun - head.offset.seconds - first
    start, end = round(begun * 1e6, 1), round((begun + event.seconds) * 1e6, 1)
    return {
        "ph": "X",
        "pid": head.rank,
        "tid": _lane(event.thread),
        "name": event.name,
        "ts": start,
        "dur": round(end - start, 1),
        "args": event.facts,
    }


def _lane(thread: str) -> int:
    """Phases first, then rounds, the writer, and the readers by their number."""
    number = re.search(r"\d+$", thread)
    return LANES.get(thread, 3 + int(number[0]) if number else 3)
