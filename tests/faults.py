"""The faults, and what each back end makes of them: the README's table, each cell of which is a test.

`python -m tests.faults` prints the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tests.misbehaving import (
    Fault,
    changes,
    cut,
    expired,
    first,
    flipped,
    from_then_on,
    ignored_range,
    long_206,
    other_range,
    reset,
    reset_within,
    short_206,
    stall,
    status,
    trickle,
)

OVER_HTTP = ["s3 direct", "s3 fsspec", "gs direct", "gs fsspec", "https direct", "https fsspec"]
FILES = ["file", "other fsspec"]
BACKENDS = [*OVER_HTTP, *FILES]

MENDED, REST, UNSEEN, STORE, PIN = "mended", "rest", "unseen", "StoreError", "PinError"
CORRUPT, REFUSED = "CorruptionError", "ConfigError"


@dataclasses.dataclass(frozen=True)
class Row:
    """A fault. `cells` are what comes of it, one word for all of OVER_HTTP or one by back end; `says` is what an error
    must tell, `read` are arguments of the load."""

    what: str
    fault: Fault
    cells: str | Mapping[str, str]
    says: Sequence[str] = ()
    read: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def cell(self, backend: str) -> str | None:
        """What comes of it there; None where it cannot happen."""
        if isinstance(self.cells, str):
            return self.cells if backend in OVER_HTTP else None
        return self.cells.get(backend)


ONE_TRY_MORE = {"retries": 1}
TRIES = ["2 tries", "read.retries"]
BOTH_PINS = ["changed while it was read", "pinned ", "found ", "keep a checkpoint's files unchanged"]
EVERYWHERE = dict.fromkeys(BACKENDS, PIN)
BY_CONTENT = EVERYWHERE | {"s3 direct": UNSEEN, "s3 fsspec": UNSEEN}
"""An ETag of S3 is the same for the same bytes."""

BY_CHECKSUM = {backend: REFUSED if "https" in backend else CORRUPT for backend in OVER_HTTP}
"""A web server has no checksums, which is told before a weight is read."""

LATE = dict.fromkeys(OVER_HTTP, REST) | {backend: MENDED for backend in OVER_HTTP if "direct" in backend}
"""What `direct` had of the piece that it waited for is read again."""

ROWS = {
    "burst": Row("503 twice", first(2, status(503)), MENDED),
    "retry-after": Row("429 with Retry-After, which is waited for", first(1, status(429, Retry_After="1")), MENDED),
    "reset": Row("a reset before the reply", first(2, reset), MENDED),
    "reset-within": Row("a reset within the body", first(1, reset_within), MENDED),
    "cut": Row("a body that ends early", first(2, cut), REST),
    "stall": Row("silence within the body", first(1, stall), LATE, read={"timeout": "5s"}),
    "short-206": Row("206 with less than the range", first(1, short_206), MENDED),
    "long-206": Row("206 with more than the range", first(1, long_206), MENDED),
    "other-range": Row("206 with another range", first(1, other_range), MENDED),
    "ignored-range": Row("200 with the whole object, which is not read", first(1, ignored_range), MENDED),
    "expired": Row("credentials that have expired, once", first(1, expired), MENDED),
    "flipped": Row("a flipped bit in a body", first(1, flipped), UNSEEN),
    "flipped-checked": Row(
        "a flipped bit in a body, with `verify: checksum`", first(1, flipped), BY_CHECKSUM, ["hecksum"],
        {"verify": "checksum"},
    ),
    "always-500": Row("500 from now on", from_then_on(1, 1, status(500)), STORE, ["status 500", *TRIES], ONE_TRY_MORE),
    "always-reset": Row("resets from now on", from_then_on(1, 1, reset), STORE, ["2 tries", "network"], ONE_TRY_MORE),
    "always-stall": Row(
        "silence from now on", from_then_on(1, 1, stall), STORE, ["ime", *TRIES], {**ONE_TRY_MORE, "timeout": "700ms"}
    ),
    "always-ignored": Row(
        "200 from now on", from_then_on(1, 1, ignored_range), STORE, ["ignored the Range", *TRIES], ONE_TRY_MORE
    ),
    "always-expired": Row(
        "credentials refused from now on", from_then_on(1, 1, expired), STORE, ["status 40", "refuses now"]
    ),
    "trickle": Row(
        "a byte now and then, until `read.deadline`", from_then_on(1, 1, trickle), STORE, ["read.deadline has passed"],
        {"deadline": "3s"},
    ),
    "overwritten": Row("the object is overwritten", changes("overwrite"), EVERYWHERE, BOTH_PINS),
    "deleted": Row("the object is deleted", changes("delete"), EVERYWHERE, ["changed while", "found no such"]),
    "hangs": Row(
        "a mounted file system that hangs", changes("hang"), {"file": STORE},
        ["nothing came for 0.7 s (read.timeout), and cannot be interrupted"], {"timeout": "700ms"},
    ),
    "uploaded-again": Row("the same bytes are uploaded again", changes("again"), BY_CONTENT, BOTH_PINS),
}  # fmt: skip

LOST = "LostRankError"
TERMINATED = "TerminatedError"
ENDINGS = {
    "lost": Row("a host is lost while it waits for the server", from_then_on(1, 0, stall), LOST, ["rank 1"]),
    "terminated": Row("SIGTERM while it waits for the server", from_then_on(1, 0, stall), TERMINATED, ["by SIGTERM"]),
}
"""What befalls a rank of the command: tests/test_endings.py."""


def table() -> str:
    """The README's."""
    lines = [f"| what the server does | {' | '.join(BACKENDS)} |", "| --- |" + " --- |" * len(BACKENDS)]
    for row in (*ROWS.values(), *ENDINGS.values()):
        cells = [row.cell(backend) for backend in BACKENDS]
        lines.append(f"| {row.what} | {' | '.join(cell or '' for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
