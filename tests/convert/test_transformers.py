"""What transformers declares for a model, applied to the whole checkpoint: held to its unsharded `from_pretrained`."""

import json
import math
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import loader
from loader.config import Config
from loader.convert.named.transformers import conversion_for, convert, model_class
from loader.errors import ConversionError, CoverageError
from loader.exchange.control import Control
from loader.place.materialise import materialise
from loader.place.mesh import make_mesh
from loader.place.targets import tensors_of_module
from loader.place.transformers_builder import build, config_of
from loader.run import run
from tests.checkpoints import same_bits
from tests.grid import Family, write, wrong_shards
from tests.grid import convert as grid_convert
from tests.ranks import run_ranks

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 104, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MOE = {**SMALL, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "tied llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**MOE, head_dim=8),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SMALL, n_routed_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, n_group=2, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, num_local_experts=4, head_dim=8, num_experts_per_tok=2),
    "hrm_text": lambda: transformers.HrmTextConfig(**SMALL),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(
        **SMALL, linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bert": lambda: transformers.BertConfig(**SMALL),
    "llava": lambda: transformers.LlavaConfig(
        text_config={"model_type": "llama", **SMALL},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
    ),
}  # fmt: skip
CLASSES = {"bert": transformers.BertForMaskedLM, "llava": transformers.LlavaForConditionalGeneration}
MESHES = {
    "1 rank": {"dp_shard": 1},
    "FSDP 2": {"dp_shard": 2},
    "TP 2": {"tp": 2},
    "FSDP 4": {"dp_shard": 4},
    "HSDP 2 x 2": {"dp_replicate": 2, "dp_shard": 2},
    "FSDP 2 x TP 2": {"dp_shard": 2, "tp": 2},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By model, a directory as transformers saves it: in the original names and layouts."""
    torch.manual_seed(0)
    made = {}
    for name, config in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        cls = CLASSES.get(name, transformers.AutoModelForCausalLM)
        model = cls._from_config(config()) if name in CLASSES else cls.from_config(config())
        model.save_pretrained(made[name])
    return made


def fields(directory):
    return json.loads((directory / "config.json").read_text())


def keys_of(directory):
    return load_file(directory / "model.safetensors")


def reference(directory, cls=None):
    """Every tensor that transformers loads, by name."""
    cls = cls or model_class(fields(directory))
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.state_dict()


def differences(found, expected):
    """Names that are missing, too many, or not the same bits."""
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
    return [n for n in {*full, *expected} if not (n in full and n in expected and same_bits(full[n], expected[n]))]


@pytest.mark.parametrize("name", MODELS)
def test_on_real_tensors_it_makes_what_from_pretrained_loads(checkpoints, name):
    expected = reference(checkpoints[name])
    made = dict(convert(keys_of(checkpoints[name]), config_of(fields(checkpoints[name]))))
    tied = {"tied llama": {"lm_head.weight"}, "bert": {"cls.predictions.decoder.weight"}}.get(name, set())
    assert expected.keys() - made.keys() <= tied | {"cls.predictions.decoder.bias"}
    assert differences(made, {n: expected[n] for n in made}) == []


def empty_model(directory, mesh=None):
    model = build(fields(directory), mesh, torch.float32)
    materialise(model, "cpu")
    return model


@pytest.mark.parametrize("name", MODELS)
def test_one_process_loads_it_traced(checkpoints, name):
    model = empty_model(checkpoints[name])
    loader.load(model, str(checkpoints[name]), convert="transformers")
    assert differences(model.state_dict(), reference(checkpoints[name])) == []


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "hrm_text"])
def test_the_model_says_what_from_pretrained_says(checkpoints, name):
    model = empty_model(checkpoints[name]).eval()
    loader.load(model, str(checkpoints[name]), convert="transformers")
    tokens = torch.randint(1, 104, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model_class(fields(checkpoints[name])).from_pretrained(checkpoints[name]).eval()(tokens).logits
        assert torch.equal(model(tokens).logits, expected)


@pytest.fixture(scope="module")
def grid(checkpoints, tmp_path_factory):
    """Every model as one checkpoint, beside what `from_pretrained` loads, but for what the model makes itself."""
    families = {}
    for name, directory in checkpoints.items():
        tensors, config, expected = keys_of(directory), fields(directory), reference(directory)
        made = [fqn for fqn, _ in convert(tensors, config_of(config))]
        families[name] = Family(tensors, config, "transformers", {fqn: expected[fqn] for fqn in made})
    directory = tmp_path_factory.mktemp("grid") / "all"
    write(directory, families)
    return directory


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_has_its_shards_of_the_conversion(grid, world_size):
    assert wrong_shards(grid, world_size) == []


def load_models(directory, checkpoints, references):
    """In one rank: transformers' own plans for every model; what differs from `from_pretrained`, by layout."""
    found = []
    for layout, dims in MESHES.items():
        if math.prod(dims.values()) == torch.distributed.get_world_size():
            mesh = make_mesh(dims, "cpu")
            named = [name for name in checkpoints if "tp" not in dims or name not in CLASSES]  # these have no TP plan
            models = {name: empty_model(checkpoints[name], mesh) for name in named}
            state = {f"{name}: {fqn}": t for name, model in models.items() for fqn, t in tensors_of_module(model)}
            left_out = [f"{name}: *" for name in checkpoints if name not in named]
            loader.load(state, str(directory), convert=partial(grid_convert, only=named), ignore=left_out)
            for name, model in models.items():
                found += [f"{layout}, {name}: {fqn}" for fqn in differences(model.state_dict(), references[name])]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_models_sharded_by_their_own_plans_hold_it(grid, checkpoints, world_size):
    references = {name: reference(directory) for name, directory in checkpoints.items()}
    found = run_ranks(world_size, load_models, grid, checkpoints, references)
    assert found == [[]] * world_size


def run_command(directory):
    config = Config.model_validate(
        {"source": {"uri": str(directory)}, "model": {"builder": "transformers"}, "mesh": {"dp_shard": 2},
         "report": None, "output": {"entrypoint": f"{__name__}:check_loaded"}}
    )  # fmt: skip
    global EXPECTED  # noqa: PLW0603 - the entrypoint is called with nothing of ours
    EXPECTED = reference(directory)
    with Control.of_group() as control:
        hand_on = run(config, control, torch.device("cpu"))
    return hand_on()


def check_loaded(model, mesh, report):
    return 7 if differences(model.state_dict(), EXPECTED) else 0


def test_the_transformers_builder_means_it_by_convert_null(checkpoints):
    assert run_ranks(2, run_command, checkpoints["hrm_text"]) == [0, 0]


@pytest.mark.parametrize(("saved", "loaded"), [("BertModel", "BertForMaskedLM"), ("BertForMaskedLM", "BertModel")])
def test_the_base_models_prefix_is_added_or_taken_off(tmp_path, saved, loaded):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL)
    getattr(transformers, saved)(config).save_pretrained(tmp_path)
    cls = getattr(transformers, loaded)
    made = dict(conversion_for(cls(config))(keys_of(tmp_path), None))
    expected = cls.from_pretrained(tmp_path).state_dict()
    encoder = [name for name in expected if "encoder" in name]
    assert encoder
    assert {*encoder} <= {*made}
    assert differences(made, {name: expected[name] for name in made}) == []


def edited(directory, tmp_path, edit):
    """The checkpoint again, with some keys made otherwise."""
    tensors = keys_of(directory)
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    return tmp_path


EXPERT = "model.layers.1.mlp.experts.2.gate_proj.weight"
LAYER = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def without_last_expert(tensors):
    for part in ("gate", "up"):
        del tensors[LAYER.format(3, part)]


def with_a_wide_expert(tensors):
    for part in ("gate", "up"):
        for number in range(4):
            tensors[LAYER.format(number, part)] = torch.zeros(17, 32)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(EXPERT), ConversionError, r"layers.1.*gate_up_proj: .*MergeModulelist and Concatenate failed"),
        (lambda t: t.pop(EXPERT), ConversionError, "3 keys as .*experts.0.gate_proj.weight without number 2"),
        (without_last_expert, CoverageError, r"layers.1.*gate_up_proj: .*shape is \[4, 32, 32\], .*\[3, 32, 32\]"),
        (with_a_wide_expert, CoverageError, r"layers.1.*gate_up_proj: .* \[4, 32, 32\], .*\[4, 34, 32\] from 4"),
        (lambda t: t.pop("lm_head.weight"), CoverageError, "lm_head.weight .* has no source"),
        (lambda t: t.update({"model.layers.2.mlp.gate.weight": torch.zeros(4)}), CoverageError, "layers.2.mlp.gate"),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_many_is_named_before_weights_are_read(checkpoints, tmp_path, edit, error, message):
    model = empty_model(checkpoints["qwen3_moe"])
    with pytest.raises(error, match=message):
        loader.load(model, str(edited(checkpoints["qwen3_moe"], tmp_path, edit)), convert="transformers")
