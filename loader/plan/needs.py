"""What a rank must receive: boxes of keys, grouped by pattern so that 90,000 keys stay a few kilobytes.

Ranks with equal needs are one *class*: they are planned once, whatever their meshes say.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary, finalize

import numpy as np
import numpy.typing as npt

from loader.plan.geometry import Box, disjoint

Ints = npt.NDArray[np.int64]
Steps = npt.NDArray[np.unsignedinteger[Any]]
Shape = tuple[int, ...]
D = TypeVar("D", bound=Hashable)


@dataclass(frozen=True, slots=True)
class NeedGroup:
    """Keys of one shape that need the same boxes. `keys` are positions in the catalog, ascending.

    Thousands of ranks need the same keys in other boxes: groups that arrive from other ranks share their arrays. What
    is sent are the steps between keys, of a byte or two each.
    """

    keys: Ints
    boxes: tuple[Box, ...]

    def __reduce__(self) -> tuple[Callable[..., NeedGroup], tuple[Steps, tuple[Box, ...]]]:
        return _arrived, (_steps_of(self.keys), self.boxes)


_known_steps: dict[int, Steps] = {}
"""Of the arrays of keys that have been sent, by their ids: what groups share is sent once only as one object."""
_known_keys: WeakValueDictionary[tuple[str, bytes], Ints] = WeakValueDictionary()


def _steps_of(keys: Ints) -> Steps:
    """From key to key, the first from 0: 3, 1, 250 for keys 3, 4 and 254."""
    if id(keys) not in _known_steps:
        steps = np.diff(keys, prepend=0)
        _known_steps[id(keys)] = steps.astype(np.min_scalar_type(steps.max()))
        finalize(keys, _known_steps.pop, id(keys)).atexit = False
    return _known_steps[id(keys)]


def _arrived(steps: Steps, boxes: tuple[Box, ...]) -> NeedGroup:
    number = steps.dtype.char, hashlib.sha256(steps.data).digest()
    keys = _known_keys.get(number)
    if keys is None:
        keys = _known_keys.setdefault(number, np.cumsum(steps, dtype=np.int64))
    return NeedGroup(keys, boxes)


@dataclass(frozen=True, slots=True)
class Needs:
    """Disjoint boxes of keys; each key stands in one group at most."""

    groups: tuple[NeedGroup, ...]

    @property
    def digest(self) -> bytes:
        """Equal for equal needs: what ranks compare instead of the needs themselves."""
        sha = hashlib.sha256()
        for group in self.groups:
            sha.update(repr(group.boxes).encode())
            sha.update(group.keys.tobytes())
        return sha.digest()

    def size(self, item: Ints) -> int:
        """Its bytes, where elements of key k have `item[k]` of them."""
        return sum(int(item[group.keys].sum()) * sum(box.numel for box in group.boxes) for group in self.groups)

    def on(self, keys: Ints) -> Iterator[tuple[int, tuple[Box, ...]]]:
        """The boxes needed of those of `keys` (ascending) that are needed at all, in no particular order."""
        for group in self.groups:
            for key in common(group.keys, keys).tolist():
                yield key, group.boxes


def common(many: Ints, few: Ints) -> Ints:
    """Those of `few` that are among `many`; both ascending, `many` not empty. Costs little where `few` are few."""
    at = np.minimum(np.searchsorted(many, few), len(many) - 1)
    found: Ints = few[many[at] == few]
    return found


def collect_needs(boxes: Iterable[tuple[int, Box]], shapes: Sequence[Shape]) -> Needs:
    """Group `(key, box)` pairs; empty boxes vanish, what overlaps is needed once.

    `shapes[key]` is the key's shape: keys of different shapes never share a group, so that a group is one pattern.
    """
    by_key: dict[int, list[Box]] = {}
    for key, box in boxes:
        if box.numel:
            by_key.setdefault(key, []).append(box)
    patterns: dict[tuple[Shape, tuple[Box, ...]], list[int]] = {}
    for key in sorted(by_key):
        patterns.setdefault((shapes[key], needed_once(by_key[key])), []).append(key)
    return Needs(tuple(NeedGroup(np.array(keys, np.int64), boxes) for (_, boxes), keys in patterns.items()))


def needed_once(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """What any of the boxes of a key holds, as disjoint boxes: the same for the same boxes in another order."""
    return tuple(sorted(disjoint(sorted(boxes)))) if len(boxes) > 1 else tuple(boxes)


@dataclass(frozen=True, slots=True)
class Classes:
    """The distinct needs of the ranks that share reads, and which rank has which.

    `ranks` are the global ranks of the sharing domain; `class_of[i]` is the class of `ranks[i]`, `place[i]` its number
    among the ranks of its node: 0 for the first of each.
    """

    needs: tuple[Needs, ...]
    ranks: Ints
    class_of: Ints
    place: Ints

    @classmethod
    def of(cls, digests: Mapping[int, D], needs: Mapping[D, Needs], nodes: Sequence[object] = ()) -> Classes:
        """From each rank's digest, or what else is equal for equal needs, and the needs behind each digest.

        `nodes` are equal for ranks of one node, by rank; without them all are on one.
        """
        numbers = {digest: number for number, digest in enumerate(dict.fromkeys(digests.values()))}
        before: dict[object, Iterator[int]] = defaultdict(itertools.count)
        place = {rank: next(before[nodes[rank] if nodes else None]) for rank in sorted(digests)}
        return cls(
            tuple(needs[digest] for digest in numbers),
            np.array(list(digests), np.int64),
            np.array([numbers[digest] for digest in digests.values()], np.int64),
            np.array([place[rank] for rank in digests], np.int64),
        )

    def members(self, number: int) -> Ints:
        """Global ranks of class `number`, ascending."""
        return np.sort(self.ranks[self.class_of == number])

    def number_of(self, rank: int) -> int:
        return int(self.class_of[np.flatnonzero(self.ranks == rank)[0]])
