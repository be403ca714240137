"""A checkpoint that does not fit its config, through each trainer's conversion: told by key, FQN and shapes, unread."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import Tensor

import loader
from loader.errors import BuilderError, ConversionError, CoverageError, UserError
from loader.init_from_hf import main
from loader.job import conversion_of
from tests import olmo_core_models, torchtitan_models
from tests.proxy import CountingProxy
from tests.ranks import run_ranks

FILE = "model.safetensors"
MODELS = {"olmo_core": olmo_core_models, "torchtitan": torchtitan_models, "transformers": olmo_core_models}
"""By conversion, who writes a checkpoint for it: qwen3_moe has 2 layers of 4 heads, 2 for keys, and 4 experts."""

Keys, Fields = dict[str, Tensor], dict[str, Any]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def another_type(_: Keys, config: Fields) -> None:
    config.update(model_type="qwen3_next_moe", architectures=["Qwen3NextMoeForCausalLM"])


def no_type(_: Keys, config: Fields) -> None:
    del config["model_type"]


def no_expert(keys: Keys, _: Fields) -> None:
    del keys[EXPERT]


def odd_expert(keys: Keys, _: Fields) -> None:
    keys[EXPERT] = torch.zeros(7, 32)


def no_head(keys: Keys, _: Fields) -> None:
    del keys["lm_head.weight"]


def layer_more(keys: Keys, _: Fields) -> None:
    keys |= {key.replace("layers.1.", "layers.2."): torch.zeros(3) for key in keys if "layers.1." in key}


def layer_fewer(keys: Keys, _: Fields) -> None:
    for key in [key for key in keys if "layers.1." in key]:
        del keys[key]


def odd_heads(_: Keys, config: Fields) -> None:
    config["num_attention_heads"] = 8


def odd_key_heads(_: Keys, config: Fields) -> None:
    config["num_key_value_heads"] = 4


def indivisible(_: Keys, config: Fields) -> None:
    config.update(num_attention_heads=5, head_dim=None)


def indivisible_rows(keys: Keys, _: Fields) -> None:
    keys["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(63, 32)


class Case(NamedTuple):
    convert: str
    edit: Callable[[Keys, Fields], None]
    error: type[UserError]
    words: Sequence[str]
    model: str = "qwen3_moe"


Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
NO_EXPERT = f"the conversion needs key '{EXPERT}', which the checkpoint does not have; the nearest that there are"
NO_HEAD = "the checkpoint has no key 'lm_head.weight', and its config does not tie it"
MORE = ["21 checkpoint keys have no target", "layers.2.input_layernorm.weight [3]", "and 11 more", "source.ignore"]
BY_HEADS = f"{Q} is [64, 32], but the config's num_attention_heads 8, of 16 each, make its dim 0 128 long"
BY_KEY_HEADS = f"{K} is [32, 32], but the config's num_key_value_heads 4, of 16 each, make its dim 0 64 long"
BY_ROWS = f"{Q} is [63, 32], but the config's num_attention_heads 4, of 16 each, make its dim 0 64 long"
ODD = [EXPERT, "[7, 32]", "experts.0.up_proj.weight", "[24, 32]"]
INDIVISIBLE = ["config.json", "The hidden size (32) is not a multiple of the number of attention heads (5)"]


def ours(convert: str, stack: str, head: str, query: str, key: str, first: str) -> list[Case]:
    """For a conversion of our own, with its FQNs."""
    return [
        Case(convert, edit, ConversionError, words)
        for edit, words in {
            another_type: ["'qwen3_next_moe'", f"convert: {convert} knows", "nearest is qwen3_moe", "package.module:"],
            no_type: ["has no model_type", f"convert: {convert} knows", "package.module:function"],
            no_expert: [f"{stack}: {NO_EXPERT}"],
            odd_expert: [f"{stack}: ", *ODD],
            no_head: [f"{head}: {NO_HEAD}", "tie_word_embeddings"],
            layer_fewer: [f"{first}: the conversion needs key 'model.layers.1."],
            odd_heads: [f"{query}: key {BY_HEADS}"],
            odd_key_heads: [f"{key}: key {BY_KEY_HEADS}"],
            indivisible_rows: [f"{query}: key {BY_ROWS}"],
        }.items()
    ]


STACKS = {
    "olmo_core": "blocks.1.feed_forward_moe.experts.mlp.w3",
    "torchtitan": "layers.1.moe.routed_experts.inner_experts.w3_EFD",
    "transformers": "model.layers.1.mlp.experts.gate_up_proj",
}
CASES = [
    *ours(
        "olmo_core",
        STACKS["olmo_core"],
        "lm_head.w_out.weight",
        "blocks.0.attention.w_q.weight",
        "blocks.0.attention.w_k.weight",
        "blocks.1.attention.w_q.weight",
    ),
    *ours(
        "torchtitan",
        STACKS["torchtitan"],
        "lm_head.weight",
        "layers.0.attention.qkv_linear.wq.weight",
        "layers.0.attention.qkv_linear.wk.weight",
        "layers.1.attention_norm.weight",
    ),
    Case("torchtitan", odd_heads, ConversionError, ["wq.weight: key", "[4096, 32]", "512 long"], "gpt_oss"),
    Case("torchtitan", odd_heads, ConversionError, ["wkv_b.weight: key", "[128, 8]", "256 long"], "deepseek_v3"),
    Case("transformers", another_type, BuilderError, ["Qwen3NextMoeForCausalLM", "(it has Qwen3NextForCausalLM"]),
    Case(
        "transformers",
        no_expert,
        ConversionError,
        [STACKS["transformers"], "3 keys", "up_proj.weight without number 3"],
    ),
    Case("transformers", odd_expert, ConversionError, [f"{STACKS['transformers']}: ", *ODD]),
    Case("transformers", no_head, CoverageError, ["lm_head.weight [96, 32] has no source", "source.ignore"]),
    Case("transformers", layer_fewer, CoverageError, ["model.layers.1.", "has no source", "nearest"]),
    Case("transformers", indivisible_rows, CoverageError, [f"{Q}: the model's shape is [64, 32]", "[63, 32]"]),
    *(Case(convert, layer_more, CoverageError, MORE) for convert in MODELS),
    *(Case(convert, indivisible, BuilderError, INDIVISIBLE, "llama") for convert in MODELS),
]


def spoilt(directory: Path, case: Case) -> dict[str, Tensor]:
    """Write the case's checkpoint as one file; what the whole one fills, with nothing in it yet."""
    keys, config = MODELS[case.convert].save(directory, case.model)
    state = {fqn: torch.zeros(t.shape) for fqn, t in conversion_of(case.convert)(keys, config)}
    fields = json.loads((directory / "config.json").read_text())
    case.edit(keys, fields)
    shutil.rmtree(directory)
    directory.mkdir()
    save_file({key: tensor.clone() for key, tensor in keys.items()}, directory / FILE)
    (directory / "config.json").write_text(json.dumps(fields))
    return state


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.convert}-{case.edit.__name__}-{case.model}")
def test_it_is_told_before_weights_are_read(case, s3, tmp_path) -> None:
    state = spoilt(tmp_path / "checkpoint", case)
    with CountingProxy(s3.endpoint) as proxy, pytest.raises(case.error) as caught:
        loader.load(
            state,
            s3.put(tmp_path / "checkpoint"),
            convert=case.convert,
            storage_options=s3.at(proxy.url).storage_options,
        )
    assert all(words in caught.value.message for words in case.words), caught.value.message
    assert "Traceback" not in caught.value.message
    assert proxy.gets(FILE) == 1  # its header
    assert not any(tensor.any() for tensor in state.values())


