"""The exception tree, drawn once.

    LoaderError                  exit code 1: a restart may mend it
    ├── UserError (ValueError)   exit code 2: a restart cannot mend it
    │   ├── ConfigError          a key, a value, a mesh
    │   ├── BuilderError         the model could not be built or holds what cannot be filled
    │   ├── CatalogError         the source: missing, unreadable, or a header or index that lies
    │   ├── ConversionError      a conversion that cannot be traced or run
    │   ├── CoverageError        a parameter without a source, a key without a target, shapes that differ
    │   └── FingerprintError     the weights are other ones than expected
    ├── StoreError               a range that could not be read, after all retries
    │   └── PinError             an object changed while it was read
    ├── MemoryBudgetError        the plan does not fit `read.memory_budget`, or the machine had less memory than that
    ├── CorruptionError          a bit flipped in the bucket, on the way or in a rank's memory
    ├── SinkError                the result could not be written
    ├── LostRankError            a rank, or the store that ranks talk through, is gone
    ├── TerminatedError          the job was told to end
    └── InternalError            ours: a bug in the loader

A foreign exception is translated at the seam where it enters (`store`, `place.build`, `sinks`), with the cause kept.
Every rank raises the same class with the same message: `to_wire` and `from_wire` carry an error between ranks.
"""

from __future__ import annotations

import errno
import json
import traceback
from typing import ClassVar


class LoaderError(Exception):
    """Anything the loader reports. `rank` is the rank it began on, or None where no other rank was involved."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank


class UserError(LoaderError, ValueError):
    """What a restart cannot mend."""

    exit_code: ClassVar[int] = 2


class ConfigError(UserError):
    """An unknown key, a bad value, a mesh that does not fit the world."""


class BuilderError(UserError):
    """The model could not be built, or holds a tensor that cannot be filled."""


class CatalogError(UserError):
    """The source is missing, unreadable, or its header or index contradicts itself."""


class ConversionError(UserError):
    """A conversion that cannot be traced or run."""


class CoverageError(UserError):
    """The checkpoint and the model do not cover each other exactly."""


class FingerprintError(UserError):
    """The weights are other ones than `expect` says: of another checkpoint, conversion or dtype."""


class StoreError(LoaderError):
    """A range that could not be read, after all retries."""


class PinError(StoreError):
    """An object changed between the catalog and a read."""


class MemoryBudgetError(LoaderError):
    """The plan does not fit the memory budget, or a rank ran out of memory."""


class CorruptionError(LoaderError):
    """What two ranks should have alike, or a file and its checksum, differ: a bit flipped in the bucket, on the way, or
    in a rank's memory."""


class SinkError(LoaderError):
    """The loaded tensors could not be written or handed over."""


class LostRankError(LoaderError):
    """A rank stopped answering, or the store that ranks talk through is gone."""


class TerminatedError(LoaderError):
    """The job was told to end, with SIGTERM."""


class InternalError(LoaderError):
    """A bug in the loader: please report it with the traceback."""


def to_wire(error: BaseException, rank: int) -> bytes:
    """Encode `error` for other ranks. What is not a LoaderError is ours, and travels with its traceback."""
    if not isinstance(error, LoaderError):
        text = "".join(traceback.format_exception(error))
        if _is_out_of_memory(error):
            error = MemoryBudgetError(f"out of memory: give the rank more, or lower read.memory_budget\n{text}")
        else:
            error = InternalError(f"{type(error).__name__}: {error}\n{text}")
    first = rank if error.rank is None else error.rank
    return json.dumps({"class": type(error).__name__, "message": error.message, "rank": first}).encode()


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch says it in words (RuntimeError) on the CPU, and with a class of its own on a device."""
    by_system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return by_system or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def from_wire(data: bytes) -> LoaderError:
    """Decode what `to_wire` made, as the same class."""
    fields = json.loads(data)
    cls = globals().get(fields["class"])
    assert isinstance(cls, type), fields["class"]
    assert issubclass(cls, LoaderError), fields["class"]
    return cls(fields["message"], rank=fields["rank"])
