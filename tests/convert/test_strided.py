"""Views of what is stored, pulled back at random boxes, against torch's own strided tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.convert.conversion import apply, visible_keys
from loader.convert.graph import seen_in
from loader.errors import ConversionError
from loader.plan.catalog import Catalog, Entry, File, View
from loader.plan.geometry import Box, whole
from tests.convert.test_pull import fill


def nodes(shape, views):
    """The key "a" of `shape`, and views of it by name."""
    entry = Entry(torch.float32, tuple(shape), 0, 0, torch.Size(shape).numel() * 4)
    return visible_keys(Catalog((File("f", entry.stop, "pin", 0),), {"a": entry}, views), (), "")


@st.composite
def strided(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    room = torch.Size(shape).numel()
    sizes, strides = [], []
    for _ in range(draw(st.integers(0, 4))):
        size = draw(st.integers(1, 5))
        likely = [s for s in (0, 1, 2, shape[-1], 2 * shape[-1]) if (size - 1) * s < room]
        stride = draw(st.sampled_from(likely) | st.integers(0, max(0, (room - 1) // max(1, size - 1))))
        room -= (size - 1) * stride
        sizes.append(size)
        strides.append(stride)
    return shape, View("a", tuple(sizes), draw(st.integers(0, room - 1)), tuple(strides))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(strided(), st.data())
def test_a_view_is_what_torch_makes_of_it(case, data):
    shape, view = case
    stored = torch.arange(float(torch.Size(shape).numel())).view(shape)
    expected = stored.as_strided(view.shape, view.strides, view.offset)
    node = nodes(shape, {"v": view})["v"]
    assert node.shape == view.shape
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in node.shape)
    box = Box(offsets, tuple(data.draw(st.integers(1, s - at)) for s, at in zip(node.shape, offsets, strict=True)))
    found = torch.full(box.sizes, torch.nan)
    fill(node, box, found, [stored])
    assert torch.equal(found, expected[box.slices()])


def test_a_square_that_was_turned_is_not_what_is_stored():
    seen = nodes((3, 3), {"a": View("a", (3, 3), 0, (1, 3))})
    stored = torch.arange(9.0).view(3, 3)
    found = torch.empty(3, 3)
    fill(seen["a"], whole((3, 3)), found, [stored])
    assert torch.equal(found, stored.t())


def test_transposed_and_sliced_tensors_are_single_boxes():
    """However large: no row of them is a piece of its own."""
    shape = (128_256, 8192)
    seen = nodes(shape, {"t": View("a", shape[::-1], 0, (1, 8192)), "columns": View("a", (128_256, 10), 64, (8192, 1))})
    stored = torch.zeros(1).expand(shape)
    for name in ("t", "columns"):
        rows = Box((0, 0), (16, 16) if name == "t" else (128_256, 10))
        assert fill(seen[name], rows, torch.empty(rows.sizes), [stored]) == rows.numel
        assert fill(seen[name], Box((5, 5), (1, 1)), torch.empty(1, 1), [stored]) == 1


def test_names_of_one_tensor_are_one_key_and_other_views_are_keys_of_their_own():
    seen = nodes((4, 6), {"tied": View("a", (4, 6), 0, (6, 1)), "rows": View("a", (2, 6), 6, (6, 1)),
                          "same rows": View("a", (2, 6), 6, (6, 1))})  # fmt: skip
    assert seen["tied"] is seen["a"]
    assert seen["rows"] is seen["same rows"]
    assert [seen_in(node) for node in seen.values()] == [{0}, {0}, {2}, {2}]
    made = apply(lambda keys, _: {"x": keys["rows"].t() + 1}, seen, None)
    assert seen_in(*made.values()) == {2}


def test_a_scattered_view_is_refused_with_its_key():
    with pytest.raises(ConversionError, match=r"key 'v'.*contiguous"):
        nodes((100_003,), {"v": View("a", (50, 101, 7), 0, (1900, 13, 2))})
    assert whole(nodes((4, 6), {})["a"].shape) == Box((0, 0), (4, 6))
