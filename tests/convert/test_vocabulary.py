"""More tokens in the model than in the checkpoint, or fewer: zeros or nothing, in shards, and only where allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import loader
from launch.local_checkpoints import tiny_llama
from loader.config import Config
from loader.convert.named.torchtitan import convert as to_torchtitan
from loader.errors import CoverageError
from loader.exchange.control import Control
from loader.place.transformers_builder import config_of
from loader.run import run
from tests.checkpoints import same_bits
from tests.modules import module_of
from tests.ranks import run_ranks

ROWS, WORLD = 50, 2
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of ROWS tokens, which is also a layer's number of rows: it must stay as it is."""
    return tiny_llama(tmp_path, files=1, vocab_size=ROWS, **{**SMALL, "intermediate_size": ROWS})


def resized(tensors: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """As the model is to be."""
    found = {}
    for fqn, tensor in tensors.items():
        ends = fqn.endswith(("embed_tokens.weight", "tok_embeddings.weight", "lm_head.weight"))
        found[fqn] = torch.cat([tensor, tensor.new_zeros(max(0, rows - ROWS), 16)])[:rows] if ends else tensor
    return found


def build(hf_config: Any, mesh: Any) -> nn.Module:
    return module_of(EXPECTED, mesh["dp_shard"])


def check(model: nn.Module, mesh: Any, report: Any) -> int:
    global NEEDED  # noqa: PLW0603
    NEEDED = report.needed_bytes
    state = {fqn: t.full_tensor() if isinstance(t, DTensor) else t for fqn, t in model.state_dict().items()}
    return int(state.keys() != EXPECTED.keys() or not all(same_bits(state[fqn], EXPECTED[fqn]) for fqn in state))


def load(directory: Path, rows: int, builder: str, convert: str | None, vocabulary: dict[str, bool]) -> tuple[int, int]:
    """The exit code, and the bytes that were needed."""
    global EXPECTED  # noqa: PLW0603
    tensors = load_file(directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    made = dict(to_torchtitan(tensors, config_of(fields))) if convert else tensors
    EXPECTED = resized(made, rows)
    torch.distributed.barrier()  # both have read it
    if builder == "transformers" and torch.distributed.get_rank() == 0:  # which builds what the config says
        (directory / "config.json").write_text(json.dumps({**fields, "vocab_size": rows}))
    config = {"source": {"uri": str(directory)}, "model": {"builder": builder, "vocabulary": vocabulary},
              "convert": convert, "mesh": {"dp_shard": WORLD}, "report": None,
              "output": {"entrypoint": f"{__name__}:check"}}  # fmt: skip
    torch.distributed.barrier()
    with Control.of_group() as control:
        return run(Config.model_validate(config), control, torch.device("cpu"))(), NEEDED


MINE = f"{__name__}:build"


@pytest.mark.parametrize("rows", [64, 33])
@pytest.mark.parametrize(("builder", "convert"), [("transformers", None), (MINE, None), (MINE, "torchtitan")])
def test_rows_are_added_as_zeros_or_left_out_and_not_read(checkpoint, rows, builder, convert) -> None:
    needed = sum(t.nbytes for t in resized(load_file(checkpoint / "model.safetensors"), min(rows, ROWS)).values())
    allowed = {"pad": rows > ROWS, "cut": rows < ROWS}
    assert run_ranks(WORLD, load, checkpoint, rows, builder, convert, allowed) == [(0, needed)] * WORLD


def refused(*args: Any) -> str:
    with pytest.raises(CoverageError) as caught:
        load(*args)
    return caught.value.message


@pytest.mark.parametrize("builder", ["transformers", MINE])
@pytest.mark.parametrize(("rows", "other", "key"), [(64, "cut", "pad"), (33, "pad", "cut")])
def test_where_it_is_not_allowed_the_error_has_the_key(checkpoint, builder, rows, other, key) -> None:
    for message in run_ranks(WORLD, refused, checkpoint, rows, builder, None, {other: True}):
        assert f"model.vocabulary.{key}: true would" in message
        assert f"[{rows}, 16], the checkpoint's [50, 16]" in message


def test_another_tensor_of_another_shape_is_an_error_without_that_hint(checkpoint) -> None:
    state = {key: torch.zeros_like(t) for key, t in load_file(checkpoint / "model.safetensors").items()}
    state["model.norm.weight"] = torch.zeros(17)
    with pytest.raises(CoverageError, match=r"model.norm.weight: .* \[17\]") as caught:
        loader.load(state, str(checkpoint))
    assert "vocabulary" not in caught.value.message
