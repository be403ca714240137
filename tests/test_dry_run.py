"""`--dry-run` foresees what the load then does: from headers alone, and to the byte."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loader.init_from_hf import main
from tests.checkpoints import random_checkpoint, tiny_llama
from tests.dry_run_models import EXPERTS, LAYERS, WIDTH
from tests.proxy import CountingProxy
from tests.quantised import in_blocks, quantised_copy
from tests.ranks import run_ranks

WORLD, NODES = 4, 2
HEAD = 64 * 1024
MEASURED = {"seconds", "memory", "bound_by", "predicted", "ranks"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Large enough that headers are little of it: 5 MB in float32, tied."""
    directory = tmp_path_factory.mktemp("llama")
    return tiny_llama(directory, dtype=torch.float32, tied=True, hidden_size=256, intermediate_size=510)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """In float8 with blocks that shards cut; its class has a head that it lacks."""
    directory = tmp_path_factory.mktemp("quantised")
    tiny_llama(directory / "model", files=1, tied=True, hidden_size=256, intermediate_size=510)
    config = {"quant_method": "fp8", "weight_block_size": [48, 80]}
    quantised_copy(directory / "model", directory, in_blocks((48, 80)), config)
    file = directory / "quantised" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "architectures": ["LlamaForSequenceClassification"]}))
    return file.parent


@pytest.fixture(scope="module")
def layered(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("layered")
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "embed.weight": (torch.float32, (50, WIDTH)),
        "unwanted": (torch.uint8, (5,)),
    }
    for layer in range(LAYERS):
        tensors |= {
            f"layers.{layer}.{name}": (dtype, shape)
            for name, dtype, shape in (
                ("up.weight", torch.bfloat16, (2 * WIDTH, WIDTH)),
                ("up.bias", torch.bfloat16, (2 * WIDTH,)),
                ("norm.weight", torch.float32, (WIDTH,)),
                ("norm.bias", torch.float32, (WIDTH,)),
                ("experts", torch.bfloat16, (EXPERTS, WIDTH, WIDTH)),
                ("steps", torch.int64, (2,)),
            )
        }
    random_checkpoint(directory, tensors, files=2)
    (directory / "config.json").write_text("{}")
    return directory


def _config(directory: Path, **sections: Any) -> str:
    path = directory / "config.yaml"
    path.write_text(json.dumps({"report": str(directory / "report.json"), **sections}))
    return str(path)


def _main(*arguments: str) -> int:
    return main(["--config", *arguments])


