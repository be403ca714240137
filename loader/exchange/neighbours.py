"""Ranks of one node take what another has read from where it stands in its memory: it is copied once, into the shard.

The buffers of such a rank are memory files, which the others open under its `/proc/<pid>/fd`, and map for as long as
they copy. Who has read tells the others where, and each of them tells it when it has taken its part (see `inbox`).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, Self

import torch
from torch import Tensor

from loader.errors import LoaderError
from loader.exchange.control import Control
from loader.exchange.inbox import NOWHERE, Inbox
from loader.exchange.shared import Place, SharedMemory, files_are_limited, mapped
from loader.exchange.transport import lost

_TOKEN = 16
"""Bytes at random by which a rank knows that it has opened another's memory, and not a file of the same number."""

_log = logging.getLogger(__name__)


class Taking(NamedTuple):
    """An extent of which `ranks` are to take their parts."""

    inbox: Inbox
    extent: int
    ranks: Collection[int]

    def wait(self) -> None:
        """Wait until they have. Raises the job's error, and LostRankError where one of them is gone."""
        for rank in self.ranks:
            self.inbox.wait_for(rank, "taken", self.extent)


class Neighbours:
    """The other `ranks` of this node, as far as memory can be shared with all of them."""

    def __init__(self, control: Control, ranks: Iterable[int]) -> None:
        """`ranks` are all of the node's, this one among them."""
        self.ranks = frozenset(ranks) - {control.rank}
        self._inbox = Inbox(control)
        self._pids: dict[int, int] = {}
        self._memories: list[SharedMemory] = []
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def meet(cls, control: Control, ranks: Sequence[int], *, willing: bool) -> Self | None:
        """Those `ranks` (all of the node's, ascending) with each other; None, on all of them, where the system does
        not let one look into another's memory, or where one is not `willing`. Collective, within a phase."""
        if len(ranks) < 2:
            return None
        with ExitStack() as unless_met:
            made = cls(control, ranks)
            unless_met.callback(made.close)
            control.put("neighbour", made._introduced() if willing and sys.platform == "linux" else b"")
            told = dict(zip(ranks, control.take("neighbour", ranks), strict=True))
            control.put("has met its neighbours", b"1" if all(told.values()) and made._reaches(told) else b"")
            if all(control.take("has met its neighbours", ranks)):
                made._free()
                made._inbox.start()
                unless_met.pop_all()
                return made
        _log.debug("the ranks of this node cannot share memory, and send each other messages")
        return None

    def close(self) -> None:
        """Nothing is offered any more, and all memory of this rank is given back."""
        self._inbox.close()
        with self._lock:
            self._closed = True
            self._free()

    def allocate(self, size: int) -> SharedMemory:
        """Memory of which a part can be offered. Raises OSError."""
        with self._lock:
            if self._closed and size:
                raise BrokenPipeError(errno.EPIPE, "the ranks of this node have parted")
            memory = SharedMemory(size)
            self._memories = [each for each in self._memories if each.file is not None] + [memory]
            return memory

    def offer(self, extent: int, memory: Tensor, ranks: Collection[int]) -> Taking:
        """Let `ranks` take parts of an extent, which stands in `memory`: until they have, it must stay as it is. A
        rank that cannot be told any more, or the job's error, is for `wait` to tell: messages go on until then.
        """
        place = next(filter(None, (each.place(memory) for each in self._memories)), NOWHERE)
        assert place != NOWHERE or self._closed, "what is offered stands in shared memory"
        with suppress(LoaderError):
            for rank in ranks:
                self._inbox.tell(rank, "offer", extent, place)
        return Taking(self._inbox, extent, ranks)

    def look(self, extent: int, sender: int) -> Tensor:
        """An extent in the memory of rank `sender`, once it has been read: to be copied from before `took`.

        Raises the job's error, LostRankError, and OSError where there is no room to map it.
        """
        place = self._inbox.wait_for(sender, "offer", extent)
        try:
            return mapped(self._pids[sender], place)
        except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
            raise lost(sender, str(error)) from error

    def took(self, extent: int, sender: int) -> None:
        """This rank has what it needs of the extent. Raises the job's error, and LostRankError."""
        self._inbox.tell(sender, "taken", extent)

    def _introduced(self) -> bytes:
        """What the others need, to find this rank's memory and its inbox; nothing where it cannot be shared."""
        try:
            trial = self.allocate(0 if files_are_limited() else _TOKEN)
        except (OSError, AttributeError):  # refused, or unknown to the system that Python was built on
            return b""
        if trial.file is None:
            return b""
        token = secrets.token_bytes(_TOKEN)
        trial.host.copy_(torch.frombuffer(bytearray(token), dtype=torch.uint8))
        return json.dumps([os.getpid(), self._inbox.number, trial.place(trial.host), token.hex()]).encode()

    def _reaches(self, introduced: dict[int, bytes]) -> bool:
        """Whether this rank can open the others' memory and inboxes; where it can, the inboxes are."""
        try:
            for rank in self.ranks:
                pid, inbox, trial, token = json.loads(introduced[rank])
                self._pids[rank] = pid
                if bytes(mapped(pid, Place(*trial)).numpy().data).hex() != token:
                    return False
                self._inbox.reach(rank, pid, inbox)
        except (OSError, ValueError, AttributeError) as error:
            _log.debug("rank %d's memory cannot be opened: %s", rank, error)
            return False
        return True

    def _free(self) -> None:
        for memory in self._memories:
            memory.free()
