"""What one rank's model says of all ranks is what each of them builds: on fake groups, under the meshes people use."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from loader.errors import BuilderError
from loader.exchange.group import fake_group
from loader.place.everywhere import Everywhere
from loader.place.state_dict import empty_state_dict
from loader.place.targets import targets_of
from tests.ranks import run_ranks

WORLD = 8


def linears(device="meta"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(10, 13), nn.Linear(13, 7), nn.LayerNorm(7))


def tp_and_hsdp(device="meta"):
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    model = linears(device)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])


def flattened():
    """FSDP over two dims made one, neither of them innermost."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp_shard", "cp", "tp"))
    return fully_shard(linears(), mesh=mesh["dp_shard", "cp"]._flatten("dp_cp"))


def sub_meshes():
    """Dense tensors over all ranks; experts over a mesh of their own, in another order of ranks; some on few ranks."""
    world = init_device_mesh("cpu", (8,), mesh_dim_names=("dp",))
    ranks = torch.arange(8).view(2, 4).t().contiguous()
    experts = DeviceMesh("cpu", ranks, mesh_dim_names=("ep", "replicas"))
    few = DeviceMesh("cpu", [1, 6, 3])
    shapes = {"dense": ((17, 3), torch.float32), "bias": ((3,), torch.bfloat16)}
    state = dict(empty_state_dict(shapes, world, [("dense", {"dp": 0})], "meta"))
    state |= empty_state_dict({"experts": ((5, 4, 6), torch.float32)}, experts["ep"], [("*", {"ep": 0})], "meta")
    state |= empty_state_dict({"columns": ((4, 6), torch.float32)}, experts, [("*", {"ep": 1, "replicas": 0})], "meta")
    shards = {1: 3, 6: 3, 3: 1}  # seven rows over three
    local = torch.empty(shards.get(torch.distributed.get_rank(), 0), device="meta")
    state["few"] = DTensor.from_local(local, few, [Shard(0)], run_check=False, shape=torch.Size([7]), stride=(1,))
    state["plain"] = torch.empty(2, device="meta")
    return state


@pytest.mark.parametrize("build", [tp_and_hsdp, flattened, sub_meshes])
@pytest.mark.parametrize("teller", [0, 5])
def test_one_rank_tells_what_all_hold(build, teller):
    with fake_group(teller, WORLD):
        everywhere = Everywhere.of(build(), WORLD)
    alike = {}
    for rank in range(WORLD):
        with fake_group(rank, WORLD):
            own = Everywhere.of(build(), WORLD)
            real = build()
        assert everywhere.held(rank) == own.held(rank)
        local = [tuple(each.shape) for each in _locals(real)]
        foreseen = [everywhere.target(part, everywhere.coordinate(part, rank)) for part in everywhere.parts]
        assert [tuple(each.tensor.shape) for each in foreseen] == local
        alike.setdefault(repr(everywhere.held(rank)), []).append(rank)
    assert everywhere.alike(range(WORLD)) == list(alike.values())


def _locals(model):
    tensors = model.parameters() if isinstance(model, nn.Module) else model.values()
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _disagreements():
    """Of the world as each real rank sees it, with the targets of all."""
    model = tp_and_hsdp("cpu")
    everywhere = Everywhere.of(model, WORLD)
    own = [(each.names, each.shape, each.dtype, each.boxes) for each in targets_of(model)]
    everyone = [None] * WORLD
    torch.distributed.all_gather_object(everyone, own)
    return [rank for rank in range(WORLD) if everywhere.held(rank) != everyone[rank]]


def test_real_ranks_have_the_targets_that_each_of_them_foresees():
    """Not on fake groups: torch caches meshes that are equal, and so the coordinates of an earlier group's rank."""
    assert run_ranks(WORLD, _disagreements) == [[]] * WORLD


def test_ties_are_one_part():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    with fake_group(0, 4):
        mesh = init_device_mesh("cpu", (4,))
        (part,) = Everywhere.of(fully_shard(model, mesh=mesh), 4).parts
    assert part.names == ("0.weight", "1.weight")


def test_what_cannot_be_filled_is_named():
    with fake_group(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        partial = DTensor.from_local(torch.empty(3, device="meta"), mesh, [Partial()], run_check=False)
        whole = DTensor.from_local(torch.empty(3, device="meta"), mesh, [Replicate()], run_check=False)
        everywhere = Everywhere.of({"whole": whole, "sum": partial}, 2)
    with pytest.raises(BuilderError, match=r"sum: placement Partial"):
        everywhere.held(1)
