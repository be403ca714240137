"""`verify: fingerprint` on real ranks: the same for every mesh, and what is wrong in what landed is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import loader
from loader import job
from loader.errors import ConfigError, CorruptionError, FingerprintError
from tests.checkpoints import random_tensor
from tests.processes import python_path
from tests.ranks import run_ranks
from tests.shards import DTYPES, blank, local, shard, write_file

R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)

LAYOUTS = {
    1: [((1,), [ROWS])],
    2: [((2,), [ROWS]), ((2,), [COLUMNS]), ((2,), [R])],
    4: [
        ((4,), [ROWS]),
        ((2, 2), [R, ROWS]),
        ((4,), [COLUMNS]),
        ((2, 2), [ROWS, COLUMNS]),
        ((2, 2), [_StridedShard(0, split_factor=2), ROWS]),
        ((4,), [_StridedShard(0, split_factor=3)]),
        ((4,), [R]),
    ],
}


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"odd": (13, 7), "few rows": (3, 5), "vector": (11,), "scalar": (), "empty": (0, 4), "experts": (5, 6, 7)}
    made = {name: random_tensor(torch.bfloat16, shape, generator) for name, shape in shapes.items()}
    return made | {f"a {name}": random_tensor(dtype, (9, 6), generator) for name, dtype in DTYPES.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_file(directory / "model.safetensors", _tensors())
    return str(directory)


def _load_each(uri: str, share: str) -> list[str]:
    found = []
    for sizes, placements in LAYOUTS[dist.get_world_size()]:
        mesh = init_device_mesh("cpu", sizes)
        state = {key: blank(shard(tensor, mesh, placements)) for key, tensor in _tensors().items()}
        found.append(loader.load(state, uri, verify="fingerprint", share=share).fingerprint)
        assert found[-1] == loader.fingerprint(state)
    return found


@pytest.mark.parametrize(("ranks", "share"), [(1, "world"), (2, "world"), (4, "world"), (4, "node"), (4, "none")])
def test_it_is_the_same_for_every_mesh_world_size_and_share(checkpoint, ranks, share):
    found = run_ranks(ranks, _load_each, checkpoint, share, nodes=2 if share == "node" else 1)
    assert {each for rank in found for each in rank} == {loader.fingerprint(_tensors())}


def _load_stages(uri: str) -> str | None:
    """Two stages of two ranks; one tensor on both, one on odd ranks alone, one whole here and in parts there."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    rank = dist.get_rank()
    tensors = _tensors()
    mine = list(tensors)[rank // 2 :: 2]
    places: dict[str, tuple[DeviceMesh, list]] = {key: (grid["dp"], [ROWS]) for key in [*mine, "odd"]}
    places["vector"] = (DeviceMesh("cpu", [1, 3]), [ROWS])
    state = {key: blank(shard(tensors[key], *place)) for key, place in places.items()}
    if rank == 2:
        state["experts"] = torch.zeros_like(tensors["experts"])
    return loader.load(state, uri, verify="fingerprint").fingerprint


def test_stages_and_what_is_whole_on_one_rank_and_sharded_on_others(checkpoint):
    assert set(run_ranks(4, _load_stages, checkpoint)) == {loader.fingerprint(_tensors())}


class Tied(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(51, 10)
        self.head = nn.Linear(10, 51, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        if tied:
            self.head.weight = self.embed.weight


def _fsdp_of_tied() -> str:
    torch.manual_seed(0)
    return loader.fingerprint(fully_shard(Tied(), mesh=init_device_mesh("cpu", (dist.get_world_size(),))))


def test_a_tied_tensor_counts_under_each_of_its_names_and_a_scratch_buffer_under_none():
    torch.manual_seed(0)
    model = Tied()
    expected = loader.fingerprint(model)
    assert set(run_ranks(2, _fsdp_of_tied)) == {expected}
    assert loader.fingerprint({fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}) == expected
    untied = Tied(tied=False)
    untied.load_state_dict(model.state_dict())
    assert loader.fingerprint(untied) == expected
    model.scratch += 1
    assert loader.fingerprint(model) == expected
    model.scale += 1
    assert loader.fingerprint(model) != expected


def test_it_is_of_what_landed_after_the_cast(tmp_path):
    weight = torch.randn(5, 7)
    write_file(tmp_path / "model.safetensors", {"weight": weight})
    report = loader.load({"weight": torch.empty(5, 7, dtype=torch.bfloat16)}, str(tmp_path), verify="fingerprint")
    assert report.fingerprint == loader.fingerprint({"weight": weight.bfloat16()}) != loader.fingerprint({"w": weight})
    assert f"verified  fingerprint {report.fingerprint}" in report.table()
    assert loader.load({"weight": weight}, str(tmp_path)).fingerprint is None


# ---------------------------------------------------------------- what is wrong


def _flip(tensor: Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[3] ^= 0x10


def _load_with_a_flip(uri: str, ranks: list[int], expect: str | None) -> None:
    """HSDP, where a bit of "odd" flips on `ranks` once the last byte has landed."""
    mesh = init_device_mesh("cpu", (2, 2))
    state = {key: blank(shard(tensor, mesh, [R, ROWS])) for key, tensor in _tensors().items()}
    agree = job.agree_on_fingerprint

    def flipped(control, targets):
        if dist.get_rank() in ranks:
            _flip(local(state["odd"]))
        return agree(control, targets)

    job.agree_on_fingerprint = flipped
    loader.load(state, uri, verify="fingerprint", expect=expect)


def test_a_bit_that_flips_in_one_replica_is_told_on_every_rank_with_fqn_and_ranks(checkpoint):
    found = run_ranks(4, _load_with_a_flip, checkpoint, [3], None, outcomes=True)
    assert [type(each.error) for each in found] == [CorruptionError] * 4, found
    for each in found:
        assert re.search(
            r"odd \(offsets \[7, 0\], sizes \[6, 7\]\) is one thing on rank 1 and another on rank 3", str(each.error)
        )
        assert "few rows" not in str(each.error)
        assert each.error.exit_code == 1


def test_a_bit_that_flips_in_every_replica_is_another_fingerprint_than_expected(checkpoint):
    expected = loader.fingerprint(_tensors())
    found = run_ranks(4, _load_with_a_flip, checkpoint, [1, 3], expected, outcomes=True)
    assert [type(each.error) for each in found] == [FingerprintError] * 4, found
    assert all(expected in str(each.error) and each.error.exit_code == 2 for each in found)
    assert run_ranks(4, _load_with_a_flip, checkpoint, [], expected.upper()) == [None] * 4


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        ({"verify": "fingerprint", "expect": "123"}, 'expect: should be "f1" and 16 hex digits'),
        ({"expect": "f10123456789abcdef"}, "expect: has no fingerprint to be compared with"),
        ({"verify": "finger"}, "verify: should be"),
    ],
)
def test_what_cannot_be_verified_is_refused(checkpoint, proof: Mapping, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        loader.load(_tensors(), checkpoint, **proof)


def write_handed_on(model: Mapping[str, Tensor], mesh: object, report: object) -> None:
    Path("handed-on").touch()


@pytest.mark.parametrize("expected", [True, False])
def test_the_command_hands_on_what_has_the_fingerprint_that_was_expected_alone(checkpoint, tmp_path, expected):
    wanted = loader.fingerprint(_tensors()) if expected else "f10123456789abcdef"
    config = {
        "source": {"uri": checkpoint},
        "model": {"builder": None, "device": "cpu"},
        "output": {"entrypoint": "tests.test_fingerprint:write_handed_on", "checkpoint": "saved"},
        "verify": "fingerprint",
        "expect": wanted,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "loader.init_from_hf", "--config", "config.yaml"]
    environ = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environ)
    made = {path.name for path in tmp_path.iterdir()} - {"config.yaml"}
    if expected:
        assert done.returncode == 0, done.stderr
        assert made == {"handed-on", "saved", "report.json"}
        assert json.loads((tmp_path / "report.json").read_text())["fingerprint"] == wanted
    else:
        assert (done.returncode, made) == (2, set())
        assert f"{loader.fingerprint(_tensors())}, expected {wanted}" in done.stderr
