"""The mesh by its names."""

import pytest

from loader.errors import ConfigError
from loader.place.mesh import make_mesh
from tests.ranks import run_ranks


def in_ranks():
    with pytest.raises(ConfigError, match="dp_shard 2 x tp 2 = 4 ranks, but the world has 2"):
        make_mesh({"dp_shard": 2, "tp": 2}, "cpu")
    mesh = make_mesh({"dp_replicate": 2, "dp_shard": 1}, "cpu")
    return mesh.mesh_dim_names, [mesh[name].size() for name in mesh.mesh_dim_names], mesh.get_coordinate()


def test_dims_by_name():
    names = ("dp_replicate", "dp_shard")
    assert run_ranks(2, in_ranks) == [(names, [2, 1], (0, 0)), (names, [2, 1], (1, 0))]


def no_dims():
    return make_mesh({}, "cpu").mesh_dim_names


def test_no_dims_are_one_rank():
    assert run_ranks(1, no_dims) == [("dp_shard",)]
