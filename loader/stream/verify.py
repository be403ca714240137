"""The model's fingerprint, agreed on by all ranks: each element counted once, replicas compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from loader.errors import CorruptionError, FingerprintError
from loader.exchange.control import Control
from loader.place.fingerprint import Sums, box_sum, tensor_term, written
from loader.place.targets import Target
from loader.plan.census import Cell, Parcel, cells_of, parcels_of
from loader.plan.geometry import Box
from loader.stream.planning import pack, unpack

LISTED = 5
"""How many tensors an error lists."""


class Unit(NamedTuple):
    """What ranks sum, compare and count together: a box of the tensors of a cell, which is told by its number."""

    cell: int
    box: Box


class Sum(NamedTuple):
    """A unit's sum over all its names, mod 2**64, and the digest of the sums of each."""

    total: int
    digest: bytes

    @classmethod
    def of(cls, sums: Sums) -> Sum:
        return cls(int(sums.sum(dtype=np.uint64)), hashlib.blake2b(sums.tobytes(), digest_size=8).digest())


def agree_on_fingerprint(control: Control, targets: Sequence[Target]) -> str:
    """The fingerprint of what all ranks' targets hold, on every rank (see `loader.place.fingerprint`).

    Collective. Each element counts on the lowest rank that holds it, under each of its names. Raises CorruptionError
    where replicas differ, naming FQN and ranks, and BuilderError where an FQN is not the same tensor on all ranks.
    """
    with control.phase("census"):
        cells = _cells(control, targets)
    with control.phase("fingerprint"):
        mine = dict(_sums(cells, targets))
        control.put("sums", pack({unit: Sum.of(sums) for unit, sums in mine.items()}))
        everyone = range(control.world_size)
        told = b""
        if control.rank == 0:
            told = pack(_merge(cells, [unpack(data) for data in control.take("sums", everyone)]))
        fingerprint, suspects = unpack(control.broadcast("fingerprint", told))
        if suspects:
            control.put("suspects", pack({unit: mine[unit] for unit in suspects if unit in mine}))
            if control.rank == 0:
                _accuse(cells, suspects, [unpack(data) for data in control.take("suspects", everyone)])
    return str(fingerprint)


def check_fingerprint(found: str, expected: str | None) -> None:
    """Raise FingerprintError where another one was expected."""
    if expected is not None and found != expected:
        raise FingerprintError(
            f"the fingerprint of what was loaded is {found}, expected {expected}: the checkpoint, the "
            "conversion or a dtype is another than the one that was expected, or a bit flipped on the way; compare the "
            "report's pins and dtypes with the other job's, or correct expect"
        )


def _cells(control: Control, targets: Sequence[Target]) -> list[Cell]:
    """All ranks' tensors. Of lists of names that are equal only the first rank's is sent."""
    parcels, lists = parcels_of(
        (name, target.shape, str(target.dtype), tuple(box for box, _ in target.boxes))
        for target in targets
        for name in target.names
    )
    control.put("parcels", pack(parcels))
    asked = b""
    everyone: list[list[Parcel]] = []
    if control.rank == 0:
        everyone = [unpack(data) for data in control.take("parcels", range(control.world_size))]
        first: dict[bytes, int] = {}
        for rank, held in enumerate(everyone):
            for parcel in held:
                first.setdefault(parcel.names, rank)
        asked = pack(first)
    spokesmen: Mapping[bytes, int] = unpack(control.broadcast("lists of names", asked))
    if control.rank in spokesmen.values():
        control.put("names", pack([lists[digest] for digest, rank in spokesmen.items() if rank == control.rank]))
    cells = b""
    if control.rank == 0:
        told: dict[bytes, tuple[str, ...]] = {}
        for rank in sorted(set(spokesmen.values())):
            digests = [digest for digest, spokesman in spokesmen.items() if spokesman == rank]
            told |= zip(digests, unpack(*control.take("names", [rank])), strict=True)
        cells = pack(cells_of(everyone, told))
    found: list[Cell] = unpack(control.broadcast("cells", cells))
    return found


def _sums(cells: Sequence[Cell], targets: Sequence[Target]) -> Iterator[tuple[Unit, Sums]]:
    """What this rank holds of each unit: its sum for each name of the cell."""
    by_name = {name: target for target in targets for name in target.names}
    for number, cell in enumerate(cells):
        held = [(name, by_name[name]) for name in cell.names if name in by_name]
        for box, _ in held[0][1].boxes if held else ():
            for part in cell.parts(box) if box.numel else ():
                sums = [box_sum(name, cell.shape, part, _values(target, box, part)) for name, target in held]
                yield Unit(number, part), np.array(sums, np.uint64)


def _values(target: Target, box: Box, part: Box) -> torch.Tensor:
    """The elements of `part`, which is within one of the target's boxes."""
    at = dict(target.boxes)[box]
    return target.tensor[part.slices([o - local for o, local in zip(box.offsets, at, strict=True)])]


def _merge(cells: Sequence[Cell], ranks: Sequence[Mapping[Unit, Sum]]) -> tuple[str, list[Unit]]:
    """The fingerprint, from every rank's sums, and the units that some of their holders have otherwise."""
    first: dict[Unit, Sum] = {}
    suspects: dict[Unit, None] = {}
    for sums in ranks:
        for unit, found in sums.items():
            if first.setdefault(unit, found) != found:
                suspects[unit] = None
    terms = (tensor_term(name, cell.dtype, cell.shape) for cell in cells for name in cell.names)
    return written(sum(terms) + sum(found.total for found in first.values())), list(suspects)


def _accuse(cells: Sequence[Cell], suspects: Sequence[Unit], ranks: Sequence[Mapping[Unit, Sums]]) -> None:
    """Raise CorruptionError for the tensors of `suspects` that are not the same on the ranks that hold them."""
    told = []
    for unit in suspects:
        holders = [rank for rank, sums in enumerate(ranks) if unit in sums]
        for number, name in enumerate(cells[unit.cell].names):
            alike: dict[int, list[int]] = {}
            for rank in holders:
                alike.setdefault(int(ranks[rank][unit][number]), []).append(rank)
            if len(alike) > 1:
                where = f"offsets {list(unit.box.offsets)}, sizes {list(unit.box.sizes)}"
                told.append(f"{name} ({where}) is one thing on {' and another on '.join(map(_ranks, alike.values()))}")
    rest = f", and {len(told) - LISTED} more" if len(told) > LISTED else ""
    raise CorruptionError(
        f"replicas differ: {'; '.join(told[:LISTED])}{rest}. A bit flipped in the memory or on the way of one of them. "
        "Start again; where it comes back with one host, take that host out"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
