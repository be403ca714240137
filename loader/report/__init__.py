"""What happened: `report.json`, and the five lines that people read at the end of a load.

Every rank makes a `RankReport`; `merge` makes the job's `Report` of them. Attributes are the JSON's names; sizes are in
bytes, times in seconds. Null stands for what was not, or could not be, measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import humanize
from pydantic import field_validator

from loader.ground.uri import public_uri
from loader.report.bound import Bound, Reading, advise, bound_by, spent
from loader.report.predicted import Predicted
from loader.report.rank import Part, RankReport, Seconds
from loader.sinks.document import write_document

LISTED = 5
"""How many files the table tells of that were not checked whole."""

__all__ = ["Bound", "Checksum", "Memory", "RankReport", "Reading", "Report", "Seconds", "Source", "merge"]

WORTHWHILE = 1.0
"""Seconds that the worst must have taken for advice on it."""


class Source(Part):
    """`files` is how many there are, `pins` are by file name; `uri` is kept without what may be secret in it."""

    uri: str
    files: int
    checkpoint_bytes: int
    pins: dict[str, str]

    @field_validator("uri")
    @classmethod
    def _public(cls, uri: str) -> str:
        return public_uri(uri)


class Checksum(Part):
    """What was checked of a file. `algorithm` and `value` (hex) are the bucket's; the value is null where a `.bin`'s
    records have one each. `checked_bytes` are what they should be; `unchecked` says why not all were checked."""

    algorithm: str | None
    value: str | None
    checked_bytes: int
    unchecked: str | None


class Memory(Part):
    """Host memory above the shards: what a rank was allowed, and the most that any rank held."""

    budget_bytes: int
    peak_over_shards_bytes: int | None


class Report(Part):
    """The whole job, as in `report.json`. `egress_ratio` is fetched / needed bytes, null where nothing was needed.

    `hedged_bytes`, of the fetched, may have come twice: what was late was asked for again. `advice` names the setting
    that would help, where there is one. With `predicted` it is a dry run's, and all of it is as planned.
    """

    version: Literal[1] = 1
    source: Source
    world_size: int
    mesh: dict[str, int]
    tensors: int
    needed_bytes: int
    fetched_bytes: int
    egress_ratio: float | None
    gets: int
    retries: int
    hedged_bytes: int = 0
    exchanged_bytes: int
    memory: Memory
    seconds: Seconds
    bound_by: Bound
    advice: str | None = None
    fingerprint: str | None = None
    checksums: dict[str, Checksum] | None = None
    predicted: Predicted | None = None
    ranks: tuple[RankReport, ...]

    def to_json(self) -> str:
        absent = {name for name in ("hedged_bytes", "advice", "checksums", "predicted") if not getattr(self, name)}
        return self.model_dump_json(indent=2, exclude=absent) + "\n"

    def summary(self) -> dict[str, Any]:
        """The JSON's fields that are the whole job's, without the pins."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"ranks": True, "source": {"pins"}})

    def write(self, path: str) -> None:
        """Write the JSON to a local path or any fsspec URL: whole or not at all. Raises SinkError."""
        write_document(path, [self.to_json()], "report")

    def table(self) -> str:
        """Lines for people, without colour: a job's log shows them as well as a terminal. A dry run has its own."""
        what = f"{self.tensors:,} tensors, {_size(self.needed_bytes)}, {self.source.uri} over {self._mesh()}"
        rows = {"to load": what, **self.predicted.lines(self.needed_bytes)} if self.predicted else self._rows(what)
        return "\n".join(f"{name:<8}  {text}" for name, text in rows.items())

    def _rows(self, what: str) -> dict[str, str]:
        return {
            "loaded": what,
            "bucket": f"{self.gets:,} GETs, {_size(self.fetched_bytes)}, egress ratio {_ratio(self.egress_ratio)}, "
            f"{self.retries:,} retries; {_size(self.exchanged_bytes)} exchanged between ranks",
            "memory": self._memory(),
            "seconds": ", ".join(f"{name} {value:.1f}" for name, value in self.seconds if name != "sink"),
            "bound by": f"{self.bound_by}, {spent(self.ranks)[self.bound_by]:.1f} s of {self.seconds.total:.1f} s",
            **({"advice": self.advice} if self.advice else {}),
            **self._verified(),
        }

    def _verified(self) -> dict[str, str]:
        if self.fingerprint:
            return {"verified": f"fingerprint {self.fingerprint}"}
        if self.checksums is None:
            return {}
        rest = {name: each.unchecked for name, each in self.checksums.items() if each.unchecked}
        sizes = [each.checked_bytes for each in self.checksums.values()]
        text = f"checksums of {_size(sum(sizes))}, of all of {len(sizes) - len(rest)} of {len(sizes)} files"
        lines = [f"not all of {name}: {why}" for name, why in list(rest.items())[:LISTED]]
        return {"verified": "; ".join([text, *lines]) + (", …" if len(rest) > LISTED else "")}

    def _mesh(self) -> str:
        dims = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        ranks = f"{self.world_size:,} rank{'s' if self.world_size > 1 else ''}"
        return f"{dims} ({ranks})" if dims else ranks

    def _memory(self) -> str:
        budget, peak = _size(self.memory.budget_bytes, binary=True), self.memory.peak_over_shards_bytes
        if peak is None:
            return f"peak over the shards not measured on this system; budget {budget}"
        worst = max(self.ranks, key=lambda each: each.peak_over_shards_bytes or 0)
        return f"peak over the shards {_size(peak, binary=True)} (rank {worst.rank} on {worst.host}), budget {budget}"


def merge(
    ranks: Sequence[RankReport],
    *,
    source: Source,
    mesh: Mapping[str, int],
    tensors: int,
    needed_bytes: int,
    budget_bytes: int,
    fingerprint: str | None = None,
    checksums: Mapping[str, Checksum] | None = None,
    reading: tuple[str, int] | None = None,
    predicted: Predicted | None = None,
) -> Report:
    """The job's report of all its `ranks`: counts are summed; times and the memory peak are maxima.

    With `reading`, the job's `read.share` and `read.concurrency`, there is advice.
    """
    fetched = sum(each.fetched_bytes for each in ranks)
    peaks = [each.peak_over_shards_bytes for each in ranks if each.peak_over_shards_bytes is not None]
    ratio = fetched / needed_bytes if needed_bytes else None
    times = spent(ranks)
    bound = bound_by(times)
    worthwhile = times[bound] >= WORTHWHILE
    return Report(
        source=source,
        world_size=len(ranks),
        mesh=dict(mesh),
        tensors=tensors,
        needed_bytes=needed_bytes,
        fetched_bytes=fetched,
        egress_ratio=ratio,
        gets=sum(each.gets for each in ranks),
        retries=sum(each.retries for each in ranks),
        hedged_bytes=sum(each.hedged_bytes for each in ranks),
        exchanged_bytes=sum(each.exchanged_bytes for each in ranks),
        memory=Memory(budget_bytes=budget_bytes, peak_over_shards_bytes=max(peaks, default=None)),
        seconds=Seconds(**{name: max(getattr(each.seconds, name) for each in ranks) for name in Seconds.model_fields}),
        bound_by=bound,
        advice=advise(bound, ranks, Reading(*reading, ratio)) if reading and worthwhile else None,
        fingerprint=fingerprint,
        checksums=None if checksums is None else dict(checksums),
        predicted=predicted,
        ranks=tuple(sorted(ranks, key=lambda each: each.rank)),
    )


def _size(count: int, *, binary: bool = False) -> str:
    return humanize.naturalsize(count, binary=binary)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"
