"""What this rank demands of the checkpoint, and the proof that nothing is missing or left over."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loader.convert.conversion import Outputs
from loader.convert.graph import Node, combines, keys_of
from loader.errors import CoverageError
from loader.place.landing import Landings
from loader.place.targets import Target
from loader.plan.catalog import Entry
from loader.plan.geometry import Box
from loader.plan.needs import Needs, collect_needs

LISTED = 10
"""How many keys an error lists."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A rank's needs, and the positions of the keys that it has no use for: what no rank uses is an error."""

    needs: Needs
    unused: frozenset[int]

    @property
    def digest(self) -> bytes:
        return self.needs.digest + repr(sorted(self.unused)).encode()


def make_demand(
    targets: Iterable[Target], outputs: Outputs, entries: Mapping[str, Entry], visible: Collection[int], portion: int
) -> tuple[Demand, Landings]:
    """Pull every target back to boxes of keys, and lay out where each box lands.

    `entries` are the catalog's; `visible` are the positions of keys that must be used by some rank. An op on several
    tensors holds `portion` elements of each at a time. Raises CoverageError for an FQN that the conversion does not
    make, or makes in another shape.
    """
    landings = Landings()
    boxes: list[tuple[int, Box]] = []
    used: set[int] = set()
    for target in targets:
        known = _known_names(target, outputs, entries)
        for fqn in known:
            used.update(keys_of(outputs[fqn]))
        for box, offsets in target.boxes:
            origin = tuple(o - local for o, local in zip(box.offsets, offsets, strict=True))
            for part in _portions(outputs[known[0]], box, portion):
                boxes += landings.add(outputs[known[0]], part, target.tensor[part.slices(origin)])
    needs = collect_needs(boxes, [entry.shape for entry in entries.values()])
    return Demand(needs, frozenset(visible) - used), landings


def _portions(node: Node, box: Box, most: int) -> Iterator[Box]:
    """The box, in rows of at most `most` elements where an op must have several tensors at once to make them."""
    if box.numel <= most or not combines(node):
        yield box
        return
    dim = next(d for d, size in enumerate(box.sizes) if size > 1)
    half = box.sizes[dim] // 2
    offsets, sizes = list(box.offsets), list(box.sizes)
    for start, size in ((0, half), (half, box.sizes[dim] - half)):
        offsets[dim], sizes[dim] = box.offsets[dim] + start, size
        yield from _portions(node, Box(tuple(offsets), tuple(sizes)), most)


def _known_names(target: Target, outputs: Outputs, entries: Mapping[str, Entry]) -> list[str]:
    """The target's names that the conversion makes, in the target's shape. A tied tensor may be there under any."""
    known = [fqn for fqn in target.names if fqn in outputs]
    if not known:
        near = difflib.get_close_matches(target.fqn, outputs, n=3)
        hint = f"; the nearest that there are: {', '.join(near)}" if near else ""
        raise CoverageError(
            f"{' = '.join(target.names)} {list(target.shape)} has no source: neither a key nor an output of the "
            f"conversion has that name{hint}. Check source.strip_prefix, source.ignore and the conversion"
        )
    for fqn in known:
        found = outputs[fqn]
        if found.shape != target.shape:
            keys = list(entries)
            made_of = _listed([keys[at] for at in sorted(keys_of(found))], entries) or "no key"
            raise CoverageError(
                f"{fqn}: the model's shape is {list(target.shape)}, the checkpoint's {list(found.shape)}, "
                f"of {made_of}. Is it the checkpoint of this config?"
            )
    return known


def check_unused(unused: Iterable[frozenset[int]], entries: Mapping[str, Entry]) -> None:
    """Raise CoverageError for keys of the catalog that no rank uses."""
    keys = list(entries)
    left = sorted(keys[position] for position in frozenset.intersection(*unused))
    if left:
        raise CoverageError(
            f"{len(left)} checkpoint keys have no target: {_listed(left, entries)}. "
            "List them in source.ignore if they are not wanted, or check that the model is the checkpoint's"
        )


def _listed(keys: Sequence[str], entries: Mapping[str, Entry]) -> str:
    """Keys with their shapes, the first of them where there are many."""
    rest = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(f"{key} {list(entries[key].shape)}" for key in keys[:LISTED]) + rest
