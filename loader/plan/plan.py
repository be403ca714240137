"""The plan: who reads which extent in which round. A pure function of catalog, needs and limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from loader.plan.catalog import Entry
from loader.plan.extents import Cuts, Limits, cut_extents
from loader.plan.needs import Classes, Ints
from loader.plan.readers import assign_readers
from loader.plan.rounds import pack_rounds
from loader.plan.turns import take_turns

Bytes = npt.NDArray[np.uint8]
Share = Literal["world", "node", "none"]
"""How far a byte that was read is shared before it is read again."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Extents in file order, as columns: bytes `[start, stop)` of `file`, read by rank `reader` in `round`.

    With `classes` this is all that a rank needs to know: what it reads, to whom it sends and from whom it receives
    follow from it (see `schedule`).
    """

    classes: Classes
    file: Ints
    start: Ints
    stop: Ints
    reader: Ints
    round: Ints
    needed_bytes: int

    @property
    def rounds(self) -> int:
        return int(self.round.max()) + 1 if len(self.round) else 0

    @property
    def read_bytes(self) -> int:
        return int((self.stop - self.start).sum())

    def __reduce__(self) -> tuple[Callable[..., Plan], tuple[Classes, Bytes, int]]:
        """What other ranks are sent compresses to less than half so: an extent begins, as a rule, where the one before
        it ends, most have one size, and of a number's 8 bytes most are zeros, which stand together."""
        size = self.stop - self.start
        gap = np.diff(self.stop, prepend=0) - size
        columns = np.stack([self.file, gap, size, self.reader, self.round])
        planes = np.ascontiguousarray(columns[..., None].view(np.uint8).transpose(0, 2, 1))
        return _arrived, (self.classes, planes, self.needed_bytes)


def _arrived(classes: Classes, planes: Bytes, needed_bytes: int) -> Plan:
    file, gap, size, reader, turn = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(np.int64)[..., 0]
    stop = np.cumsum(gap + size)
    return Plan(classes, file, stop - size, stop, reader, turn, needed_bytes)


def make_plan(
    entries: Sequence[Entry], classes: Classes, limits: Limits, partners: Sequence[Collection[int]] = ()
) -> Plan:
    """Plan one sharing domain: the ranks in `classes` read each needed byte once between them.

    `entries` are the catalog's, in its order; `partners` are groups of keys (positions) whose elements are combined.
    Raises MemoryBudgetError.
    """
    return plan_with_cuts(entries, classes, limits, partners)[0]


def plan_with_cuts(
    entries: Sequence[Entry], classes: Classes, limits: Limits, partners: Sequence[Collection[int]]
) -> tuple[Plan, Cuts]:
    """As `make_plan`; and the extents with what each rank needs of them, which a plan does not carry."""
    cuts = cut_extents(entries, classes, limits.range_bytes, limits.round_bytes)
    readers = assign_readers(cuts, classes)
    rounds = pack_rounds(cuts, readers, take_turns(entries, cuts, partners), classes, limits.round_bytes)
    return Plan(classes, cuts.file, cuts.start, cuts.stop, readers, rounds, cuts.needed_bytes), cuts


def sharing_domains(nodes: Sequence[str], share: Share) -> list[list[int]]:
    """The ranks that share what is read, ascending, and the domains by their first ranks. `nodes` are the ranks'."""
    domains: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        domains.setdefault({"world": "", "node": node, "none": str(rank)}[share], []).append(rank)
    return list(domains.values())
