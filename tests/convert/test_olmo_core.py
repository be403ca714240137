"""HF to OLMo-core, bit for bit against OLMo-core's own conversion where that is right, and by the logits everywhere."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loader
from loader.convert.conversion import Checkpoint, visible_keys
from loader.convert.graph import Node
from loader.convert.lazy import trace
from loader.convert.named.olmo_core import convert, convert_dropless, families
from loader.errors import CoverageError
from loader.place.landing import Landings
from loader.plan.catalog import Catalog, Entry, File
from loader.plan.geometry import Box, whole
from tests.checkpoints import same_bits
from tests.grid import Family, write, wrong_shards
from tests.logits import assert_decide
from tests.olmo_core_models import MODELS, hf_model, linear_attention, olmo_core_model, save

NOT_LISTED = ("mistral", "qwen2", "qwen3_moe", "olmoe")
"""Model types that OLMo-core's conversion gives two norms one name for."""

BIASED = ("llama, biases",)
"""It refuses these."""

RIGHT = [name for name in MODELS if not name.startswith(NOT_LISTED) and name not in BIASED]
DROPLESS = ("qwen3_moe", "olmoe", "flex_olmo")
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


@pytest.mark.parametrize("name", DROPLESS)
def test_a_dropless_model_says_it_too(name, tmp_path):
    tensors, config = save(tmp_path, name)
    assert_same_logits(olmo_core_model(config, dropless=True), dict(convert_dropless(tensors, config)), name)


def assert_same_logits(model: torch.nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    tokens = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits(state: Mapping[str, Tensor]) -> Tensor:
        model.load_state_dict(state, strict=True)
        return model(tokens)

    with torch.no_grad():
        assert_decide(logits, state, hf_model(name)(tokens).logits, tolerance=1e-4)


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


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Every model in bfloat16, beside what OLMo-core makes of it where that is right, else the whole conversion."""
    directory, families = tmp_path_factory.mktemp("grid"), {}
    for name in MODELS:
        tensors, config = save(directory / name, name, torch.bfloat16)
        expected = theirs(tensors, config) if name in RIGHT else dict(convert(tensors, config))
        families[name] = Family(tensors, config.to_dict(), "olmo_core", expected)
        if name in DROPLESS:
            spec, expected = "loader.convert.named.olmo_core:convert_dropless", dict(convert_dropless(tensors, config))
            families[f"{name}, dropless"] = families[name]._replace(convert=spec, expected=expected)
    write(directory / "all", families)
    return directory / "all"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_has_its_shards_of_the_conversion(grid, world_size):
    assert wrong_shards(grid, world_size) == []


@pytest.mark.parametrize("convert_by", ["olmo_core", theirs])
def test_our_own_function_and_olmo_cores_stream(convert_by, tmp_path):
    tensors, config = save(tmp_path, "flex_olmo", torch.bfloat16)
    assert wrong(dict(loader.iter_convert(str(tmp_path), convert=convert_by)), theirs(tensors, config)) == []


# ---------------------------------------------------------------- what does not fit


def test_experts_for_a_model_of_another_layout(tmp_path):
    """A dropless model's w1: the same elements, another shape."""
    state = {fqn: torch.empty_like(tensor) for fqn, tensor in convert(*save(tmp_path, "olmoe"))}
    for fqn in state:
        if fqn.endswith(("mlp.w1", "mlp.w3")):
            state[fqn] = torch.empty(4 * 24, 32)
    with pytest.raises(CoverageError) as caught:
        loader.load(state, str(tmp_path), convert="olmo_core")
    assert "experts.mlp.w1: the model's shape is [96, 32], the checkpoint's [128, 24], of model.layers.0.mlp." in str(
        caught.value
    )
    assert "experts.3.gate_proj.weight [24, 32]" in str(caught.value)
    loader.load(state, str(tmp_path), convert="loader.convert.named.olmo_core:convert_dropless")


# ---------------------------------------------------------------- one more model type


def test_the_readmes_family_is_right(tmp_path, monkeypatch):
    """phi3, by the lines that README shows, beside the same model as a llama."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(def phi3.*?)```", readme, re.DOTALL)
    tensors, config = save(tmp_path, "llama")
    expected = dict(convert(tensors, config))
    for layer in ("model.layers.0.", "model.layers.1."):
        for fused, parts in {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}.items():
            names = [f"{layer}{fused.partition('.')[0]}.{part}_proj.weight" for part in parts]
            tensors[f"{layer}{fused}.weight"] = torch.cat([tensors.pop(name) for name in names])
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    exec(lines, vars(families).copy())
    config.model_type = "phi3"
    assert wrong(dict(convert(tensors, config)), expected) == []
