"""What travels between the lab and its ranks, as files in a folder that all of them see.

`<n>` is the n-th task, `<n>.<rank>` what came of it on a rank.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader.place.state_dict import Rule

POLL = 0.02
"""Seconds between looks at the folder."""


@dataclass(frozen=True)
class Task:
    """One contender's run. With `compare_with`, a directory, every bit is compared after the clock has stopped."""

    contender: str
    mesh: Mapping[str, int]
    rules: list[Rule]
    shapes: Mapping[str, tuple[int, ...]]
    uri: str
    storage_options: Mapping[str, Any]
    budget: int
    read: Mapping[str, Any]
    timeout: float
    compare_with: Path | None


@dataclass(frozen=True)
class Measured:
    """One rank's run: seconds from barrier to barrier and CPU seconds in between, the peak of its proportional memory
    above what it had before, and, on the first rank of a host, what came over the host's links: bytes of packets."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    bucket_bytes: int
    peer_bytes: int
    start_up: float
    """Of a load by this loader, the part before the first range: its catalog and plan."""
    compared: int
    """Bytes that landed and are as they should be; 0 where they were not looked at."""


@dataclass(frozen=True)
class Failed:
    report: str


def put(path: Path, value: object) -> None:
    """Write whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.rename(path)


def take(path: Path) -> Any:
    return pickle.loads(path.read_bytes())
