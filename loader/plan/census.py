"""Who holds what of which tensors: so that each element is counted once, and replicas can be compared.

Ranks tell their tensors by pattern (shape, dtype, boxes), and lists of names by digest: what they tell grows with
patterns, not with names, and equal lists are sent once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loader.errors import BuilderError
from loader.plan.geometry import Box

Names = tuple[str, ...]


class Parcel(NamedTuple):
    """Tensors of which a rank holds the same boxes: `names` is the digest of their FQNs. No boxes: it holds nothing."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Box, ...]
    names: bytes


class Cell(NamedTuple):
    """FQNs that every rank has together or not at all, in the same boxes. Where these overlap without being equal,
    `atoms` are the disjoint boxes that they are made of; else there are none."""

    names: Names
    shape: tuple[int, ...]
    dtype: str
    atoms: tuple[Box, ...]

    def parts(self, box: Box) -> list[Box]:
        """What is summed by itself of a box that a rank holds."""
        return [atom for atom in self.atoms if atom.intersect(box)] if self.atoms else [box]


def parcels_of(
    held: Iterable[tuple[str, tuple[int, ...], str, tuple[Box, ...]]],
) -> tuple[list[Parcel], dict[bytes, Names]]:
    """A rank's tensors (FQN, shape, dtype, boxes) as parcels, and the lists of names behind their digests."""
    patterns: dict[tuple[tuple[int, ...], str, tuple[Box, ...]], list[str]] = {}
    for fqn, shape, dtype, boxes in held:
        patterns.setdefault((shape, dtype, tuple(sorted(box for box in boxes if box.numel))), []).append(fqn)
    parcels, lists = [], {}
    for pattern, found in patterns.items():
        names = tuple(sorted(found))
        digest = hashlib.sha256("\n".join(names).encode()).digest()
        lists[digest] = names
        parcels.append(Parcel(*pattern, digest))
    return parcels, lists


def cells_of(ranks: Sequence[Sequence[Parcel]], lists: Mapping[bytes, Names]) -> list[Cell]:
    """The cells of the tensors that `ranks` hold, given all their lists of names.

    Raises BuilderError for an FQN that has another shape or dtype on another rank.
    """
    parcels: dict[bytes, dict[Parcel, int]] = {}
    for rank, held in enumerate(ranks):
        for parcel in held:
            parcels.setdefault(parcel.names, {}).setdefault(parcel, rank)
    lists_with: dict[str, tuple[bytes, ...]] = {}
    for digest in sorted(lists):
        for name in lists[digest]:
            lists_with[name] = (*lists_with.get(name, ()), digest)
    together: dict[tuple[bytes, ...], list[str]] = {}
    for name in sorted(lists_with):
        together.setdefault(lists_with[name], []).append(name)
    cells = []
    for digests, names in together.items():
        found = {parcel: rank for digest in digests for parcel, rank in parcels[digest].items()}
        kinds = {(parcel.shape, parcel.dtype): rank for parcel, rank in found.items()}
        if len(kinds) > 1:
            told = " and ".join(f"{list(shape)} {dtype} on rank {rank}" for (shape, dtype), rank in kinds.items())
            raise BuilderError(f"{names[0]} is {told}: build it alike on all ranks, or give it two names")
        shape, dtype = next(iter(kinds))
        boxes = sorted({box for parcel in found for box in parcel.boxes})
        cells.append(Cell(tuple(names), shape, dtype, atoms(boxes)))
    return cells


def atoms(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """The disjoint boxes that distinct, sorted boxes are made of where some of them overlap; else none."""
    if not boxes or not boxes[0].sizes:
        return ()
    starts = np.array([box.offsets for box in boxes])
    stops = np.array([box.stops for box in boxes])
    for at, box in enumerate(boxes):  # a row of the matrix of overlaps at a time: thousands of ranks have as many boxes
        later = slice(at + 1, None)
        if ((starts[later] < box.stops) & (stops[later] > box.offsets)).all(axis=1).any():
            return tuple(_refined(boxes))
    return ()


def _refined(boxes: Sequence[Box]) -> list[Box]:
    found: list[Box] = []
    for box in boxes:
        fresh, cut = [box], []
        for atom in found:
            common = atom.intersect(box)
            cut += [common, *atom.subtract(common)] if common else [atom]
            fresh = [piece for each in fresh for piece in each.subtract(atom)]
        found = cut + fresh
    return found
