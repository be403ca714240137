"""Ranks of one node take what another has read from where it stands in its memory: it is copied once, into the shard.

The buffers of such a rank are memory files, which the others open under its `/proc/<pid>/fd`, and map for as long as
they copy. Who has read tells the others where, and each of them tells it when it has taken its part: records of fixed
size, written to each other's pipes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import select
import struct
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack, suppress
from typing import NamedTuple, Self

import torch
from torch import Tensor

from loader.errors import LoaderError
from loader.exchange.control import Control
from loader.exchange.shared import Place, SharedMemory, file_of, files_are_limited, mapped
from loader.exchange.transport import lost

LOOK = 0.2
"""Seconds between looks at the job's error while waiting for another rank."""
PAUSE = 0.001
"""Seconds between tries at an inbox that is full: of over a thousand records that its rank had no time for."""

_OFFER, _TAKEN, _END = range(3)
_RECORD = struct.Struct("=7q")
"""What it is, from which rank, the extent's number, and where it stands: 56 bytes, which a pipe keeps together."""
_RECORDS = 1024
"""How many are read at once."""

_NOWHERE = Place(0, 0, 0, 0)
_TOKEN = 16
"""Bytes at random by which a rank knows that it has opened another's memory, and not a file of the same number."""

_log = logging.getLogger(__name__)


class Taking(NamedTuple):
    """An extent of which `ranks` are to take their parts."""

    neighbours: Neighbours
    number: int
    ranks: Collection[int]

    def wait(self) -> None:
        """Wait until they have. Raises the job's error, and LostRankError where one of them is gone."""
        for rank in self.ranks:
            self.neighbours.wait_for(_TAKEN, self.number, rank)


