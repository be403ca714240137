"""A conversion, applied to a catalog: every output as a graph over the checkpoint's keys."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from loader.convert.graph import Key, Node, Seen
from loader.convert.lazy import Convert, Declare, LazyTensor, lazy_key, trace
from loader.convert.strided import strided
from loader.errors import ConversionError, CoverageError
from loader.plan.catalog import Catalog, View
from loader.plan.geometry import is_row_major

Outputs = Mapping[str, Node]
"""By FQN, what each output is made of."""


def apply(convert: Convert | None, keys: Mapping[str, Node], hf_config: Any) -> Outputs:
    """Trace `convert(checkpoint, hf_config)` on what it sees as `keys`; None keeps HF names and layouts.

    Raises ConversionError.
    """
    return keys if convert is None else trace(convert, Checkpoint(keys), hf_config)


def needless_keys(convert: Convert | None, names: Collection[str], hf_config: Any) -> Mapping[str, str]:
    """Of the keys `names`, those that the conversion declares a model may have no use for, with its reasons."""
    declare: Declare | None = getattr(convert, "needless", None)
    return declare(names, hf_config) if declare else {}


class Checkpoint(Mapping[str, Tensor]):
    """What a conversion is given: the visible keys as lazy tensors. A missing key is told with its nearest."""

    def __init__(self, keys: Mapping[str, Node]) -> None:
        self._keys = keys
        self._made: dict[str, LazyTensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            if name not in self._keys:
                raise MissingKeyError(name, self._keys)
            self._made[name] = lazy_key(name, self._keys[name])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class MissingKeyError(ConversionError, KeyError):
    """The conversion asked for a key that the checkpoint lacks. A KeyError, for conversions that catch one."""

    def __init__(self, name: str, keys: Collection[str]) -> None:
        near = difflib.get_close_matches(name, keys, n=3)
        hint = f"; the nearest that there are: {', '.join(near)}" if near else ""
        super().__init__(
            f"the conversion needs key {name!r}, which the checkpoint does not have{hint}. "
            "Is it the checkpoint of this config, and source.strip_prefix right?"
        )


def visible_keys(catalog: Catalog, ignore: Sequence[str], strip_prefix: str) -> dict[str, Node]:
    """The keys as a conversion sees them, by the names under which it does.

    Keys that a glob of `ignore` matches are left out; `strip_prefix` is then taken off the names that begin with it.
    Raises CoverageError where that gives two keys one name.
    """
    seen: dict[str, str] = {}
    keys: dict[str, Node] = {}
    stored = {name: Key(entry.shape, entry.dtype, at) for at, (name, entry) in enumerate(catalog.entries.items())}
    views: dict[View, Node] = {}  # keys that are one and the same are one node: it is enough if one of them is used
    for number, (key, found) in enumerate(catalog.keys.items()):
        if any(fnmatch.fnmatchcase(key, glob) for glob in ignore):
            continue
        name = key.removeprefix(strip_prefix)
        if name in keys:
            raise CoverageError(
                f"source.strip_prefix {strip_prefix!r} gives {seen[name]!r} and {key!r} one name, {name!r}: "
                "leave one of them out with source.ignore"
            )
        seen[name] = key
        if isinstance(found, View):
            keys[name] = views.setdefault(found, _seen(key, found, stored[found.entry], number))
        else:
            keys[name] = stored[key]
    return keys


def _seen(key: str, view: View, source: Node, number: int) -> Node:
    """A view of what is stored. One that is all of it as it stands is another name of a key."""
    if (view.shape, view.offset) == (source.shape, 0) and is_row_major(view.shape, view.strides):
        return source
    try:
        return Seen(view.shape, source.dtype, strided(source, view.shape, view.offset, view.strides), number)
    except ConversionError as error:
        raise ConversionError(f"key {key!r}: {error.message}") from error
