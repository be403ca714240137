"""State dicts by placement rules, against distribute_tensor."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from loader.errors import ConfigError
from loader.place.mesh import make_mesh
from loader.place.state_dict import empty_state_dict
from tests.ranks import run_ranks

TENSORS = {
    "layers.0.weight": ((7, 6), torch.bfloat16),
    "layers.0.norm": ((5,), torch.float32),
    "head": ((3, 5), torch.float32),
    "scale": ((), torch.float64),
    "none": ((0, 2), torch.int8),
}
RULES = [("*.norm", {}), ("layers.*", {"tp": 0, "dp_shard": 0}), ("head", {"dp_shard": 0, "tp": -1}), ("h*", {"tp": 9})]
EXPECTED = {
    "layers.0.weight": (Shard(0), Shard(0)),
    "layers.0.norm": (Replicate(), Replicate()),
    "head": (Shard(0), Shard(1)),
    "scale": (Replicate(), Replicate()),
    "none": (Replicate(), Replicate()),
}


def in_ranks():
    mesh = make_mesh({"dp_shard": 2, "tp": 2}, "cpu")
    state = empty_state_dict(TENSORS, mesh, RULES, "cpu")
    assert list(state) == list(TENSORS)
    for fqn, (shape, dtype) in TENSORS.items():
        expected = distribute_tensor(torch.ones(shape, dtype=dtype), mesh, EXPECTED[fqn])
        ours = state[fqn]
        ours.to_local().fill_(1)
        assert ours.placements == expected.placements
        assert ours.to_local().shape == expected.to_local().shape
        assert (ours.shape, ours.stride(), ours.dtype) == (expected.shape, expected.stride(), dtype)
        assert torch.equal(ours.full_tensor(), expected.full_tensor())
    messages = []
    for rule in ("head", {"pp": 0}), ("head", {"tp": 2}), ("scale", {"tp": 0}):
        with pytest.raises(ConfigError) as caught:
            empty_state_dict(TENSORS, mesh, [rule], "cpu")
        messages.append(str(caught.value))
    return messages


def test_it_is_what_distribute_tensor_makes():
    messages = run_ranks(4, in_ranks)[0]
    assert "rule 'head' for head of shape [3, 5]: no mesh dim 'pp'; the mesh has dp_shard, tp" in messages[0]
    assert "cannot shard dim 2 of 2 over tp" in messages[1]
    assert "rule 'scale' for scale of shape []: cannot shard dim 0 of 0" in messages[2]
