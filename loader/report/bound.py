"""What bound a load, and the setting that would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import humanize

from loader.plan.forecast import CONNECTION
from loader.report.rank import RankReport
from loader.store.flow import MOST

Bound = Literal["bucket", "exchange", "convert", "write", "sink", "catalog", "plan", "start"]


class Reading(NamedTuple):
    """How the job was to read: `read.share` and `read.concurrency`; its egress ratio, None where nothing was needed."""

    share: str
    concurrency: int
    egress_ratio: float | None


def spent(ranks: Sequence[RankReport]) -> dict[Bound, float]:
    """Seconds by what can bound a load: of the rank that spent most on it.

    A rank that waits for another waits for what that one is busy with. So exchange is only by how much the last rank is
    later than the busiest one's own work: ranks (read 5, exchange 0) and (read 0, exchange 5) -> bucket 5, exchange 0;
    two of (read 3, exchange 4) -> bucket 3, exchange 4.

    Reading goes on beside writing, so together they may exceed the total: start is then 0.
    """
    seconds = [each.seconds for each in ranks]
    shards = [each.write - each.sink for each in seconds]
    own = [max(each.read, each.convert + write) for each, write in zip(seconds, shards, strict=True)]
    times: dict[Bound, float] = {
        "bucket": max(each.read for each in seconds),
        "exchange": max(busy + each.exchange for busy, each in zip(own, seconds, strict=True)) - max(own),
        "convert": max(each.convert for each in seconds),
        "write": max(shards),
        "sink": max(each.sink for each in seconds),
        "catalog": max(each.catalog for each in seconds),
        "plan": max(each.plan for each in seconds),
    }
    times["start"] = max(0.0, max(each.total for each in seconds) - sum(times.values()))
    return times


def bound_by(times: Mapping[Bound, float]) -> Bound:
    """What took most of the time; of equals, what `spent` names first. One thread converts and writes."""
    both = times["convert"] + times["write"]
    longest = max(times, key=lambda name: both if name in {"convert", "write"} else times[name])
    if longest not in {"convert", "write"}:
        return longest
    return "convert" if times["convert"] >= times["write"] else "write"


def advise(bound: Bound, ranks: Sequence[RankReport], reading: Reading) -> str | None:
    """The setting that would help, and why; None where there is none to name."""
    worst = max(ranks, key=lambda each: each.seconds.convert + each.seconds.write)
    threads = f"on {worst.threads} thread{'s' if worst.threads > 1 else ''} of each rank"
    hosts = len({each.host for each in ranks})
    settings: dict[Bound, str] = {
        "bucket": _for_the_bucket(ranks, reading),
        "exchange": "read.share: node keeps the exchange within each host, for more bytes from the bucket"
        if hosts > 1 and reading.share == "world"
        else "read.share: none lets every rank read for itself, for more bytes from the bucket",
        "convert": f"OMP_NUM_THREADS: the conversion ran {threads}",
        "write": f"OMP_NUM_THREADS: the shards were written {threads}"
        if worst.upload_seconds < (worst.seconds.write - worst.seconds.sink) / 2
        else "the host's link to the device is full: no setting helps, but more hosts, or fewer devices on each",
        "sink": "output.checkpoint: storage nearer or faster; output.entrypoint hands the model over unwritten",
        "catalog": f"read.concurrency: the files' headers were read {reading.concurrency} at a time",
        "plan": "read.range_size: larger ranges are fewer to plan",
    }
    return settings.get(bound)


def _for_the_bucket(ranks: Sequence[RankReport], reading: Reading) -> str:
    gets, throttled = sum(each.gets for each in ranks), sum(each.throttled for each in ranks)
    if throttled > gets / 20:
        return (
            f"read.concurrency: the bucket throttled {throttled:,} of {gets:,} GETs; ask for fewer at a time, or for "
            "fewer and larger ones with read.range_size"
        )
    if reading.share != "world" and (reading.egress_ratio or 0) > 1.1:
        return f"read.share: world reads each byte once; it was {reading.egress_ratio:.1f} times"
    slowest = max(ranks, key=lambda each: each.seconds.read)
    if slowest.loop_seconds > 0.8 * slowest.seconds.read:
        return (
            f"read.range_size: the storage client's one event loop was busy for {slowest.loop_seconds:.1f} s; larger "
            "ranges are fewer requests to it. read.backend: direct, where the scheme has it, needs none"
        )
    return _for_the_link(slowest, reading)


def _for_the_link(slowest: RankReport, reading: Reading) -> str:
    """Where neither bucket nor client holds the ranges back: what keeps the link from being full, if it is not."""
    in_flight = slowest.get_seconds / slowest.seconds.read if slowest.seconds.read else 0.0
    if in_flight < reading.concurrency / 2:
        few = f"{in_flight:.0f} of {reading.concurrency} ranges were in flight"
        if slowest.gets < 2 * reading.concurrency:
            return f"read.range_size: {few}, for there were but {slowest.gets}; smaller ones are more"
        return f"read.memory_budget: {few}, for there was no room for more"
    each = slowest.fetched_bytes / slowest.get_seconds
    rate = f"{humanize.naturalsize(each)}/s over each of {in_flight:.0f} connections"
    found = slowest.gets >= 6 * reading.concurrency and in_flight < 0.75 * MOST  # how many bring most, in time
    if each >= CONNECTION / 2 and not found:
        return f"read.concurrency: {rate} is what an object store gives one; more would give more"
    return f"the link is full, at {rate}: no setting helps, but more hosts, or a bucket that is nearer"
