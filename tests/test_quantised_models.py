"""Quantised checkpoints of whole models, in ranks: loaded as if they were plain, or kept as they are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import loader
from loader.config import Config
from loader.convert.named.torchtitan import convert as to_torchtitan
from loader.errors import ConfigError
from loader.exchange.control import Control
from loader.place.transformers_builder import config_of
from loader.run import run
from tests.checkpoints import same_bits
from tests.convert.test_quantised import groups, large, save
from tests.quantised import in_blocks, mxfp4, one_scale, quantised_copy
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard

FILE = "model.safetensors"
DIM = 64
SMALL = {
    "hidden_size": DIM, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 104, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SMALL, n_routed_experts=4, moe_intermediate_size=24, num_experts_per_tok=2, n_group=2, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    ),
    "gpt_oss": transformers.GptOssConfig(**SMALL, num_local_experts=4, head_dim=8, num_experts_per_tok=2),
}  # fmt: skip
INPUT = {"input_scale": torch.ones(1), "weight_zero_point": torch.zeros(1, dtype=torch.float8_e4m3fn)}
QUANTISED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "blocks": ("deepseek_v3", in_blocks((12, 20)), {"quant_method": "fp8", "weight_block_size": [12, 20]}),
    "e8m0": (
        "llama",
        in_blocks((12, 20), torch.float8_e8m0fnu),
        {"quant_method": "fp8", "weight_block_size": [12, 20], "scale_fmt": "ue8m0"},
    ),
    "tensor": ("llama", one_scale(lambda _: (), "_scale_inv"), {"quant_method": "fp8", "weight_block_size": None}),
    "static tensor": ("llama", one_scale(lambda _: (1,), "_scale", **INPUT), groups(strategy="tensor")),
    "channel": ("llama", one_scale(lambda t: (t.shape[0], 1), "_scale"), groups(strategy="channel")),
    "flat channel": ("llama", one_scale(lambda t: (t.shape[0],), "_scale"), groups(strategy="channel")),
    "ct blocks": (
        "llama",
        in_blocks((12, 20), torch.bfloat16, "_scale"),
        groups(strategy="block", block_structure=[12, 20]),
    ),
    "ct groups": ("llama", in_blocks((1, 20), torch.bfloat16, "_scale"), groups(strategy="group", group_size=20)),
    "mxfp4": ("gpt_oss", mxfp4, {"quant_method": "mxfp4"}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """By name, `quantised` beside `plain`, what it means."""
    directory = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, config in MODELS.items():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / "models" / name)
    for name, (model, quantise, config) in QUANTISED.items():
        quantised_copy(directory / "models" / model, directory / name, quantise, config)
    return directory


LAYOUTS = {
    "fsdp": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(-1)]),
    "hsdp": ((2, 2), [Replicate(), Shard(1)]),
    "both dims": ((2, 2), [Shard(0), Shard(1)]),
}


def load_states(checkpoints: Path, world_size: int) -> dict[str, list[str]]:
    """Each quantised checkpoint as a state dict, through torchtitan's layout where it knows the model: what differs."""
    found = {}
    layouts = LAYOUTS if world_size == 4 else {"alone": ((1,), [Replicate()])}
    meshes = {name: init_device_mesh("cpu", sizes) for name, (sizes, _) in layouts.items()}
    for name in QUANTISED:
        plain = load_file(checkpoints / name / "plain" / FILE)
        config = config_of(json.loads((checkpoints / name / "plain" / "config.json").read_text()))
        for convert in (None, "torchtitan"):
            whole = dict(to_torchtitan(plain, config)) if convert else plain
            for layout, (_, placements) in layouts.items():
                sharded = {fqn: shard(tensor, meshes[layout], fit(tensor, placements)) for fqn, tensor in whole.items()}
                state = {fqn: blank(tensor) for fqn, tensor in sharded.items()}
                loader.load(state, str(checkpoints / name / "quantised"), convert=convert, memory_budget="16MiB")
                found[f"{name}, {convert}, {layout}"] = differences(state, sharded)
    return found


