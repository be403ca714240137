"""What the ranks of a node tell each other: records of fixed size, through pipes; and that one of them has ended.

A rank opens the pipes of the others under their `/proc/<pid>/fd`, and a file that can be read from when they end.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack
from typing import Literal

from loader.exchange.control import Control
from loader.exchange.shared import Place, file_of
from loader.exchange.transport import lost
from loader.ground.caller import LOOK

PAUSE = 0.001
"""Seconds between tries at an inbox that is full: of over a thousand records that its rank had no time for."""

Kind = Literal["offer", "taken"]

_KINDS: tuple[Kind, ...] = ("offer", "taken")
_END = len(_KINDS)
_RECORD = struct.Struct("=7q")
"""Of which kind it is, from which rank, the extent's number, and where it stands: 56 bytes, which a pipe keeps
together."""
_RECORDS = 1024
"""How many are read at once."""

NOWHERE = Place(0, 0, 0, 0)


class Inbox:
    """What this rank is told, and the inboxes of those whom it tells. They write to its file `number`."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._others: dict[int, int] = {}
        self._lives: dict[int, int] = {}
        self._gone: list[int] = []
        self._told: dict[tuple[Kind, int, int], Future[Place]] = {}
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._file, self.number = os.pipe()
        for file in (self._file, self.number):
            self._open.callback(os.close, file)
        self._thread = threading.Thread(target=self._receive, name="loader-inbox", daemon=True)

    def reach(self, rank: int, pid: int, number: int) -> None:
        """Open the inbox of a rank, which is process `pid`, and has it under this number. Raises OSError, and
        AttributeError where Python was built for a system that does not know such files."""
        self._others[rank] = os.open(file_of(pid, number), os.O_WRONLY | os.O_NONBLOCK)
        self._open.callback(os.close, self._others[rank])
        self._lives[rank] = os.pidfd_open(pid)
        self._open.callback(os.close, self._lives[rank])

    def start(self) -> None:
        """From now on it is looked into."""
        self._thread.start()

    def close(self) -> None:
        """Nothing is told any more: threads that an error has left behind may try."""
        if self._thread.is_alive():
            os.write(self.number, _RECORD.pack(_END, 0, 0, *NOWHERE))
            self._thread.join()
        with self._lock:
            self._others.clear()
            self._open.close()

    def tell(self, rank: int, kind: Kind, extent: int, place: Place = NOWHERE) -> None:
        """Raises the job's error, and LostRankError."""
        record = _RECORD.pack(_KINDS.index(kind), self._control.rank, extent, *place)
        while not self._put(rank, record):
            self._control.go_on()
            time.sleep(PAUSE)

    def wait_for(self, rank: int, kind: Kind, extent: int) -> Place:
        """What `rank` tells of an extent, once. Raises the job's error, and LostRankError."""
        told = self._future(kind, extent, rank)
        while True:
            self._control.go_on()  # first: many may come here one after the other, each in vain
            try:
                return told.result(LOOK)
            except NotYet:
                if self._gone:  # whoever waits for the one may be waited for by the other
                    self._control.go_on()
                    raise lost(self._gone[0], "the process has ended") from None

    def _future(self, kind: Kind, extent: int, rank: int) -> Future[Place]:
        """Of two who ask for it, one tells and one is told: with the second it is forgotten."""
        with self._lock:
            found = self._told.pop((kind, extent, rank), None)
            return found or self._told.setdefault((kind, extent, rank), Future())

    def _put(self, rank: int, record: bytes) -> bool:
        """Whether there was room in that rank's inbox."""
        with self._lock:
            try:
                return os.write(self._others[rank], record) > 0
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
        for file in (self._file, *ranks):
            poll.register(file, select.POLLIN)
        while True:
            for file, _ in poll.poll():
                if file != self._file:
                    self._gone.append(ranks[file])
                    poll.unregister(file)
                elif not self._take_in(os.read(self._file, _RECORDS * _RECORD.size)):
                    return

    def _take_in(self, data: bytes) -> bool:
        for kind, rank, extent, *place in _RECORD.iter_unpack(data):
            if kind == _END:
                return False
            self._future(_KINDS[kind], extent, rank).set_result(Place(*place))
        return True
