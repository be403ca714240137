"""A conversion, applied to a catalog: every output as a graph over the checkpoint's keys."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from loader.convert.graph import Key, Node
from loader.convert.lazy import Convert, LazyTensor, lazy_key, trace
from loader.errors import ConversionError, CoverageError
from loader.plan.catalog import Catalog

Outputs = Mapping[str, Node]
"""By FQN, what each output is made of."""


def apply(convert: Convert | None, catalog: Catalog, names: Mapping[str, int], hf_config: Any) -> Outputs:
    """Trace `convert(checkpoint, hf_config)`; None keeps HF names and layouts.

    `names` are the keys that the conversion sees, each with its position in the catalog. Raises ConversionError.
    """
    entries = list(catalog.entries.values())
    if convert is None:
        return {fqn: Key(entries[at].shape, entries[at].dtype, at) for fqn, at in names.items()}
    return trace(convert, Checkpoint(catalog, names), hf_config)


class Checkpoint(Mapping[str, Tensor]):
    """What a conversion is given: the visible keys as lazy tensors. A missing key is told with its nearest."""

    def __init__(self, catalog: Catalog, names: Mapping[str, int]) -> None:
        self._entries = list(catalog.entries.values())
        self._names = names
        self._made: dict[str, LazyTensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            if name not in self._names:
                raise MissingKeyError(name, self._names)
            position = self._names[name]
            self._made[name] = lazy_key(name, position, self._entries[position])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MissingKeyError(ConversionError, KeyError):
    """The conversion asked for a key that the checkpoint lacks. A KeyError, for conversions that catch one."""

    def __init__(self, name: str, names: Mapping[str, int]) -> None:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"; the nearest that there are: {', '.join(near)}" if near else ""
        super().__init__(
            f"the conversion needs key {name!r}, which the checkpoint does not have{hint}. "
            "Is it the checkpoint of this config, and source.strip_prefix right?"
        )


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