def command(convert: str, directory: str, builder: str | None) -> int:
    sections: Mapping[str, Any] = {
        "source": {"uri": directory},
        "model": {"builder": builder, "device": "cpu"},
        "mesh": {"dp_shard": -1},
        "convert": convert,
        "report": None,
    }
    path = Path(directory, f"cfg-{os.environ['RANK']}.yaml")
    YAML().dump(dict(sections), path)
    return main(["--config", str(path)])


@pytest.mark.parametrize(
    ("case", "builder", "words"),
    [
        (Case("olmo_core", odd_heads, ConversionError, []), None, ["num_attention_heads 8", Q]),
        (Case("torchtitan", no_expert, ConversionError, []), None, [EXPERT, STACKS["torchtitan"]]),
        (
            Case("transformers", odd_heads, CoverageError, []),
            "transformers",
            [f"{Q}: the model's shape is [128, 32], the checkpoint's [64, 32]"],
        ),
    ],
)
def test_the_command_ends_with_2(case, builder, words, tmp_path) -> None:
    spoilt(tmp_path / "checkpoint", case)
    outcomes = run_ranks(2, command, case.convert, str(tmp_path / "checkpoint"), builder, init=False, outcomes=True)
    for rank, outcome in enumerate(outcomes):
        assert outcome.report == "died: exit code 2", outcome
        assert f"rank {rank}: {case.error.__name__}: " in outcome.output
        assert all(each in outcome.output for each in words), outcome.output
        assert "Traceback" not in outcome.output
