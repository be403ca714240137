"""HF to OLMo-core, bit for bit against OLMo-core's own conversion where that is right, and by the logits everywhere."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from loader.convert.conversion import Checkpoint, visible_keys
from loader.convert.graph import Node
from loader.convert.lazy import trace
from loader.convert.olmo_core import convert, convert_dropless
from loader.errors import ConversionError, CoverageError
from loader.place.landing import Landings
from loader.plan.catalog import Catalog, Entry, File
from loader.plan.geometry import Box, whole
from tests.checkpoints import same_bits
from tests.olmo_core_models import MODELS, hf_model, linear_attention, olmo_core_model, save
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard

NOT_LISTED = ("mistral", "qwen2", "qwen3_moe", "olmoe")
"""Model types that OLMo-core's conversion gives two norms one name for."""

BIASED = ("llama, biases",)
"""It refuses these."""

RIGHT = [name for name in MODELS if not name.startswith(NOT_LISTED) and name not in BIASED]
DENSE_AND_EXPERTS = ("qwen3_moe, some layers dense",)


def theirs(checkpoint: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """OLMo-core's function as it is; only its arguments are put in its order."""
    from olmo_core.nn.hf.convert import convert_state_from_hf  # takes seconds, and ranks have no use for it

    return convert_state_from_hf(config, dict(checkpoint), model_type=config.model_type)


def wrong(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    assert set(ours) == set(expected)
    return [fqn for fqn in expected if not same_bits(ours[fqn], expected[fqn])]


# ---------------------------------------------------------------- the whole, in one process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RIGHT)
def test_it_is_what_olmo_core_converts(name, dtype, tmp_path):
    tensors, config = save(tmp_path, name, dtype)
    assert wrong(dict(convert(tensors, config)), theirs(tensors, config)) == []


def test_linear_attention_layers_are_what_olmo_core_converts(tmp_path):
    tensors, config = save(tmp_path, "olmo3moe")
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    tensors = linear_attention(tensors, 1)
    ours = dict(convert(tensors, config))
    assert "blocks.1.attention.g_proj_2.bias" in ours
    assert wrong(ours, theirs(tensors, config)) == []


def test_gemmas_norms_are_one_more_rounded_in_the_checkpoints_dtype(tmp_path):
    tensors, config = save(tmp_path, "gemma3_text", torch.bfloat16)
    ours = dict(convert(tensors, config))
    norms = [fqn for fqn in ours if fqn.endswith("norm.weight")]
    assert len(norms) == 2 * 6 + 1
    key = tensors["model.layers.1.pre_feedforward_layernorm.weight"]
    assert same_bits(ours["blocks.1.feed_forward_norm.weight"], (key.float() + 1).to(torch.bfloat16))
    assert not torch.equal(ours["blocks.1.feed_forward_norm.weight"].float(), key.float() + 1)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_gemma_beside_an_image_model(prefix, tmp_path):
    tensors, config = save(tmp_path, "gemma3_text")
    outer = type("Gemma3Config", (), {"model_type": "gemma3", "text_config": config})()
    moved = {key.replace("model.", prefix, 1): tensor for key, tensor in tensors.items()}
    assert wrong(dict(convert(moved, outer)), dict(convert(tensors, config))) == []


# ---------------------------------------------------------------- logits: the judge of what nothing else can say


@pytest.mark.parametrize("name", [name for name in MODELS if "olmo3moe" not in name and name not in DENSE_AND_EXPERTS])
def test_the_olmo_core_model_says_what_the_hf_model_says(name, tmp_path):
    tensors, config = save(tmp_path, name)
    assert_same_logits(olmo_core_model(config), dict(convert(tensors, config)), name)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "flex_olmo"])
def test_a_dropless_model_says_it_too(name, tmp_path):
    tensors, config = save(tmp_path, name)
    assert_same_logits(olmo_core_model(config, dropless=True), dict(convert_dropless(tensors, config)), name)


