"""Boxes against sets of flat indices."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.plan.geometry import (
    Box,
    boxes_of_range,
    contiguous_strides,
    disjoint,
    flat_span,
    is_contiguous,
    portions,
    whole,
)

prove = settings(derandomize=True, deadline=None, max_examples=200)


@st.composite
def boxes_within(draw, shape, *, empty=False):
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    if not empty:
        ends = [(a, b) if a < b else (min(a, n - 1), min(a, n - 1) + 1) for (a, b), n in zip(ends, shape, strict=True)]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@st.composite
def shapes_with_boxes(draw, count):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    return shape, [draw(boxes_within(shape)) for _ in range(draw(count))]


def indices(shape, box):
    """The flat indices of the box's elements, in row-major order of the box."""
    return np.arange(math.prod(shape)).reshape(shape)[box.slices()].reshape(-1).tolist()


@prove
@given(shapes_with_boxes(st.just(2)))
def test_intersect_is_the_common_elements(drawn):
    shape, (a, b) = drawn
    common = a.intersect(b)
    assert set(indices(shape, common) if common else ()) == set(indices(shape, a)) & set(indices(shape, b))


@prove
@given(shapes_with_boxes(st.just(2)))
def test_subtract_leaves_each_other_element_once(drawn):
    shape, (a, b) = drawn
    rest = [i for box in a.subtract(b) for i in indices(shape, box)]
    assert sorted(rest) == sorted(set(indices(shape, a)) - set(indices(shape, b)))
    assert len(a.subtract(b)) <= max(1, 2 * len(shape))


@prove
@given(shapes_with_boxes(st.integers(0, 5)))
def test_disjoint_covers_each_element_once(drawn):
    shape, boxes = drawn
    covered = [i for box in disjoint(boxes) for i in indices(shape, box)]
    assert sorted(covered) == sorted({i for box in boxes for i in indices(shape, box)})


def test_disjoint_drops_empty_boxes():
    assert disjoint([Box((0, 2), (3, 0)), Box((1, 1), (1, 1))]) == [Box((1, 1), (1, 1))]


@prove
@given(shapes_with_boxes(st.just(1)))
def test_flat_span_is_the_first_and_one_past_the_last(drawn):
    shape, (box,) = drawn
    found = indices(shape, box)
    assert flat_span(shape, box) == (found[0], found[-1] + 1)
    assert is_contiguous(shape, box) == (found == list(range(found[0], found[-1] + 1)))


@prove
@given(st.data(), st.lists(st.integers(1, 6), max_size=4).map(tuple))
def test_boxes_of_range_are_contiguous_and_in_order(data, shape):
    start, stop = sorted(data.draw(st.lists(st.integers(0, math.prod(shape)), min_size=2, max_size=2)))
    boxes = list(boxes_of_range(shape, start, stop))
    assert [i for box in boxes for i in indices(shape, box)] == list(range(start, stop))
    assert all(is_contiguous(shape, box) for box in boxes)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_worked_examples():
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1)
    assert flat_span((4, 6), Box((1, 2), (2, 2))) == (8, 16)
    assert list(boxes_of_range((4, 6), 8, 20)) == [
        Box((1, 2), (1, 4)),
        Box((2, 0), (1, 6)),
        Box((3, 0), (1, 2)),
    ]
    assert whole((2, 3)).slices((0, 1)) == (slice(0, 2), slice(-1, 2))


@prove
@given(st.data())
def test_portions_are_the_box_in_contiguous_pieces_in_order(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    box, most = data.draw(boxes_within(shape)), data.draw(st.integers(1, 20))
    found = list(portions(box, most))
    assert all(part.numel <= most for part in found)
    inside = [Box(tuple(a - b for a, b in zip(part.offsets, box.offsets, strict=True)), part.sizes) for part in found]
    assert all(is_contiguous(box.sizes, part) for part in inside)
    spans = [flat_span(box.sizes, part) for part in inside]
    assert [first for first, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == box.numel
