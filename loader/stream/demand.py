"""What this rank demands of the checkpoint, and the proof that nothing is missing or left over."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from loader.convert.conversion import Conversion
from loader.errors import CoverageError
from loader.place.landing import Landings
from loader.place.targets import Target
from loader.plan.catalog import Entry
from loader.plan.geometry import Box
from loader.plan.needs import Needs, collect_needs

LISTED = 10
"""How many names an error lists."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A rank's needs, and the positions of the keys that it has no use for: what no rank uses is an error."""

    needs: Needs
    unused: frozenset[int]

    @property
    def digest(self) -> bytes:
        return self.needs.digest + repr(sorted(self.unused)).encode()


def make_demand(
    targets: Iterable[Target], conversion: Conversion, entries: Sequence[Entry], visible: Collection[int]
) -> tuple[Demand, Landings]:
    """Pull every target back to boxes of keys, and lay out where each box lands.

    `visible` are the keys that must be used by some rank. Raises CoverageError for an FQN that the conversion does not
    make, or makes in another shape.
    """
    landings = Landings()
    boxes: list[tuple[int, Box]] = []
    used: set[int] = set()
    for target in targets:
        known = _known_names(target, conversion)
        for fqn in known:
            used.update(conversion.keys_of(fqn))
        for box, offsets in target.boxes:
            for source in conversion.pull_back(known[0], box):
                boxes.append((source.key, source.box))
                at = Box(
                    tuple(i - o + local for i, o, local in zip(source.into.offsets, box.offsets, offsets, strict=True)),
                    source.into.sizes,
                )
                landings.add(source.key, source.box, target.tensor[at.slices()])
    needs = collect_needs(boxes, [entry.shape for entry in entries])
    return Demand(needs, frozenset(visible) - used), landings


def _known_names(target: Target, conversion: Conversion) -> list[str]:
    """The target's names that the conversion makes, in the target's shape. A tied tensor may be there under any."""
    known = [fqn for fqn in target.names if fqn in conversion.outputs]
    if not known:
        near = difflib.get_close_matches(target.fqn, conversion.outputs, n=3)
        hint = f"; the nearest that there are: {', '.join(near)}" if near else ""
        raise CoverageError(
            f"{' = '.join(target.names)} {list(target.shape)} has no source: the checkpoint has no such key{hint}. "
            "Check source.strip_prefix, source.ignore and the conversion"
        )
    for fqn in known:
        found = conversion.outputs[fqn].shape
        if found != target.shape:
            raise CoverageError(
                f"{fqn}: the model's shape is {list(target.shape)}, the checkpoint's {list(found)}: "
                "is it the checkpoint of this config?"
            )
    return known


def check_unused(unused: Iterable[frozenset[int]], names: Sequence[str]) -> None:
    """Raise CoverageError for keys that no rank uses. `names[position]` is the key's name."""
    left = sorted(names[position] for position in frozenset.intersection(*unused))
    if left:
        rest = f" and {len(left) - LISTED} more" if len(left) > LISTED else ""
        raise CoverageError(
            f"{len(left)} checkpoint keys have no target: {', '.join(left[:LISTED])}{rest}. "
            "List them in source.ignore if they are not wanted, or check that the model is the checkpoint's"
        )
