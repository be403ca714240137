import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.config import resolve_mesh
from loader.errors import ConfigError


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_a_mesh_that_multiplies_to_the_world_is_kept_and_any_dim_can_be_left_to_fill(sizes, data):
    mesh = {f"dim{i}": size for i, size in enumerate(sizes)}
    world_size = math.prod(sizes)
    filling = data.draw(st.sampled_from([None, *mesh]))
    given_mesh = {name: -1 if name == filling else size for name, size in mesh.items()}
    resolved = resolve_mesh(given_mesh, world_size)
    assert resolved == mesh
    assert list(resolved) == list(mesh)


@given(st.lists(st.sampled_from([-1, 1, 2, 3, 4, 6]), min_size=1, max_size=3), st.integers(1, 24))
def test_every_way_out_that_an_error_names_works(sizes, world_size):
    if sizes.count(-1) > 1:
        return
    mesh = {f"dim{i}": size for i, size in enumerate(sizes)}
    try:
        assert math.prod(resolve_mesh(mesh, world_size).values()) == world_size
    except ConfigError as error:
        ways = error.message.partition(";")[2]
        for world in re.findall(r"\d+(?= or|\d* ranks)", ways):
            resolve_mesh(mesh, int(world))
        for name, size in re.findall(r"mesh\.(\w+)=(\d+)", ways):
            resolve_mesh({**mesh, name: int(size)}, world_size)


def test_a_mesh_that_does_not_fit_names_product_world_and_what_would_fit():
    with pytest.raises(ConfigError) as caught:
        resolve_mesh({"dp_replicate": 2, "dp_shard": 3}, 8)
    assert caught.value.message == (
        "mesh {dp_replicate: 2, dp_shard: 3}: its sizes multiply to 6, but the world size is 8; "
        "start 6 ranks, or set mesh.dp_shard=4"
    )


def test_a_mesh_whose_sizes_do_not_divide_the_world_names_worlds_that_would():
    with pytest.raises(ConfigError) as caught:
        resolve_mesh({"dp_shard": -1, "tp": 3}, 8)
    assert caught.value.message == (
        "mesh {dp_shard: -1, tp: 3}: the sizes given multiply to 3, which does not divide the world size 8; "
        "start 6 or 9 ranks, or set mesh.tp=1"
    )
    assert caught.value.exit_code == 2
