"""From the init step to a trainer through files of the node: the same shards, or one error on every rank."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import loader
from loader.errors import LoaderError
from loader.init_from_hf import main
from loader.place.materialise import materialise
from loader.place.targets import tensors_of_module
from tests.local_models import build, plain, train_a_step, two, write_checkpoint
from tests.ranks import run_ranks
from tests.shards import differences

MESHES = {
    "fsdp": {"dp_shard": 4},
    "fsdp, uneven": {"dp_shard": 3},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "fsdp and tp": {"dp_shard": 2, "tp": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory)
    return str(directory)


def write_config(directory: Path, source: str, mesh: dict[str, int], **sections: Any) -> list[str]:
    path = directory / "cfg.yaml"
    config = {
        "source": {"uri": source}, "model": {"builder": "tests.local_models:build"}, "mesh": mesh,
        "output": {"local": str(directory / "init")}, "report": None,
    }  # fmt: skip
    path.write_text(json.dumps(config | sections))
    return ["--config", str(path)]


def model_on(mesh: dict[str, int]) -> nn.Module:
    return build(None, init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh)))


def wrong(model: nn.Module, expected: nn.Module) -> list[str]:
    return differences(*(dict(tensors_of_module(each)) for each in (model, expected)))


# ---------------------------------------------------------------- what is attached


def _attach_and_train(mesh: dict[str, int], directory: str, source: str, how: dict[str, Any]) -> list[str]:
    model, loaded = model_on(mesh), model_on(mesh)
    embed = model.embed.weight
    loader.attach(model, directory, **how)
    materialise(loaded, "cpu")
    loader.load(loaded, source)
    found = wrong(model, loaded)
    assert torch.equal(model.angles, torch.arange(6.0))
    assert model.head.weight is model.embed.weight is embed
    before = embed.to_local().clone()
    for each in (model, loaded):
        train_a_step(each)
    assert not before.numel() or not torch.equal(before, embed.to_local())
    return found + wrong(model, loaded)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_trainer_has_what_a_load_gives_and_trains_alike(tmp_path, source, mesh):
    arguments = write_config(tmp_path, source, mesh, verify="fingerprint")
    directory, ranks = tmp_path / "init", math.prod(mesh.values())
    assert run_ranks(ranks, main, arguments, init=False) == [0] * ranks
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert len(before) == 2 * ranks + 2  # two for each rank, complete.json, config.json
    assert run_ranks(ranks, _attach_and_train, mesh, str(directory), source, {"verify": "fingerprint"}) == [[]] * ranks
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert run_ranks(ranks, _attach_and_train, mesh, str(directory), source, {"remove": True}) == [[]] * ranks
    assert not directory.exists()


def _attach_alone(directory: str) -> tuple[int, bool]:
    """How much a small parameter takes that is saved by itself, and whether all is there."""
    model = two(None, None)
    loader.attach(model, directory)
    saved = io.BytesIO()
    torch.save(model["small"].weight, saved)
    return len(saved.getvalue()), all(torch.equal(each, torch.ones_like(each)) for each in model.parameters())


def test_one_process_without_a_group(tmp_path):
    """Each parameter has a storage of its own, so that saving one does not save them all."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"big.weight": torch.ones(256, 256), "small.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    arguments = write_config(tmp_path, str(tmp_path), {"dp_shard": 1}, model={"builder": "tests.local_models:two"})
    assert run_ranks(1, main, arguments, init=False) == [0]
    ((size, right),) = run_ranks(1, _attach_alone, str(tmp_path / "init"), init=False)
    assert size < 4096
    assert right


# ---------------------------------------------------------------- what is refused, alike on every rank


def _more(model: nn.Module) -> nn.Module:
    model.register_parameter("more", nn.Parameter(torch.empty(2, device="meta")))
    return model


def _less(model: nn.Module) -> nn.Module:
    del model.few
    return model


def _untied(model: nn.Module) -> nn.Module:
    model.head.register_parameter("weight", nn.Parameter(torch.empty_like(model.embed.weight)))
    return model


def _with_memory(model: nn.Module) -> nn.Module:
    materialise(model, "cpu")
    return model


def _another_dtype(model: nn.Module) -> nn.Module:
    model.norm.to(torch.bfloat16)
    return model


def _hsdp(_: nn.Module) -> nn.Module:
    return model_on({"dp_replicate": 2, "dp_shard": 2})


def _gone(directory: Path) -> None:
    shutil.rmtree(directory)


