"""`verify: checksum`: what the bucket, or a `.bin`'s directory, claims of bytes, checked by all ranks together."""

from __future__ import annotations

from typing import NamedTuple

from loader.errors import CorruptionError
from loader.exchange.control import Control
from loader.ground.crc import crc, written
from loader.plan.catalog import Catalog
from loader.plan.claims import Claim, Claims, Cuts, Part, Spans, checkable, differing, found_values
from loader.stream.planning import pack, unpack

MEND = (
    "A bit flipped in the bucket, on the way, or in the memory of a host. Start again; where it comes back, upload the "
    "file again"
)


class Checked(NamedTuple):
    """Of a file: the CRC's algorithm and value in hex (None for a `.bin`, each of whose records has its own), how many
    of its bytes were checked, and why that is not all of them."""

    algorithm: str | None
    value: str | None
    checked_bytes: int
    unchecked: str | None


class Checks:
    """One load's. Every rank makes it, within a phase, of what its domain reads; `take` is called by many threads."""

    def __init__(self, control: Control, claims: Claims, mine: Spans, catalog: Catalog) -> None:
        """Raises ConfigError where nothing can be checked."""
        self._claims = claims
        self._catalog = catalog
        control.put("spans", pack(mine if control.rank == control.peers[0] else None))
        told = b""
        if control.rank == 0:
            everyone = [unpack(data) for data in control.take("spans", range(control.world_size))]
            told = pack([spans for spans in everyone if spans is not None])
        reads: list[Spans] = unpack(control.broadcast("all spans", told))
        self._checkable = checkable(claims, reads, catalog)
        self._cuts = Cuts(claims.each, self._checkable.numbers, reads)
        self._parts: list[Part] = []

    def take(self, file: int, start: int, data: memoryview) -> None:
        """Bytes that were read of file number `file`, from `start` on."""
        for number, begin, end in self._cuts.of(file, start, start + len(data)):
            found = crc(self._claims.each[number].algorithm, data[begin - start : end - start])
            self._parts.append(Part(number, begin, end, found))

    def agree(self, control: Control) -> dict[str, Checked]:
        """What came of it, by file, on every rank. Raises CorruptionError where a CRC is another than claimed."""
        control.put("parts", pack(self._parts))
        if control.rank == 0:
            self._check([unpack(data) for data in control.take("parts", range(control.world_size))])
        return {file.name: self._checked(number) for number, file in enumerate(self._catalog.files)}

    def _check(self, ranks: list[list[Part]]) -> None:
        if two := differing(ranks):
            part, one, other = two
            name = self._catalog.files[self._claims.each[part.claim].file].name
            raise CorruptionError(
                f"{name}: ranks {one} and {other} read bytes {part.start}-{part.stop} otherwise than each other. {MEND}"
            )
        parts = (part for parts in ranks for part in parts)
        for number, value in found_values(self._claims.each, self._checkable.numbers, parts).items():
            claim = self._claims.each[number]
            if value != claim.value:
                found, expected = (written(claim.algorithm, each) for each in (value, claim.value))
                raise CorruptionError(
                    f"{self._described(claim)} have the checksum {claim.algorithm} {found}, expected {expected}. {MEND}"
                )

    def _described(self, claim: Claim) -> str:
        """The claim's bytes, and the keys that they are of where these are not all the file's."""
        file = self._catalog.files[claim.file]
        entries = self._catalog.entries.items()
        keys = [key for key, e in entries if e.file == claim.file and e.start < claim.stop and e.stop > claim.start]
        whole = claim.stop - claim.start == file.size
        of = f" (key {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''})" if keys and not whole else ""
        return f"{file.name}: its bytes {claim.start}-{claim.stop}{of}"

    def _checked(self, number: int) -> Checked:
        claims = {n: claim for n, claim in enumerate(self._claims.each) if claim.file == number}
        size = self._catalog.files[number].size
        whole = next((claim for claim in claims.values() if claim.stop - claim.start == size), None)
        return Checked(
            next((claim.algorithm for claim in claims.values()), None),
            written(whole.algorithm, whole.value) if whole else None,
            sum(claims[n].stop - claims[n].start for n in self._checkable.numbers if n in claims),
            self._checkable.without.get(number),
        )