class Neighbours:
    """The other `ranks` of this node, as far as memory can be shared with all of them."""

    def __init__(self, control: Control, ranks: Iterable[int]) -> None:
        """`ranks` are all of the node's, this one among them."""
        self.ranks = frozenset(ranks) - {control.rank}
        self._control = control
        self._pids: dict[int, int] = {}
        self._inboxes: dict[int, int] = {}
        self._lives: dict[int, int] = {}
        self._gone: list[int] = []
        self._closed = False
        self._told: dict[tuple[int, int, int], Future[Place]] = {}
        self._lock = threading.Lock()
        self._memories: list[SharedMemory] = []
        self._open = ExitStack()
        self._inbox, self._own = os.pipe()
        for file in (self._inbox, self._own):
            self._open.callback(os.close, file)
        self._thread = threading.Thread(target=self._receive, name="loader-inbox", daemon=True)

    @classmethod
    def meet(cls, control: Control, ranks: Sequence[int], *, willing: bool) -> Self | None:
        """Those `ranks` (all of the node's, ascending) with each other; None, on all of them, where the system does
        not let one look into another's memory, or where one is not `willing`. Collective, within a phase."""
        if len(ranks) < 2:
            return None
        with ExitStack() as unless_met:
            made = cls(control, ranks)
            unless_met.callback(made.close)
            control.put("neighbour", made.introduce() if willing and sys.platform == "linux" else b"")
            told = dict(zip(ranks, control.take("neighbour", ranks), strict=True))
            control.put("has met its neighbours", b"1" if all(told.values()) and made.reach(told) else b"")
            if all(control.take("has met its neighbours", ranks)):
                made.free()
                made.start()
                unless_met.pop_all()
                return made
        _log.debug("the ranks of this node cannot share memory, and send each other messages")
        return None

    def introduce(self) -> bytes:
        """What the others need, to find this rank's memory and its inbox; nothing where it cannot be shared."""
        try:
            trial = self.allocate(0 if files_are_limited() else _TOKEN)
        except (OSError, AttributeError):  # refused, or unknown to the system that Python was built on
            return b""
        if trial.file is None:
            return b""
        token = secrets.token_bytes(_TOKEN)
        trial.host.copy_(torch.frombuffer(bytearray(token), dtype=torch.uint8))
        return json.dumps([os.getpid(), self._own, trial.place(trial.host), token.hex()]).encode()

    def reach(self, introduced: dict[int, bytes]) -> bool:
        """Whether this rank can open the others' memory and inboxes; where it can, they are."""
        try:
            for rank in self.ranks:
                pid, inbox, trial, token = json.loads(introduced[rank])
                self._pids[rank] = pid
                if bytes(mapped(pid, Place(*trial)).numpy().data).hex() != token:
                    return False
                self._inboxes[rank] = os.open(file_of(pid, inbox), os.O_WRONLY | os.O_NONBLOCK)
                self._open.callback(os.close, self._inboxes[rank])
                self._lives[rank] = os.pidfd_open(pid)
                self._open.callback(os.close, self._lives[rank])
        except (OSError, ValueError, AttributeError) as error:
            _log.debug("rank %d's memory cannot be opened: %s", rank, error)
            return False
        return True

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Nothing is told any more: threads that an error has left behind may try."""
        if self._thread.is_alive():
            os.write(self._own, _RECORD.pack(_END, 0, 0, *_NOWHERE))
            self._thread.join()
        with self._lock:
            self._closed = True
            self._inboxes.clear()
            self.free()
            self._open.close()

    def free(self) -> None:
        """Give back all memory of this rank."""
        for memory in self._memories:
            memory.free()

    def allocate(self, size: int) -> SharedMemory:
        """Memory of which a part can be offered. Raises OSError."""
        with self._lock:
            if self._closed and size:
                raise BrokenPipeError(errno.EPIPE, "the ranks of this node have parted")
            memory = SharedMemory(size)
            self._memories = [each for each in self._memories if each.file is not None] + [memory]
            return memory

    def offer(self, number: int, memory: Tensor, ranks: Collection[int]) -> Taking:
        """Let `ranks` take parts of extent `number`, which stands in `memory`: until they have, it must stay as it
        is. A rank that cannot be told any more, or the job's error, is for `wait` to tell: messages go on until then.
        """
        place = next(filter(None, (each.place(memory) for each in self._memories)), _NOWHERE)
        assert place != _NOWHERE or self._closed, "what is offered stands in shared memory"
        with suppress(LoaderError):
            for rank in ranks:
                self._tell(rank, _OFFER, number, place)
        return Taking(self, number, ranks)

    def look(self, number: int, sender: int) -> Tensor:
        """Extent `number` in the memory of rank `sender`, once it has been read: to be copied from before `took`.

        Raises the job's error, LostRankError, and OSError where there is no room to map it.
        """
        place = self.wait_for(_OFFER, number, sender)
        try:
            return mapped(self._pids[sender], place)
        except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
            raise lost(sender, str(error)) from error

    def took(self, number: int, sender: int) -> None:
        """This rank has what it needs of the extent. Raises LostRankError."""
        self._tell(sender, _TAKEN, number, _NOWHERE)

    def wait_for(self, kind: int, number: int, rank: int) -> Place:
        """What `rank` tells of extent `number`, once. Raises the job's error, and LostRankError."""
        told = self._future(kind, number, rank)
        while True:
            self._control.go_on()  # first: many may come here one after the other, each in vain
            try:
                return told.result(LOOK)
            except NotYet:
                if self._gone:  # whoever waits for the one may be waited for by the other
                    self._control.go_on()
                    raise lost(self._gone[0], "the process has ended") from None

    def _future(self, kind: int, number: int, rank: int) -> Future[Place]:
        """Of two who ask for it, one tells and one is told: with the second it is forgotten."""
        with self._lock:
            found = self._told.pop((kind, number, rank), None)
            return found or self._told.setdefault((kind, number, rank), Future())

    def _tell(self, rank: int, kind: int, number: int, place: Place) -> None:
        record = _RECORD.pack(kind, self._control.rank, number, *place)
        while not self._put(rank, record):
            self._control.go_on()
            time.sleep(PAUSE)

    def _put(self, rank: int, record: bytes) -> bool:
        """Whether there was room in that rank's inbox."""
        with self._lock:
            try:
                return os.write(self._inboxes[rank], record) > 0
            except BlockingIOError:
                return False
            except KeyError:
                raise lost(rank, "the ranks of this node have parted") from None
            except OSError as error:
                raise lost(rank, str(error)) from error

    def _receive(self) -> None:
        try:
            self._listen()
        except BaseException as error:  # noqa: BLE001 - told to all ranks
            self._control.fail(error)

    def _listen(self) -> None:
        """What the others tell, until `close`."""
        poll, ranks = select.poll(), {file: rank for rank, file in self._lives.items()}
        for file in (self._inbox, *ranks):
            poll.register(file, select.POLLIN)
        while True:
            for file, _ in poll.poll():
                if file != self._inbox:
                    self._gone.append(ranks[file])
                    poll.unregister(file)
                elif not self._take_in(os.read(self._inbox, _RECORDS * _RECORD.size)):
                    return

    def _take_in(self, data: bytes) -> bool:
        for kind, rank, number, *place in _RECORD.iter_unpack(data):
            if kind == _END:
                return False
            self._future(kind, number, rank).set_result(Place(*place))
        return True
