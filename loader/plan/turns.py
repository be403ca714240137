"""In which order a reader takes its extents."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from loader.plan.catalog import Entry
from loader.plan.extents import Cuts
from loader.plan.needs import Ints


def take_turns(entries: Sequence[Entry], cuts: Cuts, partners: Sequence[Collection[int]]) -> Ints:
    """A number for each extent: readers take theirs by ascending numbers. It is the order of the files, except that
    `partners`, keys whose elements are combined (a weight and its scales, say), are gone through side by side.

    So what is combined arrives in the same rounds or the next, and little of it waits. Keys of 100 and 300 bytes at 0
    and 5000: byte 50 of the first and byte 150 of the second both have the number 200, half way through the 400.
    """
    file = np.array([e.file for e in entries], np.int64)
    place = _place(file, np.array([e.start for e in entries], np.int64))
    anchor, stretch = place.copy(), np.ones(len(entries))
    for group in partners:
        keys = np.array(sorted(group), np.int64)
        sizes = np.array([entries[key].stop - entries[key].start for key in keys.tolist()], np.int64)
        anchor[keys] = place[keys].min()
        stretch[keys] = sizes.sum() / np.maximum(sizes, 1)
    order = np.argsort(place, kind="stable")
    begins = _place(cuts.file, cuts.start)
    key = order[np.searchsorted(place[order], begins, side="right") - 1]
    turns: Ints = anchor[key] + ((begins - place[key]) * stretch[key]).astype(np.int64)
    # An extent may hold the end of a large key and then a small one, whose turn may be an earlier one: scales, say.
    combined = np.array(sorted(set().union(*partners)), np.int64)
    extent = np.searchsorted(begins, place[combined], side="right") - 1
    combined, extent = combined[extent >= 0], extent[extent >= 0]
    inside = place[combined] < _place(cuts.file, cuts.stop)[extent]
    np.minimum.at(turns, extent[inside], anchor[combined[inside]])
    return turns


def _place(file: Ints, byte: Ints) -> Ints:
    """File and byte as one ascending number: files are far smaller than 2^44 bytes (16 TiB)."""
    return file * (1 << 44) + byte
