"""What ranks agree on: results, the first error, and where to stop.

Everything here goes through torch.distributed's key-value store, never through a collective: a rank that waits can
always see that another one failed. A watch thread beats for its rank, watches its neighbour's beat, and learns of
errors while the main thread is busy.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # the stubs hide them

from loader.errors import LoaderError, LostRankError, from_wire, to_wire

BEAT = 0.5
LOST_AFTER = 6.0
"""Seconds between beats, and without one until a rank counts as lost: all ranks must end within 10 s of a loss."""

UNSEEN_FOR = 120.0
"""Seconds until a rank that never beat at all counts as lost: it may still be importing."""

POLL = (0.001, 0.1)
"""First and longest pause in seconds between looks at a key. (The store's own `wait` cannot be interrupted.)"""

_loads = itertools.count()


class Control:
    """One load's agreement among the ranks of `store` (None: this process alone).

    Make it on every rank, in the same order; use it as a context manager.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        base = PrefixStore(f"loader/{next(_loads)}", store if store is not None else HashStore())
        self._store: Store = base.clone()  # type: ignore[attr-defined]  # the stubs lack it
        self._watch_store: Store = base.clone()  # type: ignore[attr-defined]
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._error: LoaderError | None = None
        self._started = -1
        self._last: int | None = None
        self._stop_known = threading.Event()
        self._payloads: list[str] = []
        self.peers: Sequence[int] = range(world_size)
        self.done_bytes = 0
        self._thread = threading.Thread(target=self._watch, name="loader-watch", daemon=True)

    @classmethod
    def of_group(cls) -> Control:
        """For the ranks of the default process group; for this process alone where there is none."""
        if not dist.is_initialized():
            return cls(None, 0, 1)
        return cls(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())  # noqa: SLF001

    def __enter__(self) -> Self:
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._changed.set()
        self._thread.join(timeout=2 * BEAT)
        if self.rank == 0 and exc[0] is None:
            for name in self._payloads:
                self._store.delete_key(name)

    # Errors

    def fail(self, error: BaseException) -> LoaderError:
        """Make `error` the job's, unless another came first; the one that stands is returned."""
        try:
            first = self._store.compare_set("error", "", to_wire(error, self.rank).decode())
            stands = from_wire(first)
        except (RuntimeError, OSError) as lost:
            stands = _store_lost(lost)
        self._set_error(stands)
        return stands

    @property
    def error(self) -> LoaderError | None:
        """The job's error, as soon as this rank knows of one."""
        return self._error

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Work that every rank does: ends on all ranks together, or raises the first error on all."""
        try:
            yield
        except BaseException as error:
            stands = self.fail(error)
            if isinstance(error, Exception):
                raise stands from error
            raise
        self.agree(name)

    def agree(self, name: str) -> None:
        """Wait until every rank came here. Raises the job's error if there is one instead."""
        try:
            if self._store.add(f"{name}/count", 1) == self.world_size:
                self._store.set(f"{name}/done", "1")
        except (RuntimeError, OSError) as error:
            self._set_error(_store_lost(error))
        self._wait(f"{name}/done")

    # Results

    def broadcast(self, name: str, payload: bytes | None, source: int = 0) -> bytes:
        """What rank `source` gives as `payload`, on every rank that asks."""
        if self.rank == source:
            assert payload is not None
            self._put(name, payload)
            return payload
        self._wait(name)
        return bytes(self._store.get(name))

    def put(self, name: str, payload: bytes) -> None:
        """Leave `payload` for another rank to `take`."""
        self._put(f"{name}/{self.rank}", payload)

    def take(self, name: str, ranks: Sequence[int]) -> list[bytes]:
        """What each of `ranks` has `put` under `name`."""
        for rank in ranks:
            self._wait(f"{name}/{rank}")
        return [bytes(value) for value in self._store.multi_get([f"{name}/{rank}" for rank in ranks])]

    def progress(self) -> int:
        """The job's `done_bytes`, as of the last beats."""
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])
        return sum(int(bytes(beat).partition(b" ")[2]) for beat in beats)

    def leave(self, seconds: float) -> None:
        """Wait until every rank is about to end, at most `seconds`: so that no rank's end hides another's message."""
        until = time.monotonic() + seconds
        try:
            left = self._store.add("left", 1)
            while left < self.world_size and time.monotonic() < until:
                time.sleep(POLL[1])
                left = self._store.add("left", 0)
        except (RuntimeError, OSError):
            return

    # Rounds

    def may_start(self, number: int) -> bool:
        """Whether round `number` is to be started. After an error, every peer ends with the same round.

        A rank that failed cannot simply stop: others wait for what it was to send. So each tells the last round that
        it started, and all go on, with empty payloads, to the latest of these.
        """
        with self._lock:
            if self._error is None:
                self._started = number
                return True
        self._stop_known.wait()
        return self._last is not None and number <= self._last

    # The watch thread

    def _watch(self) -> None:
        neighbour, seen, since = (self.rank + 1) % self.world_size, b"", time.monotonic()
        try:
            for count in itertools.count(1):
                if self._changed.wait(BEAT) and self._closed.is_set():
                    return
                self._changed.clear()
                self._beat(count)
                if self._error is None and self._watch_store.check(["error"]):
                    self._set_error(from_wire(self._watch_store.get("error")))
                if self._error is not None and not self._stop_known.is_set():
                    self._agree_on_stop()
                beat = self._read_beat(neighbour)
                if beat != seen:
                    seen, since = beat, time.monotonic()
                elif neighbour != self.rank and time.monotonic() - since > (LOST_AFTER if seen else UNSEEN_FOR):
                    self._lose(neighbour, seen)
                    neighbour, seen, since = (neighbour + 1) % self.world_size, b"", time.monotonic()
        except (RuntimeError, OSError) as error:
            if not self._closed.is_set():
                self._set_error(_store_lost(error))
                self._stop_known.set()

    def _beat(self, count: int) -> None:
        self._watch_store.set(f"beat/{self.rank}", f"{socket.gethostname()}:{count} {self.done_bytes}")

    def _read_beat(self, rank: int) -> bytes:
        name = f"beat/{rank}"
        return bytes(self._watch_store.get(name)) if self._watch_store.check([name]) else b""

    def _lose(self, rank: int, beat: bytes) -> None:
        host = beat.decode().rpartition(":")[0] or "unknown"
        lost = LostRankError(
            f"rank {rank} (host {host}) does not answer any more: it ended, was killed, or its host or network is gone",
            rank=rank,
        )
        self._set_error(from_wire(self._watch_store.compare_set("error", "", to_wire(lost, rank).decode())))
        self._stop_known.set()

    def _agree_on_stop(self) -> None:
        """Post the last round started here; once every peer has, all know where to stop. A lost peer never posts."""
        with self._lock:
            started = self._started
        self._watch_store.set(f"stop/{self.rank}", str(started))
        names = [f"stop/{rank}" for rank in self.peers]
        if isinstance(self._error, LostRankError):
            self._stop_known.set()
        elif self._watch_store.check(names):
            self._last = max(int(bytes(value)) for value in self._watch_store.multi_get(names))
            self._stop_known.set()

    def _set_error(self, error: LoaderError) -> None:
        with self._lock:
            self._error = self._error or error
        self._changed.set()

    # The store

    def _put(self, name: str, payload: bytes) -> None:
        self._payloads.append(name)
        self._store.set(name, payload)  # type: ignore[arg-type]  # bytes are what it keeps

    def _wait(self, name: str) -> None:
        pause, longest = POLL
        while True:
            if self._error is not None:
                raise self._error
            try:
                if self._store.check([name]):
                    return
            except (RuntimeError, OSError) as error:
                self._set_error(_store_lost(error))
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _store_lost(error: BaseException) -> LostRankError:
    return LostRankError(
        f"the store that ranks talk through is gone ({type(error).__name__}): its host ended, or the network is down"
    )
