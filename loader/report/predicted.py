"""What a dry run adds to a report: what cannot be measured afterwards, as JSON and as lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Self

import humanize
from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(_Part):
    """A number that every rank has one of."""

    least: int
    mean: float
    most: int

    @classmethod
    def of(cls, column: Sequence[int]) -> Self:
        return cls(least=min(column), mean=sum(column) / len(column), most=max(column))


class Predicted(_Part):
    """What a dry run foresees. It is written only where every parameter and key is covered: `coverage`.

    `per_rank` has `tensors` (held at least in part), `gets` and, in bytes, the rest; `held_bytes` is what all ranks
    need together: above `needed_bytes` it is what is shared. `egress_bytes` are the bucket's for each `read.share`.
    `seconds` are what each link takes by itself (see `loader.plan.forecast.times`), at Gbit/s of a host of
    `ranks_per_host`; all overlap, and `bound_by` takes longest.
    """

    coverage: Literal["complete"] = "complete"
    per_rank: dict[str, Spread]
    held_bytes: int
    egress_bytes: dict[str, int]
    ranks_per_host: int
    bucket_gbps: float
    peer_gbps: float
    seconds: dict[str, float]
    bound_by: str

    def lines(self, needed_bytes: int) -> dict[str, str]:
        """The table's rows by their names."""
        held, shared = map(humanize.naturalsize, (self.held_bytes, self.held_bytes - needed_bytes))
        egress = ", ".join(f"{share} {humanize.naturalsize(count)}" for share, count in self.egress_bytes.items())
        speeds = {
            "bucket": f"bucket {{:.1f}} s at {self.bucket_gbps:g} Gbit/s a host",
            "connections": "its connections {:.1f} s",
            "peers": f"peers {{:.1f}} s at {self.peer_gbps:g} Gbit/s a host",
        }
        return {
            "coverage": "complete: every parameter and buffer has its source, every key its use",
            "per rank": f"{'least':>12} {'mean':>12} {'most':>12}",
            **{f" {_LABELS[name]}": _row(name, spread) for name, spread in self.per_rank.items()},
            "shared": f"ranks need {held} together: {shared} are not read again",
            "egress": f"by read.share: {egress} ({self.ranks_per_host} ranks a host)",
            "seconds": ", ".join(speeds[link].format(taken) for link, taken in self.seconds.items()),
            "bound by": f"{self.bound_by}, {self.seconds[self.bound_by]:.1f} s",
        }


_LABELS = {
    "tensors": "tensors",
    "shard_bytes": "shards",
    "fetched_bytes": "fetched",
    "gets": "GETs",
    "exchanged_bytes": "sent",
    "peak_over_shards_bytes": "memory",
}


def _row(name: str, spread: Spread) -> str:
    binary = name.startswith("peak")  # as the budget is given
    shown = partial(humanize.naturalsize, binary=binary) if name.endswith("_bytes") else "{:,.0f}".format
    return " ".join(f"{shown(value):>12}" for value in (spread.least, spread.mean, spread.most))
