"""From the init step to a trainer through files of the node: the same shards, or one error on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import loader
from loader.init_from_hf import main
from loader.place.materialise import materialise
from loader.place.targets import tensors_of_module
from tests.local_models import build, train_a_step, write_checkpoint
from tests.ranks import run_ranks
from tests.shards import differences

MESHES = {
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "fsdp and tp": {"dp_shard": 2, "tp": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory)
    return str(directory)


def write_config(directory: Path, source: str, mesh: dict[str, int], **sections) -> list[str]:
    path = directory / "cfg.yaml"
    config = {
        "source": {"uri": source}, "model": {"builder": "tests.local_models:build"}, "mesh": mesh,
        "output": {"local": str(directory / "init")}, "report": None,
    }  # fmt: skip
    path.write_text(json.dumps(config | sections))
    return ["--config", str(path)]


def model_on(mesh: dict[str, int]) -> nn.Module:
    return build(None, init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh)))


def attached_and_loaded(mesh: dict[str, int], directory: str, source: str, **how) -> tuple[nn.Module, nn.Module]:
    model, loaded = model_on(mesh), model_on(mesh)
    loader.attach(model, directory, **how)
    materialise(loaded, "cpu")
    loader.load(loaded, source)
    return model, loaded


def wrong(model: nn.Module, expected: nn.Module) -> list[str]:
    return differences(*(dict(tensors_of_module(each)) for each in (model, expected)))


def _attach_and_train(mesh: dict[str, int], directory: str, source: str, how: dict) -> list[str]:
    model, loaded = attached_and_loaded(mesh, directory, source, **how)
    found = wrong(model, loaded)
    assert torch.equal(model.angles, torch.arange(6.0))
    assert model.head.weight is model.embed.weight
    before = model.embed.weight.to_local().clone()
    for each in (model, loaded):
        train_a_step(each)
    assert not before.numel() or not torch.equal(before, model.embed.weight.to_local())
    return found + wrong(model, loaded)


@pytest.mark.parametrize("remove", [False, True], ids=["kept", "removed"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_trainer_has_what_a_load_gives_and_trains_alike(tmp_path, source, mesh, remove):
    arguments = write_config(tmp_path, source, mesh, verify="fingerprint")
    directory = tmp_path / "init"
    assert run_ranks(4, main, arguments, init=False) == [0] * 4
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert len(before) == 10  # two for each rank, complete.json, config.json
    how = {"remove": remove, "verify": "fingerprint"}
    assert run_ranks(4, _attach_and_train, mesh, str(directory), source, how) == [[]] * 4
    if remove:
        assert not directory.exists()
    else:
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
