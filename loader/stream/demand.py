"""What this rank demands of the checkpoint, and the proof that nothing is missing or left over."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loader.convert.conversion import Outputs
from loader.convert.graph import Node, seen_in
from loader.errors import CoverageError
from loader.ground.recording import Recorder
from loader.place.landing import Landings
from loader.place.targets import Target
from loader.plan.catalog import Catalog, Entry, View
from loader.plan.geometry import Box
from loader.plan.needs import Classes, D, Needs, collect_needs

LISTED = 10
"""How many keys an error lists."""

Keys = Mapping[str, Entry | View]
"""The catalog's, in its order."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A rank's needs, and the numbers of the catalog's keys that it has no use for: what no rank uses is an error."""

    needs: Needs
    unused: frozenset[int]

    @property
    def digest(self) -> bytes:
        return self.needs.digest + repr(sorted(self.unused)).encode()


def make_demand(
    targets: Iterable[Target],
    outputs: Outputs,
    catalog: Catalog,
    wanted: Collection[int],
    portion: int,
    recorder: Recorder | None = None,
) -> tuple[Demand, Landings]:
    """Pull every target back to boxes of keys, and lay out where each box lands.

    `wanted` are the numbers of the catalog's keys that must be used by some rank. An op on several tensors holds
    `portion` elements of each at a time; `recorder` times it. Raises CoverageError for an FQN that the conversion does
    not make, or makes in another shape.
    """
    landings = Landings(portion, recorder)
    boxes: list[tuple[int, Box]] = []
    used: set[int] = set()
    keys = catalog.keys
    for target in targets:
        known = sources_of(target.names, target.shape, outputs, keys)
        for node in known:
            used.update(seen_in(node))
        boxes += pull_target(target, known[0], landings)
    needs = collect_needs(boxes, [entry.shape for entry in catalog.entries.values()])
    return Demand(needs, frozenset(wanted) - used), landings


def pull_target(target: Target, node: Node, landings: Landings) -> Iterator[tuple[int, Box]]:
    """The boxes of keys (by position) that the target takes, made of `node`; they are to land in it."""
    for box, offsets in target.boxes:
        origin = tuple(o - local for o, local in zip(box.offsets, offsets, strict=True))
        yield from landings.add(node, box, target.tensor[box.slices(origin)])


def sources_of(names: Sequence[str], shape: tuple[int, ...], outputs: Outputs, keys: Keys) -> list[Node]:
    """What a tensor of these names is made of, under each name that the conversion makes: a tied one may be there under
    any. Raises CoverageError where it is under none, or in another shape."""
    known = [fqn for fqn in names if fqn in outputs]
    if not known:
        near = difflib.get_close_matches(names[0], outputs, n=3)
        hint = f"; the nearest that there are: {', '.join(near)}" if near else ""
        raise CoverageError(
            f"{' = '.join(names)} {list(shape)} has no source: neither a key nor an output of the "
            f"conversion has that name{hint}. Check source.strip_prefix, source.ignore and the conversion, or "
            "list it in model.initialise if it is new"
        )
    for fqn in known:
        found = outputs[fqn]
        if found.shape != shape:
            known_keys = list(keys)
            made_of = _listed([known_keys[number] for number in sorted(seen_in(found))], keys) or "no key"
            raise CoverageError(
                f"{fqn}: the model's shape is {list(shape)}, the checkpoint's {list(found.shape)}, "
                f"of {made_of}. Is it the checkpoint of this config?"
            )
    return [outputs[fqn] for fqn in known]


def classes_of(
    ranks: Iterable[int], digests: Sequence[D], demands: Mapping[D, Demand], nodes: Sequence[object]
) -> Classes:
    """The classes of `ranks`, by the digests and nodes of all ranks of the world."""
    return Classes.of({rank: digests[rank] for rank in ranks}, {each: demands[each].needs for each in demands}, nodes)


def check_unused(unused: Iterable[frozenset[int]], keys: Keys) -> None:
    """Raise CoverageError for keys of the catalog that no rank uses."""
    names = list(keys)
    left = sorted(names[number] for number in frozenset.intersection(*unused))
    if left:
        raise CoverageError(
            f"{len(left)} checkpoint keys have no target: {_listed(left, keys)}. "
            "List them in source.ignore if they are not wanted, or check that the model is the checkpoint's"
        )


def _listed(names: Sequence[str], keys: Keys) -> str:
    """Keys with their shapes, the first of them where there are many."""
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(f"{name} {list(keys[name].shape)}" for name in names[:LISTED]) + rest