def _foresee(config: str, *overrides: str, world: int = WORLD, outcomes: bool = False, **env: str) -> Any:
    """In a process of its own, for an error ends it."""
    arguments = [config, "--dry-run", "--world-size", str(world), "--ranks-per-host", str(world // NODES), *overrides]
    return run_ranks(1, _main, *arguments, init=False, env=env, outcomes=outcomes)[0]


def _report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return found


LLAMA: dict[str, Mapping[str, Any]] = {
    "fsdp": {"mesh": {"dp_shard": 4}},
    "hsdp": {"mesh": {"dp_replicate": 2, "dp_shard": 2}},
    "tp and fsdp": {"mesh": {"dp_shard": 2, "tp": 2}, "model": {"dtype": "bfloat16"}},
    "hsdp, once a node": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "read": {"share": "node"}},
    "tp and replicas, each for itself": {"mesh": {"dp_replicate": 2, "tp": 2}, "read": {"share": "none"}},
}
LAYERED: dict[str, Mapping[str, Any]] = {
    "rules": {
        "model": {"builder": None},
        "mesh": {"dp_shard": 2, "tp": 2},
        "placements": [
            {"match": "*.up.weight", "shard": {"dp_shard": 0, "tp": 1}},
            {"match": "*.experts", "shard": {"tp": 2}},
            {"match": "*.norm.*", "shard": {"dp_shard": 0}},
        ],
    },
    "stages, experts, small ranges": {
        "model": {"builder": "tests.dry_run_models:stages_with_experts"},
        "mesh": {"pp": 2, "dp_shard": -1},
        "read": {"range_size": "64KiB", "memory_budget": "8MiB"},
    },
    "stages innermost": {
        "model": {"builder": "tests.dry_run_models:stages_with_experts", "dtype": "float32"},
        "mesh": {"dp_shard": 2, "pp": 2},
    },
    "a conversion": {
        "model": {"builder": None},
        "convert": "tests.dry_run_models:fused",
        "mesh": {"dp_shard": -1},
        "placements": [{"match": "*.up", "shard": {"dp_shard": 2}}, {"match": "*expert*", "shard": {"dp_shard": 1}}],
        "read": {"range_size": "64KiB"},
    },
}


NEW = {"initialise": ["score.*"], "dtype_rules": [{"match": "*norm*", "dtype": "float32"}]}
QUANTISED: dict[str, Mapping[str, Any]] = {
    "quantised, with a new head": {"model": NEW, "mesh": {"dp_shard": -1}},
    "quantised, small ranges": {"model": NEW, "mesh": {"dp_shard": 2, "tp": 2}, "read": {"range_size": "64KiB"}},
}
CASES = LLAMA | LAYERED | QUANTISED


@pytest.mark.parametrize("case", CASES)
def test_the_load_does_what_was_foreseen(request, tmp_path, case):
    source = request.getfixturevalue("llama" if case in LLAMA else "layered" if case in LAYERED else "quantised")
    config = _config(tmp_path, source={"uri": str(source), "ignore": ["unwanted"]}, **CASES[case])
    assert _foresee(config) == 0
    foreseen = _report(tmp_path)
    assert run_ranks(WORLD, _main, config, init=False, nodes=NODES) == [0] * WORLD
    found = _report(tmp_path)
    assert foreseen["predicted"]["coverage"] == "complete"
    assert found.keys() - {"advice"} == foreseen.keys() - {"predicted"}
    assert {name: value for name, value in found.items() if name not in MEASURED} == {
        name: value for name, value in foreseen.items() if name not in MEASURED
    }
    counts = ("rank", "fetched_bytes", "gets", "exchanged_bytes", "shard_bytes")
    assert [[rank[name] for name in counts] for rank in foreseen["ranks"]] == [
        [rank[name] for name in counts] for rank in found["ranks"]
    ]
    share = CASES[case].get("read", {}).get("share", "world")
    headers = foreseen["fetched_bytes"] - foreseen["predicted"]["egress_bytes"][share]
    assert 0 < headers <= HEAD * foreseen["source"]["files"]


def test_the_other_ways_to_share_are_foreseen_as_well(tmp_path, llama):
    config = _config(tmp_path, source={"uri": str(llama)}, mesh={"dp_shard": 2, "tp": 2})
    egress = []
    for share in ("world", "node", "none"):
        assert _foresee(config, f"read.share={share}") == 0
        egress.append(_report(tmp_path)["predicted"]["egress_bytes"])
        assert sum(rank["fetched_bytes"] for rank in _report(tmp_path)["ranks"]) > egress[-1][share]
    assert egress[0] == egress[1] == egress[2]
    assert list(egress[0]) == ["world", "node", "none"]
    assert egress[0]["world"] < egress[0]["none"]


# ---------------------------------------------------------------- headers alone


def test_only_headers_leave_the_bucket_and_only_the_report_is_written(s3, tmp_path, llama):
    with CountingProxy(s3.endpoint) as proxy:
        config = _config(
            tmp_path,
            source={"uri": s3.put(llama)},
            mesh={"dp_replicate": -1, "dp_shard": 8},
            output={"checkpoint": str(tmp_path / "checkpoint"), "entrypoint": "tests.programs:logits"},
        )
        assert _foresee(config, world=64, **s3.at(proxy.url).environment) == 0
        reads = proxy.select(".safetensors")
        report = _report(tmp_path)
        assert len(reads) == report["source"]["files"] == proxy.gets(".safetensors")
        assert all(request.range.startswith("bytes=0-") for request in reads)
        assert proxy.bytes_served(".safetensors") <= len(reads) * HEAD < 0.1 * report["needed_bytes"]
        assert {request.method for request in proxy.requests} <= {"GET", "HEAD"}
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "report.json"}
    assert report["world_size"] == len(report["ranks"]) == 64
    assert report["mesh"] == {"dp_replicate": 8, "dp_shard": 8}


def test_a_program_that_runs_it_still_ends_by_sigterm(tmp_path, layered, capfd):
    """And so do the processes that it starts later: what is ignored is inherited."""
    config = _config(tmp_path, source={"uri": str(layered), "ignore": ["unwanted"]}, model={"builder": None})
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--config", config, "--dry-run", "--world-size", "1"]) == 0
    assert signal.getsignal(signal.SIGTERM) == before != signal.SIG_IGN


