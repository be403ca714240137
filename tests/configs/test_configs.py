"""Every file in configs/ is what its first comment says it is: it plans, and loads, from the server that it is for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from loader.config import Config, parse, resolve_mesh
from loader.convert.named import olmo_core, torchtitan
from loader.init_from_hf import main
from loader.place.targets import tensors_of_module
from loader.place.transformers_builder import config_of
from tests.checkpoints import same_bits
from tests.hub import hub_server
from tests.quantised import in_blocks, quantised_copy
from tests.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a config is for."""

    mesh: Mapping[str, int]
    """With as many ranks as its comment starts."""
    checkpoint: str = "llama"
    server: str = "s3"
    ranks: tuple[str, ...] = ("mesh={dp_shard: 2}",)
    """What changes where it is loaded, by as many ranks as the mesh has; none where test_trainers.py loads it."""


SITUATIONS = {
    "llama-fsdp": Situation({"dp_shard": 8}, ranks=()),
    "llama-local": Situation({"dp_shard": 8}, ranks=()),
    "torchtitan-dcp": Situation({"dp_shard": 4}, "debugmodel", ranks=()),
    "llama-hsdp-two-nodes": Situation(
        {"dp_replicate": 2, "dp_shard": 8}, ranks=("mesh={dp_replicate: 2, dp_shard: 2}",)
    ),
    "tp-fsdp": Situation({"dp_shard": 4, "tp": 8}, ranks=("mesh={dp_shard: 2, tp: 2}",)),
    "moe-ep": Situation(
        {"dp_replicate": 4, "dp_shard": 8}, "qwen3_moe", ranks=("mesh={dp_replicate: 2, dp_shard: 2}",)
    ),
    "fp8-deepseek": Situation({"dp_shard": 64}, "deepseek"),
    "olmo-core": Situation({"dp_shard": 8}),
    "torchtitan": Situation({"dp_shard": 8}, "debugmodel"),
    "gcs": Situation({"dp_shard": 8}, server="gcs"),
    "hub": Situation({"dp_shard": 8}, server="hub"),
    "convert-to-dcp": Situation({"dp_shard": 4}),
}


def test_each_file_has_a_situation_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SITUATIONS)


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_mesh_fits_the_ranks_that_the_comment_starts(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    words = text.split()
    nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    mesh = SITUATIONS[name].mesh
    ranks = nodes * int(words[words.index("--nproc-per-node") + 1])
    assert list(resolve_mesh(load(name).mesh, ranks).items()) == list(mesh.items())
    assert f"configs/{name}.yaml" in text


def load(name: str, *overrides: str) -> Config:
    return parse(str(CONFIGS / f"{name}.yaml"), overrides)


# ---------------------------------------------------------------- a checkpoint of its kind, on a server of its kind


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 104}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**HEADS, "num_key_value_heads": 8}),
    "debugmodel": (  # torchtitan's
        "llama",
        {**HEADS, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 2048},
    ),
    "qwen3_moe": ("qwen3_moe", {**HEADS, **EXPERTS, "num_experts": 8, "head_dim": 16}),
    "bfloat16": ("deepseek_v3", {**HEADS, **LATENT, **GROUPS, **EXPERTS}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """By name; `deepseek` is quantised, and beside it is `plain`, what it means."""
    directory = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, (model_type, sizes) in MODELS.items():
        config = transformers.AutoConfig.for_model(model_type, **SMALL | sizes)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory / name)
    quantisation = {"quant_method": "fp8", "weight_block_size": [12, 20]}
    quantised_copy(directory / "bfloat16", directory, in_blocks((12, 20)), quantisation)
    (directory / "quantised").rename(directory / "deepseek")
    return directory