def fit(tensor: Tensor, placements: list[Any]) -> list[Any]:
    return [p if not isinstance(p, Shard) or p.dim < tensor.ndim else Replicate() for p in placements]


@pytest.mark.parametrize("world_size", [1, 4])
def test_state_dicts_hold_what_is_meant(checkpoints, world_size) -> None:
    for found in run_ranks(world_size, load_states, checkpoints, world_size):
        assert {case: fqns for case, fqns in found.items() if fqns} == {}
        assert len(found) == len(QUANTISED) * 2 * (4 if world_size == 4 else 1)


MESHES = {1: [{"dp_shard": 1}], 4: [{"dp_shard": 4}, {"dp_shard": 2, "tp": 2}]}


def run_command(checkpoints: Path, name: str, mesh: dict[str, int], **model: Any) -> int:
    """The command's exit code: 0 where the model holds what the checkpoint that is meant does, loaded the same way."""
    global EXPECTED  # noqa: PLW0603 - the entrypoint is called with nothing of ours
    codes = []
    for kind in ("exact" if "dtype" in model else "plain", "quantised"):
        EXPECTED = SEEN if kind == "quantised" else None
        config = Config.model_validate(
            {"source": {"uri": str(checkpoints / name / kind)}, "model": model, "mesh": mesh,
             "report": None, "output": {"entrypoint": f"{__name__}:compare"}}
        )  # fmt: skip
        with Control.of_group() as control:
            codes.append(run(config, control, torch.device("cpu"))())
    return max(codes)


def compare(model: Any, mesh: Any, report: Any) -> int:
    global SEEN  # noqa: PLW0603
    state = model if isinstance(model, dict) else model.state_dict()
    SEEN = {fqn: (t.to_local() if isinstance(t, DTensor) else t).clone() for fqn, t in state.items()}
    if EXPECTED is None:
        return 0
    return int(SEEN.keys() != EXPECTED.keys() or not all(same_bits(SEEN[fqn], EXPECTED[fqn]) for fqn in SEEN))


def run_commands(checkpoints: Path, world_size: int) -> list[str]:
    return [
        f"{name}, {mesh}, {model}"
        for name in ("blocks", "static tensor", "mxfp4")
        for mesh in MESHES[world_size]
        for model in ({}, {"dtype": "float32"}, {"builder": None}, {"builder": None, "dtype": "float16"})
        if not (name == "mxfp4" and model.get("builder", "transformers") and "tp" in mesh)
        if run_command(checkpoints, name, mesh, **model)
    ]


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_command_loads_them_as_if_they_were_plain(checkpoints, world_size) -> None:
    assert run_ranks(world_size, run_commands, checkpoints, world_size) == [[]] * world_size


def run_kept(directory: str, **model: Any) -> int:
    global EXPECTED  # noqa: PLW0603
    EXPECTED = large()
    config = {"source": {"uri": directory}, "model": {"builder": None, "dequantize": False, **model}, "report": None,
              "mesh": {"dp_shard": 1}, "output": {"entrypoint": f"{__name__}:compare"}}  # fmt: skip
    with Control.of_group() as control:
        return run(Config.model_validate(config), control, torch.device("cpu"))()


def run_kept_ones(directory: str) -> int:
    return run_kept(directory, dtype="bfloat16")


def run_kept_model(directory: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_kept(directory, builder="transformers")
    return caught.value.message


def test_dequantize_false_keeps_weights_and_scales_as_they_are(tmp_path, checkpoints) -> None:
    assert run_ranks(1, run_kept_ones, save(tmp_path, large(), {"quant_method": "gptq"})) == [0]
    assert "model.dequantize" in run_ranks(1, run_kept_model, str(checkpoints / "blocks" / "quantised"))[0]
