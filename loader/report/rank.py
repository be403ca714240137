"""What one rank did."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Seconds(Part):
    """`read` and `exchange` are what a rank waited for ranges and messages (or was busy sending these); `convert` and
    `write` what it was busy in them. Reading goes on beside the rest.

    `sink` is the part of `write` that the checkpoint took; it is not in the JSON. What `total` has beyond all is the
    start: the process group, the model, the fingerprint.
    """

    total: float
    catalog: float = 0.0
    plan: float = 0.0
    read: float = 0.0
    exchange: float = 0.0
    convert: float = 0.0
    write: float = 0.0
    sink: float = Field(default=0.0, exclude=True)


class RankReport(Part):
    """Sizes are in bytes. Not in the JSON's `ranks` are `retries` and `hedged_bytes`, which are summed into the job's,
    and what tells why it took so long: how many GETs were `throttled`, for how many seconds GETs were in flight, all
    together, for how many the storage client's event loop was busy, for how many copies to the device were waited for
    (which `write` has too), and how many `threads` torch computes with.
    """

    rank: int
    host: str
    fetched_bytes: int
    gets: int
    retries: int = Field(default=0, exclude=True)
    throttled: int = Field(default=0, exclude=True)
    get_seconds: float = Field(default=0.0, exclude=True)
    loop_seconds: float = Field(default=0.0, exclude=True)
    upload_seconds: float = Field(default=0.0, exclude=True)
    hedged_bytes: int = Field(default=0, exclude=True)
    threads: int = Field(default=1, exclude=True)
    exchanged_bytes: int
    shard_bytes: int
    peak_over_shards_bytes: int | None
    seconds: Seconds
