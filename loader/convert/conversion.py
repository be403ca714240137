"""What a conversion tells of its outputs: their shapes, and the boxes of keys that a box of one comes from."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from loader.errors import CoverageError
from loader.plan.catalog import Catalog
from loader.plan.geometry import Box


class Output(NamedTuple):
    """One tensor that the conversion makes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(NamedTuple):
    """Elements of `key` (its position in the catalog) that move as they are: `box` of the key lands in `into`, a box of
    the output with the same sizes."""

    key: int
    box: Box
    into: Box


class Conversion(Protocol):
    """A traced conversion. It costs no I/O to ask it anything."""

    @property
    def outputs(self) -> Mapping[str, Output]:
        """What it makes, by FQN."""

    def keys_of(self, fqn: str) -> Sequence[int]:
        """Positions of the keys that `fqn` is made of."""

    def pull_back(self, fqn: str, box: Box) -> list[Source]:
        """The sources that together fill `box` of `fqn`, each element once."""


class KeepNames:
    """The conversion that keeps HF names and layouts: every key is the FQN of its own name."""

    def __init__(self, catalog: Catalog, names: Mapping[str, int]) -> None:
        entries = list(catalog.entries.values())
        self._key = names
        self.outputs = {fqn: Output(entries[key].shape, entries[key].dtype) for fqn, key in names.items()}

    def keys_of(self, fqn: str) -> Sequence[int]:
        return (self._key[fqn],)

    def pull_back(self, fqn: str, box: Box) -> list[Source]:
        return [Source(self._key[fqn], box, box)]


def visible_keys(catalog: Catalog, ignore: Sequence[str], strip_prefix: str) -> dict[str, int]:
    """Names under which a conversion sees the keys, with each key's position in the catalog.

    Keys that a glob of `ignore` matches are left out; `strip_prefix` is then taken off the names that begin with it.
    Raises CoverageError where that gives two keys one name.
    """
    seen: dict[str, str] = {}
    names: dict[str, int] = {}
    for position, key in enumerate(catalog.entries):
        if any(fnmatch.fnmatchcase(key, glob) for glob in ignore):
            continue
        name = key.removeprefix(strip_prefix)
        if name in names:
            raise CoverageError(
                f"source.strip_prefix {strip_prefix!r} gives {seen[name]!r} and {key!r} one name, {name!r}: "
                "leave one of them out with source.ignore"
            )
        seen[name], names[name] = key, position
    return names