def test_thousands_of_ranks(tmp_path, layered, capfd):
    """Most of them hold nothing of most tensors; who holds the same is found once."""
    config = _config(
        tmp_path,
        source={"uri": str(layered), "ignore": ["unwanted"]},
        model={"builder": "tests.dry_run_models:stages_with_experts"},
        mesh={"pp": 2, "dp_replicate": 16, "dp_shard": -1},
    )
    speeds = ["--bucket-gbps", "0.001", "--peer-gbps", "0.5", "--ranks-per-host", "8"]
    assert main(["--config", config, "--dry-run", "--world-size", "4096", *speeds]) == 0
    report = _report(tmp_path)
    predicted, ranks = report["predicted"], report["ranks"]
    assert len(ranks) == 4096
    assert {rank["host"] for rank in ranks[:16]} == {"host-0", "host-1"}
    tensors = sum(file.stat().st_size for file in layered.glob("*.safetensors"))
    assert report["needed_bytes"] < tensors < 1.1 * report["needed_bytes"]
    assert predicted["egress_bytes"]["world"] == report["needed_bytes"] < predicted["egress_bytes"]["node"]
    assert predicted["held_bytes"] <= predicted["egress_bytes"]["none"]
    spread = predicted["per_rank"]["exchanged_bytes"]
    sent = [rank["exchanged_bytes"] for rank in ranks]
    assert (spread["least"], spread["most"], spread["mean"]) == (min(sent), max(sent), sum(sent) / 4096)
    by_host = [sum(rank["fetched_bytes"] for rank in ranks[first : first + 8]) for first in range(0, 4096, 8)]
    assert predicted["seconds"]["bucket"] == pytest.approx(max(by_host) * 8 / 1e6)
    assert predicted["bound_by"] == max(predicted["seconds"], key=predicted["seconds"].__getitem__) == "bucket"
    assert report["seconds"]["total"] == predicted["seconds"]["bucket"]
    assert report["bound_by"] == "bucket"
    table = capfd.readouterr().out
    assert [line.split("  ")[0].strip() for line in table.splitlines() if not line.startswith(" ")] == [
        "to load", "coverage", "per rank", "shared", "egress", "seconds", "bound by",
    ]  # fmt: skip
    assert "pp 2 x dp_replicate 16 x dp_shard 128 (4,096 ranks)" in table


# ---------------------------------------------------------------- what it refuses

BAD: dict[str, Mapping[str, Any]] = {
    "key without a target": {"source": {"ignore": []}},
    "parameter without a source": {"source": {"strip_prefix": "embed."}},
    "shape": {"convert": "tests.dry_run_models:cut"},
    "mesh": {"mesh": {"dp_shard": 3}},
    "entrypoint": {"output": {"entrypoint": "tests.programs:logit"}},
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_load_refuses_is_refused_with_the_same_words(tmp_path, layered, case):
    sections: dict[str, Any] = {
        "source": {"uri": str(layered), "ignore": ["unwanted"]},
        "model": {"builder": "tests.dry_run_models:stages_with_experts"},
        "mesh": {"pp": 2, "dp_shard": -1},
    }
    for name, section in BAD[case].items():
        sections[name] = {**sections[name], **section} if name == "source" else section
    config = _config(tmp_path, **sections)
    foreseen = _foresee(config, outcomes=True)
    real = run_ranks(WORLD, _main, config, init=False, outcomes=True)
    assert [each.report for each in (foreseen, *real)] == ["died: exit code 2"] * (1 + WORLD)
    told = foreseen.output.strip().splitlines()[-1]
    assert told.startswith("rank 0: ")
    assert told.removeprefix("rank 0: ") in {each.output.strip().splitlines()[-1][len("rank 0: ") :] for each in real}
    assert not (tmp_path / "report.json").exists()


def test_numbers_that_make_no_world(tmp_path, layered):
    foreseen = _foresee(_config(tmp_path, source={"uri": str(layered)}), "--peer-gbps", "0", outcomes=True)
    assert foreseen.report == "died: exit code 2"
    assert "ConfigError" in foreseen.output
    assert "peer_gbps=0.0" in foreseen.output


# ---------------------------------------------------------------- under torchrun


def test_of_ranks_that_are_there_the_first_foresees_for_all(tmp_path, llama):
    config = _config(tmp_path, source={"uri": str(llama)}, model={"device": "cuda"})
    assert run_ranks(3, _main, config, "--dry-run", init=False) == [0] * 3
    assert _report(tmp_path)["mesh"] == {"dp_shard": 3}
    assert {rank["host"] for rank in _report(tmp_path)["ranks"]} == {"host-0"}
