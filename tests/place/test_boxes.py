"""Boxes of a shard, against torch's own splitting and against real DTensors."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard, empty
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from loader.errors import BuilderError
from loader.place.boxes import shard_boxes, shard_shape
from loader.place.mesh import make_mesh
from loader.plan.geometry import Box


def replay(shape, mesh_shape, coordinate, placements):
    """The local shard as torch's own splitting leaves it, of a tensor that holds its flat indices."""
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    for ranks, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if not isinstance(placement, Replicate):
            tensor = placement._split_tensor(tensor, ranks, with_padding=False)[0][rank]
    return tensor


def fill(shape, mesh_shape, coordinate, placements):
    """The local shard as its boxes say; -1 where no box writes."""
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    local = torch.full(shard_shape(shape, mesh_shape, coordinate, placements), -1)
    for box, offsets in shard_boxes(shape, mesh_shape, coordinate, placements):
        local[Box(offsets, box.sizes).slices()] = full[box.slices()]
    return local


@st.composite
def layouts(draw):
    shape = draw(st.lists(st.integers(0, 13), max_size=3))
    mesh_shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dims = st.integers(0, len(shape) - 1)
    shards = [st.builds(Shard, dims), st.builds(lambda d, f: _StridedShard(d, split_factor=f), dims, st.integers(1, 4))]
    placement = st.one_of(st.just(Replicate()), *(shards if shape else []))
    return shape, mesh_shape, [draw(placement) for _ in mesh_shape]


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_boxes_are_what_torch_splits(layout):
    shape, mesh_shape, placements = layout
    for coordinate in itertools.product(*map(range, mesh_shape)):
        expected = replay(shape, mesh_shape, coordinate, placements)
        assert torch.equal(fill(shape, mesh_shape, coordinate, placements), expected)


def test_strided_shard_is_several_boxes():
    assert shard_boxes((8,), (2,), (0,), [_StridedShard(0, split_factor=2)]) == [
        (Box((0,), (2,)), (0,)),
        (Box((4,), (2,)), (2,)),
    ]


def test_neighbours_are_one_box():
    """FSDP over TP: the strided shard and the shard undo each other."""
    assert shard_boxes((8, 3), (2, 2), (1, 0), [_StridedShard(0, split_factor=2), Shard(0)]) == [
        (Box((2, 0), (2, 3)), (0, 0))
    ]


def test_scalars_and_empties():
    assert shard_boxes((), (4,), (3,), [Replicate()]) == [(Box((), ()), ())]
    assert shard_boxes((0, 5), (4,), (0,), [Shard(1)]) == []
    assert shard_boxes((3, 5), (4,), (3,), [Shard(0)]) == []


def test_partial_is_refused():
    with pytest.raises(BuilderError, match="Partial"):
        shard_boxes((4,), (2,), (0,), [Partial()])


@pytest.mark.parametrize("rank", [0, 5, 11])
def test_local_shapes_of_real_dtensors(rank):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=12)
    try:
        mesh = make_mesh({"dp_replicate": 2, "dp_shard": 3, "tp": 2}, "cpu")
        for placements in itertools.product([Replicate(), Shard(0), Shard(1)], repeat=3):
            tensor = empty(7, 5, device_mesh=mesh, placements=placements)
            assert shard_shape((7, 5), mesh.shape, mesh.get_coordinate(), placements) == tensor.to_local().shape
    finally:
        dist.destroy_process_group()
