"""Packing extents into rounds: what is in flight together, within the memory budget of every rank."""

from __future__ import annotations

import numpy as np

from loader.errors import MemoryBudgetError
from loader.plan.extents import Cuts, Kind
from loader.plan.needs import Classes, Ints


def pack_rounds(cuts: Cuts, readers: Ints, turns: Ints, classes: Classes, round_bytes: int) -> Ints:
    """The round of each extent, such that no rank holds more than `round_bytes` for one round.

    A rank holds the extents it reads, what it stages to send of them, and what it receives. A reader takes its extents
    by their `turns`; extents are packed in the order of their reader's progress, so that all ranks read side by side
    from the first round to the last, and a round is closed when the next extent would put any rank over.

    Raises MemoryBudgetError when a single extent does not fit.
    """
    ledger = _Ledger(classes, round_bytes)
    rounds = np.zeros(len(cuts.start), np.int64)
    size, current = cuts.size.tolist(), 0
    costs: dict[tuple[int, int], int] = {}
    for extent in _by_progress(cuts, readers, turns).tolist():
        number, reader = int(cuts.kind[extent]), int(readers[extent])
        kind, home = cuts.kinds[number], ledger.class_of[reader]
        if (number, home) not in costs:
            costs[number, home] = beside_reading(kind, home, alone=bool(ledger.sizes[home] == 1))
        if not ledger.add(reader, size[extent] + costs[number, home], kind):
            current += 1
            ledger.clear()
            if not ledger.add(reader, size[extent] + costs[number, home], kind):
                raise MemoryBudgetError(
                    f"a read of {size[extent]} bytes, with {int(kind.staged.sum())} packed to send, does not fit a "
                    f"round of {round_bytes} bytes on rank {reader}: raise read.memory_budget or lower read.range_size"
                )
        rounds[extent] = current
    return rounds


def beside_reading(kind: Kind, home: int, *, alone: bool) -> int:
    """What an extent costs a reader of class `home` beyond its bytes, by the ledger's reckoning: what it packs to send,
    less what lands at its class, for that it has read. `alone`: a message that only it would need is not sent."""
    at = int(np.searchsorted(kind.classes, home))
    unsent = alone and np.count_nonzero(kind.message == kind.message[at]) == 1
    return int(kind.staged.sum() - kind.landing[at] - (kind.staged[kind.message[at]] if unsent else 0))


def _by_progress(cuts: Cuts, readers: Ints, turns: Ints) -> Ints:
    """Extents ordered by how far their reader is when it comes to them: 0.0 for its first, towards 1.0 for its last."""
    progress = np.zeros(len(cuts.start))
    for rank in np.unique(readers):
        mine = np.flatnonzero(readers == rank)
        mine = mine[np.argsort(turns[mine], kind="stable")]
        done = np.cumsum(cuts.size[mine])
        progress[mine] = (done - cuts.size[mine]) / done[-1]
    return np.argsort(progress, kind="stable")


class _Ledger:
    """Bytes that the open round costs: to a rank what it reads and packs, to each of a class what lands there."""

    def __init__(self, classes: Classes, limit: int) -> None:
        self.limit = limit
        self.class_of = dict(zip(classes.ranks.tolist(), classes.class_of.tolist(), strict=True))
        self.sizes = np.bincount(classes.class_of, minlength=len(classes.needs))
        self.clear()

    def clear(self) -> None:
        self.own: dict[int, int] = {}
        self.own_most = np.zeros(len(self.sizes), np.int64)
        self.landing = np.zeros(len(self.sizes), np.int64)

    def add(self, reader: int, own: int, kind: Kind) -> bool:
        """Enter one extent, or leave all as it is and say False where some rank would be over the limit.

        `reader` is one of its consumers; `own` is its cost to the reader above what lands at all of them.
        """
        home = self.class_of[reader]
        total = self.own.get(reader, 0) + own
        most = max(int(self.own_most[home]), total)
        landing = self.landing[kind.classes] + kind.landing
        worst = int((self.own_most[kind.classes] + landing).max())
        at_home = int(self.landing[home] + kind.landing[np.searchsorted(kind.classes, home)])
        if max(worst, most + at_home) > self.limit:
            return False
        self.landing[kind.classes] = landing
        self.own[reader] = total
        self.own_most[home] = most
        return True
