"""In which order extents are read where keys are combined."""

import torch

from loader.plan.catalog import Entry
from loader.plan.extents import cut_extents
from loader.plan.geometry import whole
from loader.plan.needs import Classes, collect_needs
from loader.plan.turns import take_turns


def turns(sizes, partners, range_bytes):
    """Keys of so many bytes, one after another in one file: by extent its bytes, in turn."""
    entries, at = [], 0
    for size in sizes:
        entries.append(Entry(torch.uint8, (size,), 0, at, at + size))
        at += size
    needs = collect_needs([(key, whole(entry.shape)) for key, entry in enumerate(entries)], [e.shape for e in entries])
    cuts = cut_extents(entries, Classes.of({0: b""}, {b"": needs}), range_bytes)
    order = take_turns(entries, cuts, partners).argsort(kind="stable")
    return [(int(cuts.start[i]), int(cuts.stop[i])) for i in order]


def test_a_scale_that_is_read_with_the_end_of_its_weight_comes_first():
    assert turns([950, 10, 950], [], 200) == sorted(turns([950, 10, 950], [], 200))
    first, with_scale, *rest = turns([950, 10, 950], [{0, 1}], 200)
    assert first[0] == 0
    assert with_scale[0] < 950
    assert with_scale[1] >= 960
    assert rest == sorted(rest)


def test_partners_are_read_side_by_side():
    found = turns([800, 800], [{0, 1}], 200)
    assert [start // 800 for start, _ in found] == [0, 1] * 4


def test_nothing_needed_has_no_turns():
    entries = [Entry(torch.uint8, (8,), 0, 0, 8)]
    cuts = cut_extents(entries, Classes.of({0: b""}, {b"": collect_needs([], [(8,)])}), 200)
    assert len(take_turns(entries, cuts, [{0}])) == 0
