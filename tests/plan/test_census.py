"""Who holds what: each element in one unit, and units that are held by whole boxes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.errors import BuilderError
from loader.plan.census import atoms, cells_of, parcels_of
from loader.plan.geometry import Box

F32 = "torch.float32"


def cells(*ranks):
    """The cells of ranks that hold `{fqn: (shape, boxes)}`."""
    told = [parcels_of((fqn, shape, F32, boxes) for fqn, (shape, boxes) in rank.items()) for rank in ranks]
    return cells_of([parcels for parcels, _ in told], {k: v for _, lists in told for k, v in lists.items()})


def box(first, stop, columns=4):
    return Box((first, 0), (stop - first, columns))


@st.composite
def some_boxes(draw):
    found = set()
    for _ in range(draw(st.integers(1, 5))):
        ends = [sorted(draw(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True))) for _ in range(2)]
        found.add(Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends)))
    return sorted(found)


def points(each):
    return set(itertools.product(*(range(o, o + n) for o, n in zip(each.offsets, each.sizes, strict=True))))


@given(some_boxes())
def test_atoms_are_disjoint_and_make_up_every_box(boxes):
    found = atoms(boxes)
    disjoint = all(points(a).isdisjoint(points(b)) for a, b in itertools.combinations(boxes, 2))
    assert (found == ()) == disjoint
    for each in boxes if found else ():
        inside = [atom for atom in found if atom.intersect(each)]
        assert set.union(*map(points, inside)) == points(each)
        assert sum(atom.numel for atom in inside) == each.numel
    assert sum(atom.numel for atom in found) == len(set.union(set(), *map(points, found)))


def test_names_that_ranks_have_together_are_one_cell():
    halves = [box(0, 2), box(2, 4)]
    ranks = [dict.fromkeys(("a", "b"), ((4, 4), (half,))) | {"norm": ((4, 4), (box(0, 4),))} for half in halves]
    assert [(cell.names, cell.atoms) for cell in cells(*ranks)] == [(("a", "b"), ()), (("norm",), ())]


def test_stages_that_share_one_tensor_part_it_from_the_rest():
    whole = ((4, 4), (box(0, 4),))
    found = cells({"embed": whole, "up": whole}, {"embed": whole, "down": whole}, {"down": whole})
    assert sorted(cell.names for cell in found) == [("down",), ("embed",), ("up",)]


def test_a_tensor_in_other_pieces_elsewhere_is_cut_into_atoms():
    (cell,) = cells({"a": ((4, 4), (box(0, 4),))}, {"a": ((4, 4), (box(1, 3),))})
    assert sorted(cell.atoms) == [box(0, 1), box(1, 3), box(3, 4)]
    assert cell.parts(box(1, 3)) == [box(1, 3)]


def test_a_tensor_that_differs_between_ranks_is_named():
    with pytest.raises(BuilderError, match=r"^a is \[4, 4\] torch.float32 on rank 0 and \[2, 4\] .* on rank 1"):
        cells({"a": ((4, 4), (box(0, 4),))}, {"a": ((2, 4), (box(0, 2),))})
