"""Packing extents into rounds: what is in flight together, within the memory budget of every rank."""

from __future__ import annotations

import numpy as np

from loader.errors import MemoryBudgetError
from loader.plan.extents import Cuts
from loader.plan.needs import Classes, Ints


def pack_rounds(cuts: Cuts, readers: Ints, classes: Classes, round_bytes: int) -> Ints:
    """The round of each extent, such that no rank holds more than `round_bytes` for one round.

    A rank holds the extents it reads, what it stages to send of them, and what it receives. Extents are taken in the
    order of their reader's progress, so that all ranks read side by side from the first round to the last, and a round
    is closed when the next extent would put any rank over.

    Raises MemoryBudgetError when a single extent does not fit.
    """
    ledger = _Ledger(classes, round_bytes)
    rounds = np.zeros(len(cuts.start), np.int64)
    size, current = cuts.size.tolist(), 0
    for extent in _by_progress(cuts, readers).tolist():
        kind, reader = cuts.kinds[cuts.kind[extent]], int(readers[extent])
        alone = ledger.sizes[kind.classes] == 1
        receives = ~(alone & (kind.classes == ledger.class_of[reader]))
        own = size[extent] + int(kind.staged[receives].sum())
        if not ledger.add(reader, own, kind.classes[receives], kind.landing[receives]):
            current += 1
            ledger.clear()
            if not ledger.add(reader, own, kind.classes[receives], kind.landing[receives]):
                raise MemoryBudgetError(
                    f"a read of {size[extent]} bytes needs {own} bytes on rank {reader} and up to "
                    f"{int(kind.landing.max())} on its consumers, more than a round's {round_bytes}: "
                    "raise read.memory_budget or lower read.range_size"
                )
        rounds[extent] = current
    return rounds


def _by_progress(cuts: Cuts, readers: Ints) -> Ints:
    """Extents ordered by how far their reader is when it comes to them: 0.0 for its first, towards 1.0 for its last."""
    progress = np.zeros(len(cuts.start))
    for rank in np.unique(readers):
        mine = np.flatnonzero(readers == rank)
        done = np.cumsum(cuts.size[mine])
        progress[mine] = (done - cuts.size[mine]) / done[-1]
    return np.argsort(progress, kind="stable")


class _Ledger:
    """Bytes that the open round costs: by rank for what it reads and stages, by class for what its members receive."""

    def __init__(self, classes: Classes, limit: int) -> None:
        self.limit = limit
        self.class_of = dict(zip(classes.ranks.tolist(), classes.class_of.tolist(), strict=True))
        self.sizes = np.bincount(classes.class_of, minlength=len(classes.needs))
        self.clear()

    def clear(self) -> None:
        self.own: dict[int, int] = {}
        self.own_most = np.zeros(len(self.sizes), np.int64)
        self.landing = np.zeros(len(self.sizes), np.int64)

    def add(self, reader: int, own: int, consumers: Ints, landing: Ints) -> bool:
        """Enter one extent, or leave all as it is and say False where some rank would be over the limit."""
        home = self.class_of[reader]
        total = self.own.get(reader, 0) + own
        most = max(int(self.own_most[home]), total)
        self.landing[consumers] += landing
        worst = int((self.own_most[consumers] + self.landing[consumers]).max()) if len(consumers) else 0
        if max(worst, most + int(self.landing[home])) > self.limit:
            self.landing[consumers] -= landing
            return False
        self.own[reader] = total
        self.own_most[home] = most
        return True
