"""Every rank's demand, without the ranks: what is alike is pulled back once, not for every tensor of every rank."""

from __future__ import annotations

import sys
from collections.abc import Collection, Hashable, Iterable
from typing import NamedTuple

import numpy as np

from loader.convert.conversion import Outputs
from loader.convert.graph import Node, form, seen_in
from loader.place.everywhere import Coordinate, Everywhere, Part
from loader.place.landing import Landings
from loader.place.targets import Target
from loader.plan.catalog import Catalog
from loader.plan.geometry import Box
from loader.plan.needs import Ints, NeedGroup, Needs, needed_once
from loader.stream.demand import Demand, pull_target, sources_of

Slot = tuple[int, int]
"""A kind of targets, by its number, and one of the keys of its form, by its place among them."""


class Rank(NamedTuple):
    """What is known of one rank. `demand` is the number of its demand; `tensors` it holds at least a part of."""

    demand: int
    tensors: int
    shard_bytes: int


class Kind(NamedTuple):
    """Targets that differ in their keys alone: the first, what it is made of, and the keys of each."""

    part: Part
    node: Node
    members: list[tuple[int, ...]]


class Bundle(NamedTuple):
    """Keys (ascending) of one shape that stand in the same slots, and so need the same boxes."""

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    keys: Ints


class Foresight:
    """The demands of all ranks, as `make_demand` would find them on each: `ranks`, and distinct `demands` by number."""

    def __init__(self, catalog: Catalog) -> None:
        self.ranks: dict[int, Rank] = {}
        self.demands: dict[int, Demand] = {}
        self._catalog = catalog
        self._arrays: dict[bytes, Ints] = {}  # equal arrays of keys are one, for the planner too
        self._numbers: dict[Hashable, int] = {}

    def add(self, everywhere: Everywhere, outputs: Outputs, ranks: Iterable[int], wanted: Collection[int]) -> None:
        """Find the demands of `ranks`, which hold what `everywhere` says, made of `outputs`; keys at the positions
        `wanted` must be used.

        Raises CoverageError for what a conversion does not make, or makes in another shape.
        """
        model = _Alike(everywhere, outputs, self._catalog)
        unused = frozenset(wanted) - model.used
        together: dict[tuple[int, ...], Ints] = {}
        for alike in everywhere.alike(ranks):
            groups = []
            for boxes, numbers in model.groups(alike[0]):
                if numbers not in together:
                    keys = np.sort(np.concatenate([model.bundles[number].keys for number in numbers]))
                    together[numbers] = self._arrays.setdefault(keys.tobytes(), keys)
                groups.append(NeedGroup(together[numbers], boxes))
            same = (tuple((id(group.keys), group.boxes) for group in groups), unused)
            number = self._numbers.setdefault(same, len(self._numbers))
            self.demands[number] = Demand(Needs(tuple(groups)), unused)
            self.ranks.update(dict.fromkeys(alike, Rank(number, *model.held(alike[0]))))


class _Share(NamedTuple):
    """A rank's share of a kind: the boxes by slot, how many tensors it holds something of, and their local bytes."""

    boxes: dict[Slot, list[Box]]
    tensors: int
    shard_bytes: int


class _Alike:
    """A model's targets by kind, and the keys that they are made of by slot."""

    def __init__(self, everywhere: Everywhere, outputs: Outputs, catalog: Catalog) -> None:
        self._everywhere = everywhere
        self.used: set[int] = set()
        kinds: dict[Hashable, Kind] = {}
        names = catalog.keys
        for part in everywhere.parts:
            known = sources_of(part.names, part.shape, outputs, names)
            for node in known:
                self.used.update(seen_in(node))
            shape, keys = form(known[0])
            kind = kinds.setdefault((shape, part.dtype, part.grid, part.placements), Kind(part, known[0], []))
            kind.members.append(keys)
        self.kinds = tuple(kinds.values())
        self.bundles = self._bundles([entry.shape for entry in catalog.entries.values()])
        self._bundles_of: dict[Slot, list[int]] = {}
        for number, bundle in enumerate(self.bundles):
            for slot in bundle.slots:
                self._bundles_of.setdefault(slot, []).append(number)
        self._shares: dict[tuple[int, Coordinate | None], _Share] = {}

    def _bundles(self, shapes: list[tuple[int, ...]]) -> list[Bundle]:
        slots: dict[int, dict[Slot, None]] = {}
        for number, kind in enumerate(self.kinds):
            for keys in kind.members:
                for place, key in enumerate(keys):
                    slots.setdefault(key, {})[number, place] = None
        alike: dict[tuple[tuple[int, ...], tuple[Slot, ...]], list[int]] = {}
        for key in sorted(slots):
            alike.setdefault((shapes[key], tuple(slots[key])), []).append(key)
        return [Bundle(*same, np.array(keys, np.int64)) for same, keys in alike.items()]

    def groups(self, rank: int) -> list[tuple[tuple[Box, ...], tuple[int, ...]]]:
        """What `rank` needs: boxes, and the numbers of the bundles whose keys need them; by their first keys."""
        slots = {slot: boxes for share in self._shares_of(rank) for slot, boxes in share.boxes.items()}
        touched = sorted({number for slot in slots for number in self._bundles_of[slot]})
        together: dict[tuple[tuple[int, ...], tuple[Box, ...]], list[int]] = {}
        for number in touched:
            bundle = self.bundles[number]
            boxes = needed_once([box for slot in bundle.slots for box in slots.get(slot, ())])
            together.setdefault((bundle.shape, boxes), []).append(number)
        return [(boxes, tuple(numbers)) for (_, boxes), numbers in together.items()]

    def held(self, rank: int) -> tuple[int, int]:
        """How many tensors `rank` holds something of, and the bytes of its shards."""
        shares = self._shares_of(rank)
        return sum(share.tensors for share in shares), sum(share.shard_bytes for share in shares)

    def _shares_of(self, rank: int) -> list[_Share]:
        found = []
        for number, kind in enumerate(self.kinds):
            at = self._everywhere.coordinate(kind.part, rank)
            if (number, at) not in self._shares:
                self._shares[number, at] = self._share(number, kind, self._everywhere.target(kind.part, at))
            found.append(self._shares[number, at])
        return found

    def _share(self, number: int, kind: Kind, target: Target) -> _Share:
        """Pull back the kind's first target: the others' boxes come from the keys in the same slots."""
        slots = {key: (number, place) for place, key in enumerate(kind.members[0])}
        boxes: dict[Slot, list[Box]] = {}
        for key, box in pull_target(target, kind.node, Landings(sys.maxsize)):
            if box.numel:
                boxes.setdefault(slots[key], []).append(box)
        count, tensor = len(kind.members), target.tensor
        return _Share(boxes, count if target.boxes else 0, count * tensor.numel() * tensor.element_size())
