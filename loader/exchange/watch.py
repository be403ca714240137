"""The watch over a job: its first error, its lost ranks, and the round to stop with.

A thread of every rank beats for it in torch.distributed's key-value store, watches the next rank's beat, and learns of
errors while other threads are busy.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]  # the stubs hide it

from loader.errors import LoaderError, LostRankError, from_wire, to_wire
from loader.exchange.node import node_name
from loader.ground.caller import Caller
from loader.ground.pause import Pause

T = TypeVar("T")

BEAT = 0.5
LOST_AFTER = 6.0
"""Seconds between beats, and without one until a rank counts as lost: all ranks must end within 10 s of a loss."""

SILENT_AFTER = 7.0
"""Seconds without an answer until the store counts as gone, about when a lost rank is missed. It may stall for less: it
looks up the name of each host that connects to it, and where a name server does not answer that takes five."""

UNSEEN_FOR = 300.0
"""Seconds until a rank that never beat counts as lost. It may still be on its way here: torch's stores wait as long."""

SETTLE = 4.0
"""Seconds that a rank with an error stays for the others to learn of it."""

GONE = "gone"
"""What stands for the last round of a lost rank."""


class Watch:
    """One rank's watch. `peers` are the ranks that it exchanges with; with its beats it tells how many bytes it has
    read, of how many, which is `todo_bytes`, and its `pause` to the ranks of its node, and theirs to it."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.peers: Sequence[int] = range(world_size)
        self.done_bytes = self.todo_bytes = 0
        self.pause = Pause()
        self._store = store
        self._own_store: Store = store.clone()  # type: ignore[attr-defined]  # a connection of the watch thread's own
        self._caller = Caller("loader-store")
        self._thread = threading.Thread(target=self._watch, name="loader-watch", daemon=True)
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._answered = time.monotonic()
        self._error: LoaderError | None = None
        self._started = -1
        self._last: int | None = None
        self._stop_known = threading.Event()

    def open(self) -> None:
        self._answered = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """End the watch. After an error that is when all know of it: who stops beating before would pass for lost."""
        if self._error is not None:
            self._stop_known.wait(SETTLE)
        self._closed.set()
        self._changed.set()
        self._thread.join(timeout=2 * BEAT)
        self._caller.close()

    def has_read(self, size: int) -> None:
        """So many bytes more have arrived, on any thread: to be told with the beats."""
        with self._lock:
            self.done_bytes += size

    # Errors

    def fail(self, error: BaseException) -> LoaderError:
        """Make `error` the job's, unless another came first; the one that stands is returned."""
        if error is self._error:
            return self._error
        mine = to_wire(error, self.rank).decode()
        try:
            first = self.ask(lambda: bytes(self._store.compare_set("error", "", mine)))
        except LoaderError as stands:
            return stands
        found = from_wire(first)
        if first.decode() == mine and isinstance(error, LoaderError):
            error.rank, found = found.rank, error  # with its cause
            with self._lock:
                self._error = error  # the watch may have read it back already, without
        return self._set_error(found)

    @property
    def error(self) -> LoaderError | None:
        """The job's error, as soon as this rank knows of one."""
        if self._error is None and self._silent():
            self._set_error(_store_lost("it does not answer"))
        return self._error

    def ask(self, work: Callable[[], T]) -> T:
        """Call the store. Where it is gone or silent, that is the job's error, unless there is one; it is raised."""
        try:
            return self._caller.call(work, lambda: self.error if self._silent() else None)
        except (RuntimeError, OSError) as error:
            raise self._set_error(_store_lost(type(error).__name__)) from error

    # Rounds

    def may_start(self, number: int) -> bool:
        """Whether round `number` is to be started. After an error, every peer ends with the same round.

        A rank that failed cannot simply stop: others wait for what it was to send. So each tells the last round that
        it started, and all go on, with empty payloads, to the latest of these.
        """
        if self.error is None:
            with self._lock:
                if self._error is None:
                    self._started = number
                    return True
        while not self._stop_known.wait(BEAT):
            if self._silent() or self._closed.is_set():
                return False
        return self._last is not None and number <= self._last

    # The thread

    def _watch(self) -> None:
        try:
            node, watched, seen, since = node_name(), (self.rank + 1) % self.world_size, b"", time.monotonic()
            for count in itertools.count():
                begun = time.monotonic()
                beat = f"{socket.gethostname()}:{count} {self.done_bytes} {self.todo_bytes}"
                self._own_store.set(f"beat/{self.rank}", beat)
                if self._error is None and self._own_store.check(["error"]):
                    self._set_error(from_wire(self._own_store.get("error")))
                if self._error is not None and not self._stop_known.is_set():
                    self._agree_on_stop()
                self._share_pause(f"pause/{node}")
                found = self._read_beat(watched)
                if found != seen:
                    seen, since = found, time.monotonic()
                elif watched != self.rank and time.monotonic() - since > (LOST_AFTER if seen else UNSEEN_FOR):
                    self._lose(watched, seen)
                    watched, seen, since = (watched + 1) % self.world_size, b"", time.monotonic()
                self._answered = time.monotonic()
                since += self._answered - begun  # while the store stalled, nobody's beat could be seen
                self._changed.wait(BEAT)
                self._changed.clear()
                if self._closed.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - without this thread the rank would learn of nothing
            if not self._closed.is_set():
                gone = isinstance(error, RuntimeError | OSError)
                self._set_error(_store_lost(type(error).__name__) if gone else self.fail(error))
                self._stop_known.set()

    def _share_pause(self, name: str) -> None:
        """Make the node's pause this rank's, and the other way round, whichever is longer."""
        known = float(self._own_store.get(name)) if self._own_store.check([name]) else 0.0
        self.pause.extend(known)
        if self.pause.until > known:
            self._own_store.set(name, repr(self.pause.until))

    def _read_beat(self, rank: int) -> bytes:
        name = f"beat/{rank}"
        return bytes(self._own_store.get(name)) if self._own_store.check([name]) else b""

    def _lose(self, rank: int, beat: bytes) -> None:
        lost = LostRankError(
            f"rank {rank} (host {beat.decode().rpartition(':')[0]}) does not answer any more: "
            f"it ended, was killed, could not run for {LOST_AFTER:.0f} s, or its host or network is gone. Its own log, "
            "or its host's, may tell; then start again"
            if beat
            else f"rank {rank} did not come to the load within {UNSEEN_FOR:.0f} s: it ended, or is busy elsewhere",
            rank=rank,
        )
        self._set_error(from_wire(self._own_store.compare_set("error", "", to_wire(lost, rank).decode())))
        self._own_store.set(f"stop/{rank}", GONE)

    def _agree_on_stop(self) -> None:
        """Post the last round started here; once every peer has, all know where to stop. For a lost one its watcher
        posts."""
        with self._lock:
            started = self._started
        self._own_store.set(f"stop/{self.rank}", str(started))
        names = [f"stop/{rank}" for rank in self.peers]
        if self._own_store.check(names):
            stops = [bytes(value).decode() for value in self._own_store.multi_get(names)]
            self._last = None if GONE in stops else max(map(int, stops))
            self._stop_known.set()

    def _silent(self) -> bool:
        """Whether the store has not answered the thread for long: a host that is gone says no good-bye."""
        return self._thread.is_alive() and time.monotonic() - self._answered > SILENT_AFTER

    def _set_error(self, error: LoaderError) -> LoaderError:
        """Keep the first error; return it."""
        with self._lock:
            self._error = stands = self._error or error
        if isinstance(stands, LostRankError):
            self._stop_known.set()
        self._changed.set()
        return stands


def _store_lost(how: str) -> LostRankError:
    return LostRankError(
        f"the store that ranks talk through is gone ({how}): the host of it ended, or the network is down"
    )
