"""HF to torchtitan, bit for bit against torchtitan's own adapters, and its models' logits against HF's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import flex_attention

import loader
from loader.convert.named.torchtitan import convert, convert_fused
from loader.errors import CoverageError
from loader.trainers.torchtitan import load_hf_checkpoint
from tests.checkpoints import same_bits
from tests.grid import Family, write, wrong_shards
from tests.logits import assert_decide
from tests.ranks import run_ranks
from tests.torchtitan_models import MODELS, adapter, hf_model, save, torchtitan_config

LISTED = [name for name in MODELS if name != "gpt_oss"]
"""What torchtitan's own adapters have all the model's names for."""


def theirs(name: str):
    """torchtitan's function as it is; only its arguments are put in its order."""
    own = adapter(name, torchtitan_config(name))
    return lambda checkpoint, _: own.from_hf(dict(checkpoint))


def wrong(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """FQNs that only one has, or that differ in any bit. Adapters leave a new model's balancing bias to the model."""
    both = {fqn for fqn in {*ours, *expected} if fqn in expected or not fqn.endswith(".moe.expert_bias_E")}
    return [fqn for fqn in both if not (fqn in ours and fqn in expected and same_bits(ours[fqn], expected[fqn]))]


# ---------------------------------------------------------------- the whole, in one process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LISTED)
def test_it_is_what_torchtitan_converts(name, dtype, tmp_path):
    tensors, config = save(tmp_path, name, dtype)
    assert wrong(dict(convert(tensors, config)), theirs(name)(tensors, config)) == []


def test_gpt_oss_is_what_torchtitan_converts_but_for_the_experts_names(tmp_path):
    """Its adapter wants them as DCP reads MXFP4 ("blocks", outputs before inputs) and gives names without dims."""
    tensors, config = save(tmp_path, "gpt_oss")
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[f"{key}_blocks"] = tensors[key].transpose(1, 2)
    dims = {"mlp1_weight": "_EGD", "mlp1_bias": "_EG", "mlp2_weight": "_EDF", "mlp2_bias": "_ED"}
    found = theirs("gpt_oss")(tensors, config)
    named = {fqn + dims.get(fqn.rpartition(".")[2], ""): tensor for fqn, tensor in found.items()}
    assert wrong(dict(convert(tensors, config)), named) == []


@pytest.mark.parametrize("name", MODELS)
def test_traced_it_is_the_same(name, tmp_path):
    tensors, config = save(tmp_path, name)
    found = dict(loader.iter_convert(str(tmp_path), convert="torchtitan"))
    expected = dict(convert(tensors, config))
    assert list(found) == list(expected)
    assert wrong(found, expected) == []


@pytest.mark.parametrize("name", LISTED)
def test_torchtitans_own_function_traced_is_the_same(name, tmp_path):
    tensors, config = save(tmp_path, name)
    found = dict(loader.iter_convert(str(tmp_path), convert=theirs(name)))
    assert wrong(found, theirs(name)(tensors, config)) == []


# ---------------------------------------------------------------- torchtitan's models


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_of_torchtitan_is_filled_by_its_adapter_and_by_ours(name, fused, tmp_path):
    tensors, config = save(tmp_path, name)
    titan = torchtitan_config(name, fused=fused)
    expected = titan.build()
    expected.load_state_dict(dict(convert(tensors, config)), strict=True)
    for own in [None, adapter(name, titan)][: 2 if name in LISTED else 1]:
        model = garbage(titan)
        load_hf_checkpoint(model, str(tmp_path), own)
        assert wrong(model.state_dict(), expected.state_dict()) == []
    if fused and "deepseek" not in name:  # its attention has nothing to fuse
        model = garbage(titan)
        loader.load(model, str(tmp_path), convert=convert_fused)
        assert wrong(model.state_dict(), expected.state_dict()) == []


def garbage(titan) -> torch.nn.Module:
    model = titan.build()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.constant_(tensor, -1)
    return model


def test_what_torchtitans_own_adapter_loses(tmp_path):
    """Once this fails torchtitan has mended it: hold gpt_oss with the others then."""
    save(tmp_path, "gpt_oss")
    titan = torchtitan_config("gpt_oss")
    with pytest.raises(CoverageError, match=r"inner_experts.mlp1_weight_EGD .* has no source"):
        load_hf_checkpoint(titan.build(), str(tmp_path), adapter("gpt_oss", titan))


@pytest.fixture
def precise(monkeypatch):
    """torchtitan's kernels as torch has them without a compiler, and its experts in float32 instead of bfloat16."""
    from torchtitan.models.common.attention import FlexAttention

    monkeypatch.setattr(FlexAttention, "_compiled_flex_attn", staticmethod(flex_attention))
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


@pytest.mark.parametrize("name", [name for name in MODELS if "mtp" not in name])  # HF's model has no such layers
def test_the_torchtitan_model_says_what_the_hf_model_says(name, precise, tmp_path):
    tensors, config = save(tmp_path, name)
    model = torchtitan_config(name).build()
    model.init_states()
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = config.rms_norm_eps  # torchtitan has one for each family
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(24).repeat(2, 1)

    def logits(state: Mapping[str, Tensor]) -> Tensor:
        model.load_state_dict(state, strict=True)
        return model(tokens, positions, model.get_attention_masks(positions))

    with torch.no_grad():
        assert_decide(logits, dict(convert(tensors, config)), hf_model(name)(tokens).logits, tolerance=5e-4)


# ---------------------------------------------------------------- in ranks


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Every model in bfloat16, beside what torchtitan makes of it; q, k and v apart and fused."""
    directory, families = tmp_path_factory.mktemp("grid"), {}
    for name in MODELS:
        tensors, config = save(directory / name, name, torch.bfloat16)
        expected = dict(convert(tensors, config))
        expected |= theirs(name)(tensors, config) if name in LISTED else {}
        families[name] = Family(tensors, config.to_dict(), "torchtitan", expected)
        spec, expected = "loader.convert.named.torchtitan:convert_fused", dict(convert_fused(tensors, config))
        families[f"{name}, fused"] = families[name]._replace(convert=spec, expected=expected)
    write(directory / "all", families)
    return directory / "all"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_has_its_shards_of_the_conversion(grid, world_size):
    assert wrong_shards(grid, world_size) == []


def _load_stages(directory: str) -> list[str]:
    """Through torchtitan's adapter: two pipeline stages on two ranks, then the whole under FSDP2. Q, k and v fused."""
    found = []
    for name in ("llama", "qwen3_moe"):
        titan, at = torchtitan_config(name, fused=True), Path(directory, name)
        expected = load_file(at / "expected/model.safetensors")
        whole = garbage(titan)
        for layer in whole.layers.values():
            fully_shard(layer)
        fully_shard(whole)
        for parts in ([_stage(garbage(titan))], whole):
            load_hf_checkpoint(parts, str(at), adapter(name, titan))
            held = parts[0] if isinstance(parts, list) else parts
            state = {**dict(held.named_parameters()), **dict(held.named_buffers())}
            full = {
                fqn: t.full_tensor() if isinstance(t, DTensor) else t for fqn, t in state.items() if fqn in expected
            }
            found += [fqn for fqn, tensor in full.items() if not torch.equal(tensor, expected[fqn].to(tensor.dtype))]
            assert len(full) == len(expected) or parts is not whole
    return found


def _stage(model: torch.nn.Module) -> torch.nn.Module:
    """As torchtitan cuts a model: what belongs to other ranks is not there."""
    if torch.distributed.get_rank() == 0:
        model.norm = model.lm_head = None
        del model.layers["1"]
    else:
        model.tok_embeddings = None
        del model.layers["0"]
    return model


def test_stages_and_fsdp_through_torchtitans_own_adapter(tmp_path):
    for name in ("llama", "qwen3_moe"):
        tensors, config = save(tmp_path / name, name, torch.bfloat16)
        (tmp_path / name / "expected").mkdir()
        made = {fqn: tensor.contiguous().clone() for fqn, tensor in convert_fused(tensors, config)}
        save_file(made, tmp_path / name / "expected/model.safetensors")
    assert run_ranks(2, _load_stages, str(tmp_path)) == [[], []]


# ---------------------------------------------------------------- DeepSeek's layers of multi-token prediction


@pytest.fixture
def as_published(tmp_path):
    """A DeepSeek-V3 with its prediction layer as published: with copies of the embeddings and the head."""
    tensors, config = save(tmp_path, "deepseek_v3, mtp")
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    tensors |= {f"model.layers.2.{name}.weight": tensors[f"{key}.weight"].clone() for name, key in copies.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, dict(convert(tensors, config))


def test_a_model_with_or_without_them_is_filled(as_published):
    directory, made = as_published
    without = {fqn: torch.zeros_like(tensor) for fqn, tensor in made.items() if "mtp_layers." not in fqn}
    for state in (without, {fqn: torch.zeros_like(tensor) for fqn, tensor in made.items()}):
        loader.load(state, str(directory), convert="torchtitan")
        assert wrong(state, {fqn: made[fqn] for fqn in state}) == []
    for prediction, expected in ((False, without), (True, made)):
        titan = torchtitan_config("deepseek_v3, mtp", prediction=prediction)
        for own in (None, adapter("deepseek_v3", titan)):
            model = garbage(titan)
            load_hf_checkpoint(model, str(directory), own)
            assert wrong(model.state_dict(), expected) == []


@pytest.mark.parametrize(("fields", "layer"), [({"num_hidden_layers": 1}, 1), ({"num_nextn_predict_layers": 0}, 2)])
def test_a_layer_that_is_none_of_them_is_not_left_out(as_published, fields, layer):
    directory, made = as_published
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    known = ("tok_embeddings", "norm", "lm_head", *(f"layers.{n}." for n in range(layer)))
    state = {fqn: torch.zeros_like(tensor) for fqn, tensor in made.items() if fqn.startswith(known)}
    with pytest.raises(CoverageError, match=rf"checkpoint keys have no target: model\.layers\.{layer}\."):
        loader.load(state, str(directory), convert="torchtitan")
