"""The command as a user runs it: the real torchrun, real checkpoints in a real bucket, and what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from loader.init_from_hf import main
from tests.checkpoints import minilm_dir, random_checkpoint, tiny_llama
from tests.hub import hub_server
from tests.processes import ROOT, python_path
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard
from tests.torchrun import TWO_HOSTS, torchrun

COMMAND = ["-m", "loader.init_from_hf", "--config"]
CONTRACT = {
    "version", "source", "world_size", "mesh", "tensors", "needed_bytes", "fetched_bytes", "egress_ratio", "gets",
    "retries", "exchanged_bytes", "memory", "seconds", "bound_by", "fingerprint", "ranks",
}  # fmt: skip
OF_A_RANK = {
    "rank", "host", "fetched_bytes", "gets", "exchanged_bytes", "shard_bytes", "peak_over_shards_bytes", "seconds",
}  # fmt: skip
PHASES = {"total", "catalog", "plan", "read", "exchange", "convert", "write"}


def _config(directory: Path, **sections: Any) -> Path:
    path = directory / "config.yaml"
    path.write_text(json.dumps({"report": str(directory / "report.json"), **sections}))  # JSON is YAML
    return path


def _report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return found


# ---------------------------------------------------------------- under torchrun


def test_minilm_from_s3_on_two_nodes(s3, tmp_path):
    uri = s3.put(minilm_dir())
    with CountingProxy(s3.endpoint) as proxy:
        config = _config(
            tmp_path,
            source={"uri": uri},
            mesh={"dp_replicate": 2, "dp_shard": 2},
            read={"share": "node", "memory_budget": "64MiB"},
            output={"entrypoint": "tests.programs:embed"},
        )
        done = torchrun(2, [*COMMAND, config], hosts=TWO_HOSTS, env=s3.at(proxy.url).environment)
        assert done.returncode == 0, done.stderr
        served, gets = proxy.bytes_served(".safetensors"), proxy.gets(".safetensors")
    report = _report(tmp_path)
    assert report.keys() >= CONTRACT
    assert all(rank.keys() == OF_A_RANK for rank in report["ranks"])
    assert report["seconds"].keys() == report["ranks"][0]["seconds"].keys() == PHASES
    assert (report["version"], report["world_size"]) == (1, 4)
    assert report["mesh"] == {"dp_replicate": 2, "dp_shard": 2}
    assert report["source"].keys() == {"uri", "files", "checkpoint_bytes", "pins"}
    assert (report["source"]["uri"], report["source"]["files"]) == (uri, 1)
    assert (report["fetched_bytes"], report["gets"]) == (served, gets)
    assert 2 <= report["egress_ratio"] == served / report["needed_bytes"] < 2.01
    weights = load_file(minilm_dir() / "model.safetensors").values()
    assert report["needed_bytes"] <= sum(tensor.nbytes for tensor in weights)
    assert report["memory"]["peak_over_shards_bytes"] <= report["memory"]["budget_bytes"] == 64 << 20
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1, 2, 3]
    assert len([line for line in done.stdout.splitlines() if line.startswith(("loaded", "bucket", "memory"))]) == 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), dtype=torch.float32)


def _read_back(url: str, directory: str, leave_out: str = "") -> list[str]:
    """What differs where another world size reads the checkpoint that was made of the files in `directory`."""
    full: dict[str, torch.Tensor] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        full |= load_file(file)
    full.pop(leave_out, None)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = {key: shard(tensor, mesh, [Shard(0)]) for key, tensor in full.items()}
    state = {key: blank(tensor) for key, tensor in expected.items()}
    dcp.load(state, storage_reader=FsspecReader(url))
    return differences(state, expected)


def test_llama_from_s3_with_tp_and_fsdp_to_a_checkpoint_on_s3(s3, tmp_path, llama):
    url = s3.prefix()
    config = _config(
        tmp_path,
        source={"uri": s3.put(llama)},
        mesh={"dp_shard": 2, "tp": 2},
        output={"entrypoint": "tests.programs:logits", "checkpoint": url},
    )
    done = torchrun(4, [*COMMAND, config], env={**s3.environment, "LLAMA": str(llama)})
    assert done.returncode == 0, done.stderr
    assert run_ranks(3, _read_back, url, str(llama), env=s3.environment) == [[]] * 3
    assert _report(tmp_path)["source"]["files"] > 1


def test_a_builder_and_an_entrypoint_of_the_users(tmp_path):
    tensors = random_checkpoint(
        tmp_path, {"layer.weight": (torch.float32, (7, 9)), "layer.bias": (torch.float32, (7,))}
    )
    (tmp_path / "config.json").write_text('{"width": 9}')
    torch.save(tensors, tmp_path / "expected.pt")
    config = _config(
        tmp_path,
        source={"uri": str(tmp_path)},
        model={"builder": "tests.programs:own"},
        output={"entrypoint": "tests.programs:leave_with_the_rank"},
    )
    done = torchrun(2, [*COMMAND, config], env={"OWN": str(tmp_path)})
    assert done.returncode == 1
    assert done.exit_codes.keys() <= {0, 1}
    assert all(code == 40 + rank for rank, code in done.exit_codes.items()), done.stderr
    assert done.exit_codes


# ---------------------------------------------------------------- the same process, without the wait for torchrun


def _main(config: str, overrides: list[str]) -> int:
    return main(["--config", config, *overrides])


PLACED = {
    "layers.0.up.weight": (torch.bfloat16, (33, 18)),
    "layers.0.down.weight": (torch.bfloat16, (18, 33)),
    "layers.0.norm.weight": (torch.bfloat16, (18,)),
    "steps": (torch.int64, ()),
    "unwanted": (torch.uint8, (5,)),
}


@pytest.fixture(scope="module")
def placed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("placed")
    random_checkpoint(directory, PLACED, files=2)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_state_dict_by_rules_to_a_checkpoint_for_another_world_size(s3, tmp_path, placed, place):
    url = str(tmp_path / "out") if place == "local" else s3.prefix()
    config = _config(
        tmp_path,
        source={"uri": s3.put(placed), "ignore": ["unwant*"]},
        model={"builder": None},
        mesh={"dp_shard": 2, "tp": 2},
        placements=[
            {"match": "*.up.weight", "shard": {"dp_shard": 0, "tp": 0}},
            {"match": "*.down.weight", "shard": {"dp_shard": 0, "tp": 1}},
            {"match": "*.norm.weight", "shard": {"dp_shard": 0}},
        ],
        output={"checkpoint": url},
    )
    assert run_ranks(4, _main, str(config), [], init=False, env=s3.environment) == [0] * 4
    assert _report(tmp_path)["tensors"] == len(PLACED) - 1
    assert run_ranks(3, _read_back, url, str(placed), "unwanted", env=s3.environment) == [[]] * 3
    before = (tmp_path / "report.json").read_bytes()
    assert run_ranks(4, _main, str(config), ["output.if_exists=use"], init=False, env=s3.environment) == [0] * 4
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_tag_on_the_hub_to_a_checkpoint(tmp_path, placed):
    with hub_server(tmp_path / "hub") as hub:
        commit = hub.put(placed, "org/placed", "v1")
        (tmp_path / "empty").mkdir()
        hub.put(tmp_path / "empty", "org/placed", "main")
        url, options = str(tmp_path / "out"), hub.storage_options  # from the environment, it would be read at import
        config = _config(
            tmp_path,
            source={"uri": "hf://org/placed", "revision": "v1", "ignore": ["unwanted"], "storage_options": options},
            model={"builder": None},
            mesh={"dp_shard": 2},
            output={"checkpoint": url},
        )
        assert run_ranks(2, _main, str(config), [], init=False) == [0, 0]
    assert run_ranks(1, _read_back, url, str(placed), "unwanted") == [[]]
    report = _report(tmp_path)
    assert report["source"]["uri"] == "hf://org/placed@v1"
    assert {pin.partition("/")[0] for pin in report["source"]["pins"].values()} == {commit}
    assert (tmp_path / "out" / "config.json").exists() == (placed / "config.json").exists()


def test_alone_without_torchrun(tmp_path, llama):
    config = _config(tmp_path, source={"uri": f"file://{llama}"}, output={"entrypoint": "tests.programs:logits"})
    environ = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    environ |= {"PYTHONPATH": python_path(), "LLAMA": str(llama)}
    done = subprocess.run(
        [sys.executable, *COMMAND, config],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = _report(tmp_path)
    assert (report["world_size"], report["exchanged_bytes"]) == (1, 0)
    assert report["fetched_bytes"] - report["needed_bytes"] <= report["source"]["files"] * 65536