@pytest.fixture
def served(request, checkpoints, tmp_path, monkeypatch):
    """`served(situation)`: overrides that say where its checkpoint is."""

    def put(situation: Situation) -> list[str]:
        directory = checkpoints / situation.checkpoint
        if situation.server == "hub":
            hub = request.getfixturevalue("hub")
            hub.put(directory, "meta-llama/Llama-3.1-8B")  # the config's own
            return [f"source.storage_options={{endpoint: '{hub.endpoint}', token: false}}"]
        server = request.getfixturevalue(situation.server)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        return [f"source.uri={server.put(directory)}"] + ["source.storage_options={token: anon}"] * (
            situation.server == "gcs"
        )

    return put


@pytest.fixture
def hub(tmp_path):
    with hub_server(tmp_path / "hub") as hub:
        yield hub


def run(name: str, arguments: list[str]) -> int:
    """In a rank: the config as it is, but for these."""
    if name == "torchtitan":
        import tests.torchtitan_models  # noqa: F401 - without a GPU torchtitan wants its kernels replaced
    return main(["--config", str(CONFIGS / f"{name}.yaml"), "model.device=cpu", *arguments])


@pytest.mark.parametrize("name", SITUATIONS)
def test_it_plans_for_the_ranks_that_the_comment_starts(name, served, tmp_path):
    situation = SITUATIONS[name]
    ranks = torch.Size(situation.mesh.values()).numel()
    plan = ["--dry-run", "--world-size", str(ranks), *served(situation), f"report={tmp_path}/report.json"]
    if load(name).output.entrypoint == "train:main":  # the reader's own
        plan.append(f"output.entrypoint={__name__}:look")
    assert run_ranks(1, run, name, plan, init=False) == [0]  # not in this process, for an error ends it
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["predicted"]["coverage"] == "complete"
    assert report["mesh"] == situation.mesh
    assert report["needed_bytes"] == report["predicted"]["egress_bytes"]["world"]


# ---------------------------------------------------------------- and loads


@pytest.mark.parametrize("name", [name for name, situation in SITUATIONS.items() if situation.ranks])
def test_it_loads(name, served, checkpoints, tmp_path):
    """As it is, but for the source, the mesh, and a program that looks at what it was given."""
    situation = SITUATIONS[name]
    overrides = [*served(situation), *situation.ranks, "report=null"]
    output = load(name).output
    if output.checkpoint is None:
        overrides.append(f"output.entrypoint={__name__}:look")
    else:
        overrides.append(f"output.checkpoint={tmp_path}/dcp")
    expected = checkpoints / ("plain" if situation.checkpoint == "deepseek" else situation.checkpoint)
    mesh = load(name, *situation.ranks).mesh
    ranks = torch.Size(mesh.values()).numel()
    found = run_ranks(ranks, run, name, overrides, init=False, env={"CONFIG": name, "EXPECTED": str(expected)})
    assert found == [0] * ranks
    if output.checkpoint is not None:
        assert_equal(of_dcp(tmp_path / "dcp"), of_transformers(expected))


def look(model: torch.nn.Module, mesh: Any, report: Any) -> None:
    """In a rank, an entrypoint: what it was given is the whole conversion by the trainer's names."""
    name, expected = os.environ["CONFIG"], Path(os.environ["EXPECTED"])
    by = {"olmo-core": olmo_core.convert, "moe-ep": olmo_core.convert_dropless, "torchtitan": torchtitan.convert_fused}
    found = {
        fqn: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for fqn, tensor in tensors_of_module(model)
    }
    assert_equal(found, converted(expected, by[name]) if name in by else of_transformers(expected))


def converted(directory: Path, convert: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    config = config_of(json.loads((directory / "config.json").read_text()))
    return {fqn: tensor.bfloat16() for fqn, tensor in convert(tensors, config)}


def of_transformers(directory: Path) -> dict[str, torch.Tensor]:
    return dict(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).state_dict())


def of_dcp(directory: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    described = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    found = {fqn: torch.empty(each.size, dtype=each.properties.dtype) for fqn, each in described.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return found


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [fqn for fqn in found if not same_bits(found[fqn], expected[fqn])]
    assert not wrong, [(fqn, found[fqn].dtype, expected[fqn].dtype) for fqn in wrong]
