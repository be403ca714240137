"""What happened: `report.json`, and the five lines that people read at the end of a load.

Every rank makes a `RankReport`; `merge` makes the job's `Report` of them. Attributes are the JSON's names; sizes are in
bytes, times in seconds. Null stands for what was not, or could not be, measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import humanize
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field, field_validator

from loader.errors import SinkError
from loader.predicted import Predicted
from loader.uri import public_uri

LISTED = 5
"""How many files the table tells of that were not checked whole."""

Bound = Literal["bucket", "exchange", "convert", "write", "catalog", "plan", "start"]

_PHASE_OF: Mapping[Bound, str] = {
    "bucket": "read",
    "exchange": "exchange",
    "convert": "convert",
    "write": "write",
    "catalog": "catalog",
    "plan": "plan",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Seconds(_Part):
    """`read` and `exchange` are what the pipeline waited for them, `convert` and `write` what it was busy in them.

    What `total` has beyond the phases is the start: the process group, the model, the fingerprint, the sink.
    """

    total: float
    catalog: float = 0.0
    plan: float = 0.0
    read: float = 0.0
    exchange: float = 0.0
    convert: float = 0.0
    write: float = 0.0


class Source(_Part):
    """`files` is how many there are, `pins` are by file name; `uri` is kept without what may be secret in it."""

    uri: str
    files: int
    checkpoint_bytes: int
    pins: dict[str, str]

    @field_validator("uri")
    @classmethod
    def _public(cls, uri: str) -> str:
        return public_uri(uri)


class Checksum(_Part):
    """What was checked of a file. `algorithm` and `value` (hex) are the bucket's; the value is null where a `.bin`'s
    records have one each. `checked_bytes` are what they should be; `unchecked` says why not all were checked."""

    algorithm: str | None
    value: str | None
    checked_bytes: int
    unchecked: str | None


class Memory(_Part):
    """Host memory above the shards: what a rank was allowed, and the most that any rank held."""

    budget_bytes: int
    peak_over_shards_bytes: int | None


class RankReport(_Part):
    """What one rank did. `retries` and `hedged_bytes` are summed into the job's and are not in the JSON's `ranks`."""

    rank: int
    host: str
    fetched_bytes: int
    gets: int
    retries: int = Field(default=0, exclude=True)
    hedged_bytes: int = Field(default=0, exclude=True)
    exchanged_bytes: int
    shard_bytes: int
    peak_over_shards_bytes: int | None
    seconds: Seconds


class Report(_Part):
    """The whole job, as in `report.json`. `egress_ratio` is fetched / needed bytes, null where nothing was needed.

    `hedged_bytes`, of the fetched, may have come twice: what was late was asked for again. With `predicted` it is a
    dry run's, and all of it is as planned.
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
    fingerprint: str | None = None
    checksums: dict[str, Checksum] | None = None
    predicted: Predicted | None = None
    ranks: tuple[RankReport, ...]

    def to_json(self) -> str:
        absent = {name for name in ("hedged_bytes", "checksums", "predicted") if not getattr(self, name)}
        return self.model_dump_json(indent=2, exclude=absent) + "\n"

    def write(self, path: str) -> None:
        """Write the JSON to a local path or any fsspec URL: whole or not at all. Raises SinkError."""
        try:
            fs, inner = url_to_fs(path)
            if isinstance(fs, LocalFileSystem):
                _replace(Path(inner), self.to_json())
            else:
                fs.pipe_file(inner, self.to_json().encode())
        except Exception as error:
            raise SinkError(f"{public_uri(path)}: cannot write the report: {type(error).__name__}: {error}") from error

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
            "seconds": ", ".join(f"{name} {value:.1f}" for name, value in self.seconds),
            "bound by": f"{self.bound_by}, {spent(self.seconds)[self.bound_by]:.1f} s of {self.seconds.total:.1f} s",
        } | self._verified()

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
    predicted: Predicted | None = None,
) -> Report:
    """The job's report of all its `ranks`: counts are summed; times and the memory peak are maxima."""
    fetched = sum(each.fetched_bytes for each in ranks)
    peaks = [each.peak_over_shards_bytes for each in ranks if each.peak_over_shards_bytes is not None]
    seconds = Seconds(**{name: max(getattr(each.seconds, name) for each in ranks) for name in Seconds.model_fields})
    return Report(
        source=source,
        world_size=len(ranks),
        mesh=dict(mesh),
        tensors=tensors,
        needed_bytes=needed_bytes,
        fetched_bytes=fetched,
        egress_ratio=fetched / needed_bytes if needed_bytes else None,
        gets=sum(each.gets for each in ranks),
        retries=sum(each.retries for each in ranks),
        hedged_bytes=sum(each.hedged_bytes for each in ranks),
        exchanged_bytes=sum(each.exchanged_bytes for each in ranks),
        memory=Memory(budget_bytes=budget_bytes, peak_over_shards_bytes=max(peaks, default=None)),
        seconds=seconds,
        bound_by=bound_by(seconds),
        fingerprint=fingerprint,
        checksums=None if checksums is None else dict(checksums),
        predicted=predicted,
        ranks=tuple(sorted(ranks, key=lambda each: each.rank)),
    )


def bound_by(seconds: Seconds) -> Bound:
    """What took most of the time; of equals, what `spent` names first.

    Waiting for reads counts as the bucket: total 10, plan 1, read 6, write 2 -> "bucket" (and 1 s is the start).
    """
    times = spent(seconds)
    return max(times, key=lambda name: times[name])


def spent(seconds: Seconds) -> dict[Bound, float]:
    """`seconds` by what can bound a load.

    Phases are maxima over different ranks, and may together exceed the total: start is then 0.
    """
    times = {bound: float(getattr(seconds, phase)) for bound, phase in _PHASE_OF.items()}
    times["start"] = max(0.0, seconds.total - sum(times.values()))
    return times


def _size(count: int, *, binary: bool = False) -> str:
    return humanize.naturalsize(count, binary=binary)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _replace(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader never sees half a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).chmod(0o644)  # mkstemp's 0o600 would hide it from whoever collects reports
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