def assert_same_logits(model: torch.nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    model.load_state_dict(state, strict=True)
    tokens = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf_model(name)(tokens).logits
        found = model(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen3_moe", "olmoe"])
def test_what_olmo_cores_own_conversion_loses(name, tmp_path):
    """Once this fails OLMo-core has learned them: hold them bit for bit then."""
    tensors, config = save(tmp_path, name)
    lost = set(dict(convert(tensors, config))) - set(theirs(tensors, config))
    assert lost == {"blocks.0.feed_forward_norm.weight", "blocks.1.feed_forward_norm.weight"}


@pytest.mark.parametrize("name", ["qwen2", "llama, biases"])
def test_biases_are_what_it_refuses(name, tmp_path):
    tensors, config = save(tmp_path, name)
    with pytest.raises(RuntimeError, match=r"not converted: .*self_attn\.k_proj\.bias"):
        theirs(tensors, config)


# ---------------------------------------------------------------- traced and pulled back


def lazily(tensors: Mapping[str, Tensor]) -> Checkpoint:
    entries, at = {}, 0
    for key, tensor in tensors.items():
        entries[key] = Entry(tensor.dtype, tuple(tensor.shape), 0, at, at + tensor.nbytes)
        at += tensor.nbytes
    return Checkpoint(visible_keys(Catalog((File("f", at, "pin", 0),), entries), (), ""))


def pulled(node: Node, box: Box, sources: Sequence[Tensor]) -> Tensor:
    landings, view = Landings(1 << 20), torch.full(box.sizes, -1, dtype=node.dtype)
    needs = landings.add(node, box, view)
    landings.fill()
    for key, part in needs:
        landings.land(key, part, sources[key][part.slices()])
    return view


def boxes(shape: Sequence[int], seed: int) -> Iterator[Box]:
    yield whole(shape)
    rng = random.Random(seed)
    for _ in range(3):
        offsets = tuple(rng.randrange(size) for size in shape)
        yield Box(offsets, tuple(rng.randint(1, size - at) for at, size in zip(offsets, shape, strict=True)))


@pytest.mark.parametrize(
    ("conversion", "name"), [(convert, name) for name in MODELS] + [(theirs, name) for name in RIGHT]
)
def test_pulled_back_boxes_are_slices_of_the_whole(conversion, name, tmp_path):
    tensors, config = save(tmp_path, name)
    nodes = trace(conversion, lazily(tensors), config)
    expected = dict(conversion(tensors, config))
    assert list(nodes) == list(expected)
    for seed, (fqn, tensor) in enumerate(expected.items()):
        for box in boxes(tensor.shape, seed):
            found = pulled(nodes[fqn], box, list(tensors.values()))
            assert same_bits(found, tensor[box.slices()]), (fqn, box)


# ---------------------------------------------------------------- in ranks

R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
LAYOUTS = {
    1: [((1,), [ROWS])],
    2: [((2,), [ROWS]), ((2,), [COLUMNS])],
    4: [((2, 2), [R, ROWS]), ((2, 2), [ROWS, COLUMNS]), ((4,), [COLUMNS]), ((4,), [ROWS])],
}
"""By world size: FSDP, HSDP, TP by rows and columns, and both. A model takes one, the next model the next."""


def _load_all(directory: str, world_size: int) -> list[str]:
    found = []
    meshes = {sizes: init_device_mesh("cpu", sizes) for sizes, _ in LAYOUTS[world_size]}
    for name, (sizes, placements) in zip(MODELS, itertools.cycle(LAYOUTS[world_size]), strict=False):
        at = Path(directory, name)
        expected = load_file(at / "expected" / "all.safetensors")
        sharded = {fqn: shard(tensor, meshes[sizes], placements) for fqn, tensor in expected.items()}
        state = {fqn: blank(each) for fqn, each in sharded.items()}
        loader.load(state, str(at), convert="olmo_core", range_size="64KiB")
        found += [f"{name}, {placements}: {fqn}" for fqn in differences(state, sharded)]
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every model in bfloat16, beside what the whole conversion makes of it."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        tensors, config = save(directory / name, name, torch.bfloat16)
        (directory / name / "expected").mkdir()
        made = {fqn: tensor.contiguous().clone() for fqn, tensor in convert(tensors, config)}
        save_file(made, directory / name / "expected" / "all.safetensors")
    return directory


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_has_its_shards_of_the_conversion(checkpoints, world_size):
    assert run_ranks(world_size, _load_all, str(checkpoints), world_size) == [[]] * world_size


def test_olmo_cores_own_function_streams(checkpoints):
    at = checkpoints / "flex_olmo"
    expected = load_file(at / "expected" / "all.safetensors")
    assert wrong(dict(loader.iter_convert(str(at), convert=theirs)), expected) == []


# ---------------------------------------------------------------- what does not fit


def failure(tensors: Mapping[str, Tensor], config) -> str:
    with pytest.raises(ConversionError) as caught:
        trace(convert, lazily(tensors), config)
    return caught.value.message


def test_a_model_type_that_is_not_known(tmp_path):
    _, config = save(tmp_path, "qwen3_moe")
    config.model_type = "qwen3_next"
    message = failure({}, config)
    assert "no model type 'qwen3_next'" in message
    assert all(known in message for known in ("llama", "olmo3moe", "gemma3_text"))
    assert "the nearest is qwen3" in message


def test_a_missing_expert(tmp_path):
    tensors, config = save(tmp_path, "qwen3_moe")
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    message = failure(tensors, config)
    assert message.startswith("blocks.1.feed_forward_moe.experts.mlp.w2: the conversion needs key 'model.layers.1.mlp.")
    assert "experts.3.down_proj.weight'" in message


def test_an_expert_of_another_shape(tmp_path):
    tensors, config = save(tmp_path, "olmoe")
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"] = torch.zeros(24, 31)
    message = failure(tensors, config)
    assert message.startswith(
        "blocks.0.feed_forward_moe.experts.mlp.w3: key model.layers.0.mlp.experts.2.up_proj.weight"
    )
    assert "[24, 31]" in message
    assert "[24, 32]" in message


def test_no_lm_head_though_the_config_does_not_tie(tmp_path):
    tensors, config = save(tmp_path, "mistral")
    del tensors["lm_head.weight"]
    message = failure(tensors, config)
    assert message.startswith("lm_head.w_out.weight: the conversion needs key 'lm_head.weight'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 4}, ["w_k.weight", "k_proj.weight is [16, 32]", "num_key_value_heads 4", "32 long"]),
        ({"num_attention_heads": 8, "head_dim": 8}, ["w_q.weight", "q_proj.weight is [32, 32]", "64 long"]),
        ({"num_attention_heads": 5, "head_dim": None}, ["hidden_size 32 does not divide by num_attention_heads 5"]),
    ],
)
def test_heads_that_are_not_the_configs(change, words, tmp_path):
    tensors, config = save(tmp_path, "llama")
    for name, value in change.items():
        setattr(config, name, value)
    message = failure(tensors, config)
    assert message.startswith("blocks.0.attention.w_")
    assert all(word in message for word in words), message


def test_experts_for_a_model_of_another_layout(checkpoints):
    """A dropless model's w1: the same elements, another shape."""
    at = checkpoints / "olmoe"
    state = {fqn: torch.empty_like(t) for fqn, t in load_file(at / "expected" / "all.safetensors").items()}
    for fqn in state:
        if fqn.endswith(("mlp.w1", "mlp.w3")):
            state[fqn] = torch.empty(4 * 24, 32)
    with pytest.raises(CoverageError) as caught:
        loader.load(state, str(at), convert="olmo_core")
    assert "experts.mlp.w1: the model's shape is [96, 32], the checkpoint's [128, 24], of model.layers.0.mlp." in str(
        caught.value
    )
    assert "experts.3.gate_proj.weight [24, 32]" in str(caught.value)
    loader.load(state, str(at), convert="loader.convert.olmo_core:convert_dropless")


def test_a_layer_more_than_the_config_has(tmp_path):
    tensors, config = save(tmp_path, "olmo2")
    state = {fqn: torch.empty_like(tensor) for fqn, tensor in convert(tensors, config)}
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 1}))
    fewer = {fqn: tensor for fqn, tensor in state.items() if "blocks.1." not in fqn}
    with pytest.raises(
        CoverageError, match=r"11 checkpoint keys have no target: model\.layers\.1\.mlp\.down_proj\.weight \[32, 48\], "
    ):
        loader.load(fewer, str(tmp_path), convert="olmo_core")
    with pytest.raises(CoverageError, match=r"blocks\.1\.attention.* \[.*\] has no source"):
        loader.load(state, str(tmp_path), convert="olmo_core")
