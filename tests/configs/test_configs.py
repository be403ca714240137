"""Every file in configs/ is what its first comment says it is."""

import fnmatch
from pathlib import Path

import pytest
import torch

from loader.config import Config, parse, resolve_mesh

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str, *overrides: str) -> Config:
    return parse(str(CONFIGS / f"{name}.yaml"), overrides)


def test_each_file_has_a_test_here():
    tested = {"llama-fsdp", "llama-hsdp-two-nodes", "tp-fsdp", "convert-to-dcp"}
    assert {path.stem for path in CONFIGS.iterdir()} == tested


@pytest.mark.parametrize(
    ("name", "world_size", "mesh"),
    [
        ("llama-fsdp", 8, {"dp_shard": 8}),
        ("llama-hsdp-two-nodes", 16, {"dp_replicate": 2, "dp_shard": 8}),
        ("tp-fsdp", 32, {"dp_shard": 4, "tp": 8}),
        ("convert-to-dcp", 4, {"dp_shard": 4}),
    ],
)
def test_the_mesh_fits_the_ranks_that_the_comment_starts(name, world_size, mesh):
    text = (CONFIGS / f"{name}.yaml").read_text()
    words = text.split()
    nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    assert nodes * int(words[words.index("--nproc-per-node") + 1]) == world_size
    resolved = resolve_mesh(load(name).mesh, world_size)
    assert resolved == mesh
    assert list(resolved) == list(mesh)
    assert f"configs/{name}.yaml" in text


@pytest.mark.parametrize("name", ["llama-fsdp", "llama-hsdp-two-nodes", "tp-fsdp"])
def test_training_configs_build_with_transformers_and_hand_the_model_on(name):
    config = load(name)
    assert config.model.builder == "transformers"
    assert config.model.dtype is torch.bfloat16
    assert set(config.mesh) <= {"dp_replicate", "dp_shard", "tp"}  # the dims that this builder takes
    assert config.output.entrypoint is not None
    assert config.output.checkpoint is None


def test_the_conversion_shards_weights_and_replicates_norms():
    config = load("convert-to-dcp")
    assert config.model.builder is None
    assert config.output.checkpoint is not None

    def shard(fqn):
        return next((rule.shard for rule in config.placements if fnmatch.fnmatchcase(fqn, rule.match)), {})

    assert shard("model.layers.0.mlp.up_proj.weight") == {"dp_shard": 0}
    assert shard("model.layers.0.input_layernorm.weight") == {}
    assert shard("model.norm.weight") == {}


def test_a_source_of_ones_own_replaces_the_example():
    assert load("llama-fsdp", "source.uri=file:///tmp/mine").source.uri == "file:///tmp/mine"
