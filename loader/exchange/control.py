"""What ranks agree on: results, errors, and that all came to one place.

Everything here goes through torch.distributed's key-value store, never through a collective: a rank that waits can
always see that another one failed.
"""

from __future__ import annotations

import collections
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # the stubs hide them

from loader.errors import LoaderError, LostRankError
from loader.exchange.watch import BEAT, Watch
from loader.ground.progress import Reached
from loader.ground.recording import Recorder

POLL = (0.001, 0.1)
"""Shortest and longest pause in seconds between looks at a key. (The store's own `wait` cannot be interrupted.)"""
LATE = 1 / 8
"""Of how long a key was waited for, the pause: by that part a rank comes later than it could."""
LOOKS = 50_000
"""A second, of all ranks together: no pause but the longest is shorter than that allows."""
LEAVING = 0.02
"""Seconds between looks at who is about to end, more for over 200 ranks. All are to end at once: when the first one's
torchrun agent is gone, and hosted the rendezvous, the next agent fails for that and tells no cause."""

_loads: collections.defaultdict[str, Iterator[int]] = collections.defaultdict(itertools.count)
"""How many there were, by group."""

_log = logging.getLogger(__name__)


class Control(Watch):
    """One load's agreement among the ranks of `store` (None: this process alone).

    Make it on every rank, in the same order; use it as a context manager. An exception that leaves the context is the
    job's error.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int, group: str = "") -> None:
        """`group` is the name of a process group that is not the default one."""
        # A process alone does not count: the others would, and their next load's keys would not meet.
        base = HashStore() if store is None else PrefixStore(f"loader/{group}/{next(_loads[group])}", store)
        super().__init__(base.clone(), rank, world_size)  # type: ignore[union-attr]  # the stubs lack it
        self.base: Store = base
        """The load's part of the store, through the connection that the trainer has."""
        self.of_all = not group
        """Whether these are all ranks of the default process group, or this process alone."""
        self._phases: collections.Counter[str] = collections.Counter()
        self._payloads: list[str] = []
        self.recorder = Recorder()

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None = None) -> Control:
        """For the ranks of a process group, None: of the default one; for this process alone where there is none."""
        if not dist.is_initialized():
            return cls(None, 0, 1)
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
        name = "" if group is None else group.group_name
        return cls(store, dist.get_rank(group), dist.get_world_size(group), name)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            with suppress(LoaderError):
                self.ask(lambda: [self._store.delete_key(name) for name in self._payloads])
        elif not isinstance(error, SystemExit):
            self.fail(error)
        self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Work that every rank does: ends on all ranks together, or raises the first error on all."""
        with self.recorder.span(name) as span:
            try:
                yield
            except BaseException as error:
                stands = self.fail(error)
                if stands is error or not isinstance(error, Exception):
                    raise
                raise stands from error
            self.agree(name)
        _log.debug("%s: %.2f s", name, span.took)

    def agree(self, name: str) -> None:
        """Wait until every rank came here. Raises the job's error if there is one instead."""
        self.go_on()  # who knows of an error does not agree: so either all ranks go on or none
        self._phases[name] += 1  # a name may be used again: every rank comes as often
        name = f"{name}#{self._phases[name]}"
        if self.ask(lambda: self._store.add(f"{name}/count", 1)) == self.world_size:
            self.ask(lambda: self._store.set(f"{name}/done", "1"))
        self._wait(f"{name}/done")

    def go_on(self) -> None:
        """Raise the job's error if there is one: for work that may take minutes after another rank has failed."""
        if self.error is not None:
            raise self.error

    def leave(self, seconds: float) -> None:
        """Wait until every rank is about to end, at most `seconds`: so that no rank's end hides another's message."""
        lost = isinstance(self._error, LostRankError)
        if lost and self._error is not None:
            seconds = min(seconds, 2 * BEAT)  # by then the others have seen it too; and more than one may be lost
            if self._error.rank is None:
                time.sleep(seconds)  # there is no store to meet at
                return
        until = time.monotonic() + seconds
        staying = self.world_size - lost

        def give_up() -> LoaderError | None:
            return self._error if time.monotonic() > until else None

        with suppress(LoaderError, RuntimeError, OSError):
            left = self._caller.call(lambda: self._store.add("left", 1), give_up)
            while left < staying and time.monotonic() < until:
                time.sleep(max(LEAVING, staying / 10_000))
                left = self._caller.call(lambda: self._store.add("left", 0), give_up)
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(5 * LEAVING)  # it hosts the store, at which the others are still looking

    # Results. They are asked for within a phase: what a rank gave is gone when it has left the context.

    def broadcast(self, name: str, payload: bytes | None, source: int = 0) -> bytes:
        """What rank `source` gives as `payload`, on every rank that asks."""
        if self.rank == source:
            assert payload is not None
            self._put(name, payload)
            return payload
        self._wait(name)
        return self.ask(lambda: bytes(self._store.get(name)))

    def put(self, name: str, payload: bytes) -> None:
        """Leave `payload` for another rank to `take`."""
        self._put(f"{name}/{self.rank}", payload)

    def take(self, name: str, ranks: Sequence[int]) -> list[bytes]:
        """What each of `ranks` has `put` under `name`."""
        names = [f"{name}/{rank}" for rank in ranks]
        for each in names:
            self._wait(each)
        return self.ask(lambda: [bytes(value) for value in self._store.multi_get(names)])

    def scatter(self, name: str, payloads: Sequence[bytes], source: int = 0) -> bytes:
        """Of what rank `source` gives, a payload for each rank, this rank's."""
        if self.rank == source:
            for rank, payload in enumerate(payloads):
                self._put(f"{name}/{rank}", payload)
            return payloads[source]
        return self.take(name, [self.rank])[0]

    # What may change, and may be looked at whenever it is there: also after an error.

    def show(self, name: str, payload: bytes) -> None:
        """Let other ranks see `payload`, in place of what this rank showed before."""
        self._put(f"{name}/{self.rank}", payload)

    def shown(self, name: str, ranks: Sequence[int]) -> list[bytes]:
        """What each of `ranks` shows under `name` now; nothing where it shows nothing yet."""
        names = [f"{name}/{rank}" for rank in ranks]

        def look() -> list[bytes]:
            if self._store.check(names):
                return [bytes(value) for value in self._store.multi_get(names)]
            return [bytes(self._store.get(each)) if self._store.check([each]) else b"" for each in names]

        return self.ask(look)

    def progress(self) -> list[Reached]:
        """How far each rank is, as of the last beats; nothing while one has not beat yet."""
        names = [f"beat/{rank}" for rank in range(self.world_size)]
        beats = self.ask(lambda: self._store.multi_get(names) if self._store.check(names) else [])
        told = (bytes(beat).decode().rsplit(" ", 2) for beat in beats)
        return [Reached(host.rpartition(":")[0], int(done), int(todo)) for host, done, todo in told]

    def _put(self, name: str, payload: bytes) -> None:
        if name not in self._payloads:
            self._payloads.append(name)
        self.ask(lambda: self._store.set(name, payload))  # type: ignore[arg-type]  # bytes are what it keeps

    def _wait(self, name: str) -> None:
        """Return as soon as `name` is there: what all ranks agreed on counts even where an error came just after."""
        shortest, longest = POLL
        shortest = max(shortest, min(longest, self.world_size / LOOKS))
        begun = time.monotonic()
        while not self.ask(lambda: self._store.check([name])):
            if self._error is not None:
                raise self._error
            time.sleep(min(longest, max(shortest, LATE * (time.monotonic() - begun))))
