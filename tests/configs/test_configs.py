"""Every file in configs/ is what its first comment says it is."""

import fnmatch
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loader.config import Config, parse, resolve_mesh
from loader.convert.named import olmo_core, torchtitan
from loader.init_from_hf import main
from loader.place.targets import tensors_of_module
from loader.place.transformers_builder import config_of
from tests.checkpoints import same_bits, tiny_llama
from tests.ranks import run_ranks
from tests.torchrun import torchrun

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str, *overrides: str) -> Config:
    return parse(str(CONFIGS / f"{name}.yaml"), overrides)


def test_each_file_has_a_test_here():
    tested = {
        "llama-fsdp",
        "llama-hsdp-two-nodes",
        "tp-fsdp",
        "convert-to-dcp",
        "olmo-core",
        "torchtitan",
        "llama-local",
    }
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == tested


@pytest.mark.parametrize(
    ("name", "world_size", "mesh"),
    [
        ("llama-fsdp", 8, {"dp_shard": 8}),
        ("llama-hsdp-two-nodes", 16, {"dp_replicate": 2, "dp_shard": 8}),
        ("tp-fsdp", 32, {"dp_shard": 4, "tp": 8}),
        ("llama-local", 8, {"dp_shard": 8}),
        ("convert-to-dcp", 4, {"dp_shard": 4}),
        ("olmo-core", 8, {"dp_shard": 8}),
        ("torchtitan", 8, {"dp_shard": 8}),
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


def run(name: str, uri: str) -> int:
    """In a rank: the config as it is, but for the source, and a program that looks at what it was given."""
    if name == "torchtitan":
        import tests.torchtitan_models  # noqa: F401 - without a GPU torchtitan wants its kernels replaced
    overrides = [f"source.uri={uri}", f"output.entrypoint={__name__}:check_{name.replace('-', '_')}", "report=null"]
    return main(["--config", str(CONFIGS / f"{name}.yaml"), "model.device=cpu", *overrides])


def check_olmo_core(model, mesh, report) -> int:
    return check(model, report, olmo_core.convert)


def check_torchtitan(model, mesh, report) -> int:
    return check(model, report, torchtitan.convert_fused)


def check(model, report, convert) -> int:
    directory = Path(report.source.uri)
    config = config_of(json.loads((directory / "config.json").read_text()))
    expected = {fqn: t.bfloat16() for fqn, t in convert(load_file(directory / "model.safetensors"), config)}
    found = dict(tensors_of_module(model))  # torchtitan's state dict has q, k and v apart again
    wrong = [fqn for fqn in expected if not same_bits(found[fqn].full_tensor(), expected[fqn])]
    return 7 if wrong or set(found) != set(expected) else 0


@pytest.mark.parametrize("name", ["olmo-core", "torchtitan"])
def test_the_trainers_models_are_filled(name, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 16}
    config = transformers.LlamaConfig(**sizes, vocab_size=2048, num_key_value_heads=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    outcomes = run_ranks(2, run, name, str(tmp_path), init=False, outcomes=True)
    assert [outcome.value for outcome in outcomes] == [0, 0], outcomes


def test_a_trainer_of_its_own_takes_over(tmp_path):
    """Both commands of llama-local.yaml as it shows them, with a source and a directory of ours."""
    llama = tiny_llama(tmp_path / "llama", dtype=torch.bfloat16)
    init, overrides = tmp_path / "init", [f"source.uri={llama}", f"output.local={tmp_path}/init", "report=null"]
    done = torchrun(2, ["-m", "loader.init_from_hf", "--config", CONFIGS / "llama-local.yaml", *overrides])
    assert done.returncode == 0, done.stderr
    assert (init / "complete.json").exists()
    trained = torchrun(2, [CONFIGS / "train_local.py", init])
    assert trained.returncode == 0, trained.stderr
    losses = [float(line.split()[-1]) for line in trained.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    torch.manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, 32))
    assert abs(losses[0] - model(input_ids=tokens, labels=tokens).loss.item()) < 0.01
    assert not init.exists()