def _foreign(directory: Path) -> None:
    _gone(directory)
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")


def _unfinished(directory: Path) -> None:
    (directory / "complete.json").unlink()


def _cut_short(directory: Path) -> None:
    os.truncate(directory / "rank-00002.bin", 100)


def _flipped(directory: Path) -> None:
    path = directory / "rank-00002.bin"
    shards = json.loads(path.with_suffix(".json").read_text())["shards"]
    content = bytearray(path.read_bytes())
    content[next(shard["start"] for shard in shards if "embed.weight" in shard["names"])] ^= 1
    path.write_bytes(content)


def _rank_lost(directory: Path) -> None:
    (directory / "rank-00001.bin").unlink()


def _edit(rank: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / f"rank-{rank:05}.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return edit


def _no_json(directory: Path) -> None:
    (directory / "rank-00001.json").write_text("[")


def _other_run_here(directory: Path) -> None:
    """As on a node that was replaced: complete, of another run."""
    for path in directory.glob("*.json"):
        path.write_text(re.sub('"run":"[0-9a-f]+"', '"run":"0"', path.read_text()))


def _as_it_is(_: Any) -> Any:
    return _


Case = tuple[Callable[[Path], None], Callable[[nn.Module], nn.Module], str, str]

REFUSED: dict[str, Case] = {
    "mesh": (_as_it_is, _hsdp, "CoverageError",
             r"embed.weight: found mesh \{'dp_shard': 4\}, .*\['S\(0\)'\].*, expected .*\['R', 'S\(0\)'\].*build it"),
    "dtype": (_as_it_is, _another_dtype, "CoverageError", "norm.weight: found dtype float32 .*expected dtype bfloat16"),
    "more": (_as_it_is, _more, "CoverageError", "more: the model has it, and .*/init-more does not"),
    "less": (_as_it_is, _less, "CoverageError", "few.weight: .*/init-less has it, and the model does not"),
    "untied": (_as_it_is, _untied, "CoverageError", "embed.weight: found one tensor of the names embed.weight, head.w"),
    "memory": (_as_it_is, _with_memory, "BuilderError", "steps has memory already, on cpu: .*loader.load"),
    "gone": (_gone, _as_it_is, "CatalogError", "no such directory, expected rank-local shards: run the init step"),
    "foreign": (_foreign, _as_it_is, "CatalogError", "init-foreign: found an output that was not finished"),
    "unfinished": (_unfinished, _as_it_is, "CatalogError", "an output that was not finished, .*run the init step"),
    "cut": (_cut_short, _as_it_is, "CatalogError", r"rank-00002.bin: found 100 bytes, expected \d+: it was cut short"),
    "rank": (_rank_lost, _as_it_is, "CatalogError", "found no rank-00001.bin, the shards of rank 1: start the same"),
    "json": (_no_json, _as_it_is, "CatalogError", "rank-00001.json cannot be read: JSONDecodeError"),
    "version": (_edit(1, lambda m: m.update(version=2)), _as_it_is, "CatalogError", "is of version 2, expected 1"),
    "unknown": (_edit(3, lambda m: m.update(more=1)), _as_it_is, "CatalogError", "cannot be read: more: Extra inputs"),
    "out": (_edit(1, lambda m: m["shards"][0].update(start=1 << 20)), _as_it_is, "CatalogError",
            r"rank-00001.json: steps is said to be bytes 1048576 to \d+ of \d+"),
    "negative": (_edit(1, lambda m: m["shards"][0].update(start=-8)), _as_it_is, "CatalogError", "bytes -8 to"),
    "no dtype": (_edit(1, lambda m: m["shards"][0].update(dtype="int9")), _as_it_is, "CatalogError",
                 "shards.0.dtype: .*no such dtype"),
    "mixed": (_edit(1, lambda m: m.update(run="0")), _as_it_is, "CatalogError", "another run than the rest"),
    "replaced": (_as_it_is, _as_it_is, "CatalogError", "of one run on one node, and of another elsewhere"),
    "flipped": (_flipped, _as_it_is, "FingerprintError", "the shards in .* is f1.*, expected f1"),
}  # fmt: skip


def _refusals(root: str) -> dict[str, Any]:
    told = {}
    for name, (_, change, _, _) in REFUSED.items():
        directory = f"{root}/init-{name}" if (name, dist.get_rank()) != ("replaced", 3) else f"{root}/init-other"
        model = change(model_on(MESHES["fsdp"]))
        before = [tensor.is_meta for _, tensor in tensors_of_module(model)]
        with pytest.raises(LoaderError) as raised:
            loader.attach(model, directory, verify="fingerprint", remove=True)
        told[name] = type(raised.value).__name__, str(raised.value)
        assert [tensor.is_meta for _, tensor in tensors_of_module(model)] == before, f"{name}: half a model"
        dist.all_reduce(total := torch.ones(1))
        assert total.item() == 4
    return told


@pytest.fixture(scope="module")
def refused(tmp_path_factory, source) -> Iterator[list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("refused")
    arguments = write_config(root, source, MESHES["fsdp"], verify="fingerprint")
    assert run_ranks(4, main, arguments, init=False) == [0] * 4
    for name, (prepare, *_) in {**REFUSED, "other": (_other_run_here,)}.items():
        shutil.copytree(root / "init", root / f"init-{name}")
        prepare(root / f"init-{name}")
    told = run_ranks(4, _refusals, str(root))
    kept = {name for name in REFUSED if name not in {"gone", "foreign"}}
    assert all((root / f"init-{name}" / "rank-00000.bin").exists() for name in kept)
    assert (root / "init-foreign" / "notes.txt").exists()
    return told


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_alike_on_every_rank(refused, name):
    *_, kind, message = REFUSED[name]
    assert {each[name] for each in refused} == {refused[0][name]}
    assert refused[0][name][0] == kind
    assert re.search(message, refused[0][name][1]), refused[0][name][1]


def _attach_told(mesh: dict[str, int], directory: str, how: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(LoaderError) as raised:
        loader.attach(model_on(mesh), directory, **how)
    return type(raised.value).__name__, str(raised.value)


def test_another_world_size_and_a_fingerprint_that_nobody_made(tmp_path, source):
    assert run_ranks(2, main, write_config(tmp_path, source, {"dp_shard": 2}), init=False) == [0] * 2
    directory = str(tmp_path / "init")
    (told,) = set(run_ranks(3, _attach_told, {"dp_shard": 3}, directory, {}))
    assert told[0] == "CatalogError"
    assert f"{directory} holds the shards of 2 ranks, and this job has 3: start 2, or" in told[1]
    (told,) = set(run_ranks(2, _attach_told, {"dp_shard": 2}, directory, {"verify": "fingerprint"}))
    assert told[0] == "ConfigError"
    assert "has no fingerprint to be compared with: set verify to fingerprint" in told[1]
    (told,) = set(run_ranks(2, _attach_told, {"dp_shard": 2}, directory, {"verify": "checksum"}))
    assert told == ("ConfigError", "verify: should be \"fingerprint\" or None, found 'checksum': nothing is read here")


def test_a_replica_that_differs_is_named(tmp_path, source):
    mesh = MESHES["hsdp"]
    arguments = write_config(tmp_path, source, mesh, verify="fingerprint")
    assert run_ranks(4, main, arguments, init=False) == [0] * 4
    _flipped(tmp_path / "init")
    (told,) = set(run_ranks(4, _attach_told, mesh, str(tmp_path / "init"), {"verify": "fingerprint"}))
    assert told[0] == "CorruptionError"
    assert re.search("embed.weight .* on rank 0 and another on rank 2", told[1])


# ---------------------------------------------------------------- memory


def _private_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def _write_all(directory: str, remove: bool) -> tuple[int, int]:
    """Private memory that attaching took, and that writing to every page then took."""
    model = plain(None, None)
    before = _private_bytes()
    loader.attach(model, directory, remove=remove)
    attached = _private_bytes()
    with torch.no_grad():
        model.weight.add_(1)
    assert model.weight[0, 0] == 2
    return attached - before, _private_bytes() - attached


@pytest.mark.parametrize("remove", [False, True], ids=["kept", "removed"])
def test_nothing_is_held_twice_where_the_directory_is_removed(remove):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        directory = Path(scratch)
        save_file({"weight": torch.ones(4096, 4096)}, directory / "model.safetensors")
        arguments = write_config(directory, scratch, {"dp_shard": 1}, model={"builder": "tests.local_models:plain"})
        (directory / "config.json").write_text("{}")
        assert run_ranks(1, main, arguments, init=False) == [0]
        (found,) = run_ranks(1, _write_all, str(directory / "init"), remove, init=False)
    attached, written = found
    assert attached < 8 << 20
    assert written < 8 << 20 if remove else 60 << 20 < written < 72 << 20
