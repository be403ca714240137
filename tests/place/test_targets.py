"""What a module or a state dict asks to be filled: names, ties, local views, boxes, refusals."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from loader.errors import BuilderError
from loader.place.materialise import materialise
from loader.place.targets import targets_of
from loader.plan.geometry import Box
from tests.ranks import run_ranks


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, dtype=torch.int8))
        self.register_buffer("temporary", torch.zeros(3), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("nothing", None)
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 4))


def test_parameters_and_persistent_buffers():
    model = nn.ModuleDict({"a": Buffers(), "b": nn.Linear(3, 2)})
    targets = {target.fqn: target for target in targets_of(model)}
    assert list(targets) == ["a.scalar", "a.empty", "a.kept", "b.weight", "b.bias"]
    assert set(targets) == set(model.state_dict())
    assert targets["a.scalar"].boxes == ((Box((), ()), ()),)
    assert targets["a.empty"].boxes == ()
    assert targets["a.kept"].dtype == torch.int8
    assert targets["b.weight"].boxes == ((Box((0, 0), (2, 3)), (0, 0)),)


def test_writes_reach_the_parameter():
    model = nn.Linear(3, 2)
    for target in targets_of(model):
        target.tensor.fill_(5)
    assert (model.weight == 5).all()
    assert model.weight.requires_grad


def test_tied_parameters_are_one_target_in_a_module_and_in_its_state_dict():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    for source in (model, model.state_dict()):
        (target,) = targets_of(source)
        assert target.names == ("embed.weight", "head.weight")


def test_views_of_one_storage_are_not_ties():
    flat = torch.zeros(8)
    assert [target.names for target in targets_of({"a": flat[:4], "b": flat[4:]})] == [("a",), ("b",)]


def test_wrappers_leave_no_trace_in_names():
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2, bias=False)), torch.compile(nn.Linear(2, 2, bias=False)))
    assert [target.fqn for target in targets_of(torch.compile(model))] == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(3, device="meta"), "x is on the meta device.*to_empty"),
        (torch.zeros(1).expand(4), "x is an expanded view.*contiguous"),
        (nn.parameter.UninitializedParameter(), "x has no shape yet"),
        (torch.eye(3).to_sparse(), "x: .*sparse"),
        ({"y": torch.zeros(1)}, "x: expected a tensor, found dict"),
    ],
)
def test_what_cannot_be_filled(tensor, message):
    with pytest.raises(BuilderError, match=message):
        targets_of({"x": tensor})


def in_ranks():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    full = torch.arange(15.0).view(5, 3)

    ddp = DistributedDataParallel(nn.Linear(3, 2))
    assert [target.fqn for target in targets_of(ddp)] == ["weight", "bias"]

    # Uneven and padded: 5 rows are 3 and 2, one row is 1 and 0.
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    materialise(fully_shard(model, mesh=mesh), "cpu")
    weight, _, row, _ = targets_of(model)
    for box, offsets in weight.boxes:
        weight.tensor[Box(offsets, box.sizes).slices()] = full[box.slices()]
    row.tensor.fill_(2)
    assert torch.equal(model[0].weight.full_tensor(), full)
    assert (model[1].weight.full_tensor() == 2).all()
    model.unshard()
    assert torch.equal(model[0].weight, full)
    model.reshard()

    # A mesh that this rank may not be part of, and empty shards that are tied.
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))["dp"]
    stage = DTensor.from_local(torch.zeros(4), alone, [Shard(0)], run_check=False)
    other = DTensor.from_local(torch.zeros(4), dist.device_mesh.DeviceMesh("cpu", [0]), [Replicate()], run_check=False)
    one = distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])
    partial = DTensor.from_local(torch.zeros(4), mesh, [Partial()], run_check=False)
    with pytest.raises(BuilderError, match="p: placement Partial"):
        targets_of({"p": partial})
    targets = targets_of({"stage": stage, "other": other, "one": one, "again": one.detach()})
    return len(weight.boxes), len(row.boxes), [(target.names, len(target.boxes)) for target in targets]


def test_sharded_modules():
    names = [("stage",), ("other",), ("one", "again")]
    assert run_ranks(2, in_ranks) == [
        (1, 1, list(zip(names, [1, 1, 1], strict=True))),
        (1, 0, list(zip(names, [1, 0, 0], strict=True))),
    ]
