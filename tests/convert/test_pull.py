"""Random programs over the op table, pulled back at random boxes, against slicing what torch itself computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loader.convert.conversion import Checkpoint, visible_keys
from loader.convert.graph import Node
from loader.convert.lazy import trace
from loader.convert.pull import Fill, Join, Move, pull_back
from loader.errors import BuilderError, ConversionError, CoverageError
from loader.plan.catalog import Catalog, Entry, File
from loader.plan.geometry import Box, whole


def checkpoint(tensors: dict[str, Tensor]) -> Checkpoint:
    entries, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), 0, at, at + size)
        at += size
    return Checkpoint(visible_keys(Catalog((File("f", at, "pin", 0),), entries), (), ""))


def fill(node: Node, box: Box, view: Tensor, sources: Sequence[Tensor]) -> int:
    """Fill `view` as a rank does; returns how many elements of keys it took."""
    taken = 0
    for found in pull_back(node, box, view):
        if isinstance(found, Fill):
            found.view.copy_(found.values)
        elif isinstance(found, Move):
            values = sources[found.key][found.box.slices()]
            for each in found.maps:
                values = each(values)
            found.view.copy_(values)
            taken += found.box.numel
        elif isinstance(found, Join):
            regions, run = found.node.over(found.box)
            parts = [torch.empty(r.sizes, dtype=part.dtype) for part, r in zip(found.node.parts, regions, strict=True)]
            for part, region, into in zip(found.node.parts, regions, parts, strict=True):
                taken += fill(part, region, into, sources)
            values = run(*parts)
            for each in found.maps:
                values = each(values)
            found.view.copy_(values)
    return taken


def split_of(size: int, draw: st.DrawFn) -> tuple[int, int]:
    return draw(st.sampled_from([(d, size // d) for d in range(1, size + 1) if size % d == 0]))


def step(draw: st.DrawFn, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """One op that fits `x`; `y` is the second source, of any shape."""
    ops: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda a, _: a.clone(),
        lambda a, _: a.unsqueeze(0).squeeze(0),
        lambda a, _: a.reshape(-1),
        lambda a, _: a + 1.0,
        lambda a, _: 2 - a * 0.5,
        lambda a, _: -a,
        lambda a, _: a.to(torch.bfloat16).to(torch.float32),
        lambda a, _: a + a * 2,
        lambda a, b: torch.cat([a.flatten(), b.flatten()]),
        lambda a, _: a.exp(),
        lambda a, _: torch.stack([a, a + 1], dim=-1),
    ]
    if x.ndim:
        dim = draw(st.integers(0, x.ndim - 1))
        size = x.shape[dim]
        outer, inner = split_of(size, draw)
        start = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, size - start))
        order = draw(st.permutations(range(x.ndim)))
        index = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
        other = draw(st.integers(0, x.ndim - 1))
        pad = draw(st.lists(st.integers(-1 if size > 3 else 0, 2), min_size=2, max_size=2))
        ops += [
            lambda a, _: a.permute(order),
            lambda a, _: a.transpose(dim, other).contiguous(),
            lambda a, _: a.unflatten(dim, (outer, inner)),
            lambda a, _: a.unflatten(dim, (outer, inner)).transpose(dim, dim + 1).flatten(dim, dim + 1),
            lambda a, _: a.narrow(dim, start, length),
            lambda a, _: a.select(dim, start),
            lambda a, _: torch.cat([a, a], dim),
            lambda a, _: torch.cat(list(a.split(max(1, size // 2), dim))[::-1], dim),
            lambda a, _: torch.cat(list(a.chunk(2, dim))[::-1], dim),
            lambda a, _: torch.stack(list(a.unbind(dim)), dim),
            lambda a, _: a.index_select(dim, torch.tensor(index)),
            lambda a, _: a.flip(dim),
            lambda a, _: a.unsqueeze(dim).expand(*a.shape[:dim], 2, *a.shape[dim:]),
            lambda a, _: a.repeat_interleave(2, dim),
            lambda a, _: a.movedim(dim, 0),
            lambda a, _: a.repeat(*([2] * a.ndim)) if a.ndim < 4 else a,
            lambda a, _: torch.nn.functional.pad(a, [0, 0] * (a.ndim - 1 - dim) + pad, value=3.0),
            lambda a, _: torch.cat([a, torch.arange(a.numel(), dtype=a.dtype).view(a.shape)], dim),
        ]
    return draw(st.sampled_from(ops))


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Tensor], Callable[[Tensor, Tensor], Tensor], Tensor]:
    shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)
    sources = [torch.randn(draw(shapes), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    steps: list[Callable[[Tensor, Tensor], Tensor]] = []
    value = sources[0]
    for _ in range(draw(st.integers(1, 5))):
        if value.numel() > 4000 or not value.numel() or value.ndim > 5:
            break
        steps.append(step(draw, value, sources[1]))
        value = steps[-1](value, sources[1])

    def run(a: Tensor, b: Tensor) -> Tensor:
        for each in steps:
            a = each(a, b)
        return a

    return sources, run, value


@settings(max_examples=300, derandomize=True, deadline=None)
@given(programs(), st.data())
def test_pulled_back_boxes_equal_slices_of_what_torch_computes(program, data) -> None:
    sources, run, expected = program

    def convert(keys, _):
        yield "out", run(keys["a"], keys["b"])

    try:
        node = trace(convert, checkpoint(dict(zip("ab", sources, strict=True))), None)["out"]
    except ConversionError as error:
        pytest.fail(str(error))
    assert (node.shape, node.dtype) == (tuple(expected.shape), expected.dtype)
    if not expected.numel():
        return
    offsets = [data.draw(st.integers(0, size - 1)) for size in node.shape]
    sizes = [data.draw(st.integers(1, size - at)) for size, at in zip(node.shape, offsets, strict=True)]
    box = Box(tuple(offsets), tuple(sizes))
    view = torch.full(box.sizes, torch.nan, dtype=node.dtype)
    fill(node, box, view, sources)
    assert torch.equal(view, expected[box.slices()])


def test_what_only_moves_data_takes_each_element_once() -> None:
    a = torch.randn(24, 6)

    def convert(keys, _):
        rotary = keys["a"].view(4, 2, 3, 6).transpose(1, 2).reshape(24, 6)
        yield "out", torch.stack([rotary, rotary.flip(0)]).transpose(1, 2)

    node = trace(convert, checkpoint({"a": a}), None)["out"]
    for box in (whole(node.shape), Box((0, 2, 5), (2, 3, 7)), Box((1, 0, 0), (1, 6, 24))):
        assert fill(node, box, torch.empty(box.sizes), [a]) == math.prod(box.sizes)


def of_a_view(keys, _):
    part = keys["a"][:2]
    part.mul_(2)
    yield "x", keys["a"]


def in_two_steps(keys, _):
    yield "w", keys["b"]
    yield "x", keys["a"] if torch.equal(keys["a"], keys["a"]) else keys["b"]


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda c, _: {"x": c["a"].relu()}, ["x: aten.relu", "'a'", "Write it with these"]),
        (lambda c, _: {"w": c["b"], "x": c["a"].sort(0)[0].t() + 1}, ["x: aten.sort", "'a'", "Write it with these"]),
        (lambda c, _: {"x": c["a"][c["b"].long()]}, ["x: aten.index", "'a' [4, 6]", "without reading the checkpoint"]),
        (lambda c, _: {"x": c["a"].add_(1)}, ["x: aten.add_", "'a'", "in-place", "`x = x.add(...)`"]),
        (lambda c, _: {"w": c["b"], "x": c["a"].mul_(2).t() + 1}, ["x: aten.mul_", "'a'", "in-place"]),
        (of_a_view, ["aten.mul_", "'a'", "in-place"]),
        (in_two_steps, ["equal", "'a'", "look at values", "(after it made w)"]),
        (lambda c, _: {"x": torch.empty(9, 6)[:4].copy_(c["a"])}, ["in-place", "torch.cat or torch.stack"]),
        (lambda c, _: {"x": c["a"] if float(c["a"][0, 0]) > 0 else None}, ["look at values", "'a'"]),
        (lambda c, _: {"x": torch.tensor(c["a"].tolist())}, ["look at values"]),
        (lambda c, _: {"x": c["a"].numpy()}, ["look at values"]),
        (lambda c, _: {"x": c["aa"]}, ["'aa'", "nearest", "a"]),
        (lambda c, _: [("x", c["a"]), ("x", c["b"])], ["x twice"]),
        (lambda c, _: {"y": c["b"], "x": 3}, ["x a int"]),
        (lambda c, _: {"x": c["a"].view(5, 5)}, ["aten.view", "'a' [4, 6]", "shape"]),
        (lambda c, _: {"x": torch.cat([c["a"], c["a"], c["b"]])}, ["aten.cat", "'a' [4, 6] and 'b' [2]"]),
        (lambda c, cfg: {"x": cfg.missing}, ["AttributeError", "missing"]),
    ],
)
def test_what_cannot_be_traced_is_told_with_the_remedy(convert, words) -> None:
    with pytest.raises(ConversionError) as error:
        trace(convert, checkpoint({"a": torch.randn(4, 6), "b": torch.randn(2)}), None)
    for word in words:
        assert word in str(error.value)


def test_what_is_not_used_may_be_done_with_any_op() -> None:
    def convert(keys, _):
        keys["a"].sort(0)
        yield "x", keys["b"]

    assert list(trace(convert, checkpoint({"a": torch.randn(4, 6), "b": torch.randn(2)}), None)) == ["x"]


@pytest.mark.parametrize("error", [BuilderError, CoverageError])
def test_an_error_of_the_conversions_own_stays_what_it_is(error) -> None:
    def convert(keys, _):
        raise error("not so")

    with pytest.raises(error, match="not so"):
        trace(convert, checkpoint({"a": torch.randn(4, 6)}), None)
