"""Foreseen demands are those that each rank would make by itself: over random programs, layouts and shared keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from loader.convert.conversion import apply, visible_keys
from loader.convert.graph import form, keys_of
from loader.place.everywhere import Everywhere, Grid, Part
from loader.plan.catalog import Catalog, Entry, File
from loader.stream import foresight as module
from loader.stream.demand import make_demand
from loader.stream.foresight import Foresight
from tests.convert.test_pull import programs

LAYERS = 3
SIZES = (2, 3)
WORLD = 7  # the last rank is on no mesh
PLACEMENTS = st.sampled_from([Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=2)])


def catalog_of(shapes: Mapping[str, tuple[int, ...]]) -> Catalog:
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * 4
        entries[name] = Entry(torch.float32, shape, 0, at, at + size)
        at += size
    return Catalog((File("f", at, "pin", 0),), entries)


def fit(placement: Placement, ndim: int) -> Placement:
    return placement if getattr(placement, "dim", -1) < ndim else Replicate()


def grid() -> Grid:
    coordinates = np.full((WORLD, 2), -1, np.int64)
    coordinates[: math.prod(SIZES)] = np.stack(np.unravel_index(np.arange(math.prod(SIZES)), SIZES), axis=1)
    return Grid(SIZES, coordinates)


def assert_foreseen(
    shapes: Mapping[str, tuple[int, ...]],
    convert: Callable[[Mapping[str, Tensor], object], object],
    placed: Callable[[str], tuple[Placement, ...] | None],
    portion: int,
) -> Foresight:
    catalog = catalog_of(shapes)
    outputs = apply(convert, visible_keys(catalog, (), ""), None)
    parts = []
    for fqn, node in outputs.items():
        placements = placed(fqn)
        mesh = 1 if placements else 0
        parts.append(
            Part((fqn,), node.shape, node.dtype, mesh, tuple(fit(p, len(node.shape)) for p in placements or ()))
        )
    everywhere = Everywhere(tuple(parts), (Grid((), np.zeros((WORLD, 0), np.int64)), grid()))
    found = Foresight(catalog)
    found.add(everywhere, outputs, range(WORLD), range(len(shapes)))
    for rank in range(WORLD):
        targets = [everywhere.target(part, everywhere.coordinate(part, rank)) for part in parts]
        expected, _ = make_demand(targets, outputs, catalog, range(len(shapes)), portion)
        mine = found.ranks[rank]
        assert found.demands[mine.demand].digest == expected.digest
        assert mine.shard_bytes == sum(target.tensor.nbytes for target in targets)
        assert mine.tensors == sum(bool(target.boxes) for target in targets)
    assert len(found.demands) == len({each.digest for each in found.demands.values()})
    return found


@settings(derandomize=True, deadline=None, max_examples=100)
@given(programs(), st.lists(PLACEMENTS, min_size=2, max_size=2), st.sampled_from([1, 3, 1000]))
def test_random_programs_in_every_layer(program, placements, portion):
    sources, run, _ = program

    def convert(checkpoint, _):
        for layer in range(LAYERS):
            mine = [checkpoint[f"{layer}.{n}"] for n in range(len(sources))]
            yield f"{layer}.made", run(*mine)
            yield f"{layer}.kept", mine[0]  # the same key again, on another layout

    shapes = {f"{layer}.{n}": tuple(s.shape) for layer in range(LAYERS) for n, s in enumerate(sources)}
    layouts = {"made": tuple(placements), "kept": (Shard(0), Replicate())}
    assert_foreseen(shapes, convert, lambda fqn: layouts[fqn.partition(".")[2]], portion)


def test_split_stacked_tied_and_plain_tensors():
    """A fused key split, experts stacked, one key under two names and layouts, and what every rank holds whole."""

    def convert(checkpoint, _):
        for layer in range(LAYERS):
            for name in "xy" if layer % 2 else "yx":  # overlapping boxes of a key, found in either order
                yield f"{layer}.{name}", checkpoint[f"{layer}.twice"]
            for name, part in zip("qkv", checkpoint[f"{layer}.qkv"].split([6, 3, 3]), strict=True):
                yield f"{layer}.{name}", part
            yield f"{layer}.experts", torch.stack([checkpoint[f"{layer}.{e}"] for e in range(4)]).transpose(1, 2)
            yield f"{layer}.norm", checkpoint[f"{layer}.norm"] + 1
        yield "embed", checkpoint["embed"]
        yield "head", checkpoint["embed"].t()

    shapes: dict[str, tuple[int, ...]] = {"embed": (11, 5), "unused": (3,)}
    for layer in range(LAYERS):
        shapes |= {
            f"{layer}.twice": (6, 6),
            f"{layer}.qkv": (12, 5),
            f"{layer}.norm": (5,),
            **{f"{layer}.{e}": (7, 5) for e in range(4)},
        }
    layouts = {
        "x": (Shard(0), Replicate()),
        "y": (Replicate(), Shard(1)),
        "norm": None,
        "experts": (Shard(0), Shard(2)),
        "head": (Replicate(), Shard(0)),
    }
    found = assert_foreseen(
        shapes, convert, lambda fqn: layouts.get(fqn.rpartition(".")[2], (Shard(0), Shard(1))), 1000
    )
    unused = list(shapes).index("unused")
    assert {each.unused for each in found.demands.values()} == {frozenset({unused})}


def test_the_work_does_not_grow_with_layers_or_replicas(monkeypatch):
    """One pull-back for each kind of tensor and each distinct coordinate of its own."""
    pulled = []
    pull = module.pull_target
    monkeypatch.setattr(module, "pull_target", lambda target, *rest: pulled.append(target.fqn) or pull(target, *rest))
    shapes = {f"{layer}.{name}": (6, 6) for layer in range(50) for name in "ab"}
    layouts = {"a": (Replicate(), Shard(0)), "b": (Shard(0), Shard(1))}
    assert_foreseen(shapes, lambda c, _: dict(c), lambda fqn: layouts[fqn.partition(".")[2]], 1000)
    assert sorted(pulled) == ["0.a"] * (3 + 1) + ["0.b"] * (6 + 1)  # and none, of the rank that is on no mesh


def test_forms_tell_apart_what_moves_data_otherwise():
    catalog = catalog_of({"a": (4, 4), "b": (4, 4), "c": (4,)})

    def convert(checkpoint, _):
        a, b, c = checkpoint["a"], checkpoint["b"], checkpoint["c"]
        yield from {
            "a": a, "b": b, "a twice": torch.cat([a, a]), "a and b": torch.cat([a, b]), "b and a": torch.cat([b, a]),
            "across": torch.cat([a, b], 1), "t": a.t(), "first": a[:2], "second": a[2:], "c": c, "a + 1": a + 1,
            "b * 2": b * 2, "taken": a[torch.tensor([1, 0])], "others": a[torch.tensor([1, 2])],
        }.items()  # fmt: skip

    outputs = apply(convert, visible_keys(catalog, (), ""), None)
    alike: dict[object, list[str]] = {}
    for fqn, node in outputs.items():
        kind, keys = form(node)
        assert sorted(keys) == sorted(keys_of(node))
        alike.setdefault(kind, []).append(fqn)
    assert sorted(names for names in alike.values() if len(names) > 1) == [
        ["a", "b"],
        ["a + 1", "b * 2"],
        ["a and b", "b and a"],
    ]
    assert form(outputs["b and a"])[1] == (1, 0)
