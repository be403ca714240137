"""What may be read straight into a shard: where it lands so, it lands as it does by a copy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from loader.convert.graph import Key, Map, Node, Permute
from loader.place.landing import Landings
from loader.plan.geometry import Box, boxes_of_range, whole
from loader.stream.buffers import joined
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard, write_file

SHAPE = (4, 3, 5)
KEY = Key(SHAPE, torch.float32, 0)
PORTION = 1 << 20
"""Elements; of no matter here."""


def landings(node: Node, box: Box, view: Tensor) -> Landings:
    found = Landings(PORTION)
    found.add(node, box, view)
    found.fill()
    return found


class Own(Tensor):
    """Its memory may be anything."""


@st.composite
def windows(draw: Any) -> tuple[Box, int, int]:
    """A box of the key that a shard holds, and a run of the key's elements, `[first, stop)`, that arrives."""
    cuts = [sorted(draw(st.sampled_from([(a, b) for b in range(1, n + 1) for a in range(b)]))) for n in SHAPE]
    box = Box(tuple(a for a, _ in cuts), tuple(b - a for a, b in cuts))
    first = draw(st.integers(0, math.prod(SHAPE) - 1))
    return box, first, draw(st.integers(first + 1, math.prod(SHAPE)))


@given(windows(), st.booleans())
def test_what_is_written_straight_is_what_a_copy_writes(window, spread):
    """`spread`: the shard's rows do not stand one behind the other."""
    held, first, stop = window
    elements = torch.arange(math.prod(SHAPE), dtype=torch.float32)
    both = [torch.full((*held.sizes[:-1], held.sizes[-1] + spread), -1.0)[..., : held.sizes[-1]] for _ in range(2)]
    copied, read = (landings(KEY, held, view) for view in both)
    straight, at = 0, first
    for box in boxes_of_range(SHAPE, first, stop):
        values = elements[at : at + box.numel]
        at += box.numel
        if (memory := read.straight(0, box, torch.float32)) is not None:
            straight += box.numel
            memory.copy_(values.view(torch.uint8))
            read.arrived(memory.numel())
            copied.land(0, box, values.view(box.sizes))
    assert torch.equal(*both)
    assert read.landed_bytes == copied.landed_bytes == 4 * straight
    if held == whole(SHAPE) and not spread:
        assert straight == stop - first


@pytest.mark.parametrize(
    ("node", "view"),
    [
        (KEY, torch.zeros(SHAPE, dtype=torch.float64)),
        (KEY, torch.zeros(SHAPE, dtype=torch.int32)),
        (KEY, torch.zeros(SHAPE, device="meta")),
        (KEY, torch.zeros(SHAPE).as_subclass(Own)),
        (KEY, torch.zeros(SHAPE)._neg_view()),
        (KEY, torch.zeros(4, 5, 3).transpose(1, 2)),
        (Permute((4, 5, 3), torch.float32, KEY, (0, 2, 1)), torch.zeros(4, 5, 3)),
        (Map(SHAPE, torch.float32, KEY, torch.neg), torch.zeros(SHAPE)),
    ],
    ids=[
        "a cast",
        "bits of another kind",
        "a device",
        "a subclass",
        "a negative",
        "columns first",
        "transposed",
        "computed",
    ],
)
def test_what_is_not_as_it_is_in_the_file_is_copied(node, view):
    assert landings(node, whole(node.shape), view).straight(0, whole(SHAPE), torch.float32) is None


def test_what_goes_to_two_places_is_copied():
    found = Landings(PORTION)
    for _ in range(2):
        found.add(KEY, whole(SHAPE), torch.zeros(SHAPE))
    found.fill()
    assert found.straight(0, whole(SHAPE), torch.float32) is None


def test_runs_are_one_where_one_follows_the_other():
    memory = torch.arange(100, dtype=torch.uint8)
    assert torch.equal(joined([memory[10:20], memory[20:21], memory[21:50]]), memory[10:50])
    assert joined([memory[10:20], memory[21:50]]) is None
    assert joined([memory[20:30], memory[10:20]]) is None
    assert joined([memory[10:20], memory.clone()[20:30]]) is None


def _full() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"w": (512, 1024), "a": (300, 1024), "b": (212, 1024), "norm": (1024,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def _load(uri: str, options: Any) -> tuple[list[str], int]:
    """Rows, two matrices' rows in one parameter, and a norm that all ranks need; and how often something was copied."""
    mesh, full = init_device_mesh("cpu", (2,)), _full()
    made = {"w": full["w"], "ab": torch.cat([full["a"], full["b"]]), "norm": full["norm"]}
    expected = {key: shard(each, mesh, [Replicate() if key == "norm" else Shard(0)]) for key, each in made.items()}
    state = {key: blank(each) for key, each in expected.items()}
    copies, land = [0], Landings.land

    def counted(self: Landings, *args: Any) -> None:
        copies[0] += 1
        land(self, *args)

    Landings.land = counted

    def convert(keys: Any, _: Any) -> Any:
        return {"w": keys["w"], "ab": torch.cat([keys["a"], keys["b"]]), "norm": keys["norm"]}

    loader.load(state, uri, storage_options=options, convert=convert, range_size="64KiB")
    return differences(state, expected), copies[0]


def test_rows_are_read_into_the_shards_themselves(s3, tmp_path):
    """But for the norm, and what stands in one range with it."""
    write_file(tmp_path / "model.safetensors", _full())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for wrong, copies in run_ranks(2, _load, s3.put(tmp_path), s3.storage_options):
        assert wrong == []
        assert copies <= 2
