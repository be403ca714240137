"""A conversion's outputs, fitted to the tensors of a model: ties, another vocabulary, and what is new in it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from loader.convert.conversion import Outputs
from loader.convert.graph import Shape
from loader.convert.ties import join_ties
from loader.convert.vocabulary import Vocabulary, fit_vocabulary


class Wishes(NamedTuple):
    """In what a model may differ from the checkpoint; `initialise` are globs over FQNs that may lack a source."""

    vocabulary: Vocabulary
    initialise: Sequence[str] = ()


class Fitted(NamedTuple):
    """The outputs, and the first names of tensors that are to be initialised: they have none."""

    outputs: Outputs
    new: frozenset[str]


def fit(
    outputs: Outputs,
    tensors: Mapping[tuple[str, ...], Shape],
    wishes: Wishes,
    declared_ties: Callable[[], Mapping[str, str]],
) -> Fitted:
    """Fit `outputs` to `tensors`: by all the FQNs of each its shape. Raises CoverageError, see the parts."""
    outputs = join_ties(outputs, tensors, declared_ties)
    shapes = {name: shape for names, shape in tensors.items() for name in names}
    outputs = fit_vocabulary(outputs, shapes, wishes.vocabulary)
    without = (names for names in tensors if outputs.keys().isdisjoint(names))
    new = (names[0] for names in without if _matches(names, wishes.initialise))
    return Fitted(outputs, frozenset(new))


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)
