"""`model.dtype_rules`, for every builder, in ranks: the dtypes that were asked for, in shards and under FSDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from launch.local_checkpoints import tiny_llama
from loader.config import Config
from loader.errors import ConfigError
from loader.exchange.control import Control
from loader.place.dtypes import cast_by_rules
from loader.run import run
from tests.checkpoints import same_bits
from tests.modules import module_of
from tests.ranks import run_ranks

RULES = [{"match": "*layers.0*norm.weight", "dtype": "bfloat16"}, {"match": "*norm.weight", "dtype": "float32"}]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def wanted(fqn: str) -> torch.dtype:
    if not fqn.endswith("norm.weight"):
        return torch.float16
    return torch.bfloat16 if "layers.0" in fqn else torch.float32


def build(hf_config: Any, mesh: Any) -> nn.Module:
    """A user's model, sharded by FSDP2 before any rule is applied."""
    return module_of(WHOLE, mesh["dp_shard"])


def check(model: Any, mesh: Any, report: Any) -> int:
    state = model if isinstance(model, dict) else model.state_dict()
    wrong = []
    for fqn, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not same_bits(full, WHOLE[fqn].to(wanted(fqn))):
            wrong.append(fqn)
    if hasattr(model, "unshard"):
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.arange(8).view(1, 8))  # FSDP looks at a group's dtypes here
    return len(wrong) + (state.keys() != WHOLE.keys())


def load(directory: Path, builder: str | None, mesh: dict[str, int], rules: Any = RULES) -> int:
    global WHOLE  # noqa: PLW0603
    WHOLE = load_file(directory / "model.safetensors")
    model = {"builder": builder, "dtype": "float16", "dtype_rules": rules}
    config = {"source": {"uri": str(directory)}, "model": model, "mesh": mesh, "report": None,
              "output": {"entrypoint": f"{__name__}:check"}}  # fmt: skip
    with Control.of_group() as control:
        return run(Config.model_validate(config), control, torch.device("cpu"))()


@pytest.mark.parametrize("mesh", [{"dp_shard": 2}, {"tp": 2}])
@pytest.mark.parametrize("builder", [None, "transformers", f"{__name__}:build"])
def test_every_builder_gives_the_dtypes_of_the_first_rule_that_matches(tmp_path, builder, mesh) -> None:
    if builder not in {None, "transformers"} and "tp" in mesh:
        mesh = {"dp_replicate": 1, "dp_shard": 2}
    tiny_llama(tmp_path, files=1, dtype=torch.float32, **SMALL)
    assert run_ranks(2, load, tmp_path, builder, mesh) == [0, 0]


def load_mixed(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, "transformers", {"dp_shard": 2}, [{"match": "*o_proj.bias", "dtype": "float32"}])
    return caught.value.message


def test_one_fsdp_group_cannot_have_several_dtypes(tmp_path) -> None:
    tiny_llama(tmp_path, files=1, attention_bias=True, **SMALL)
    for message in run_ranks(2, load_mixed, tmp_path):
        assert "o_proj.weight is torch.float16" in message
        assert "o_proj.bias is torch.float32" in message


def test_ties_and_what_is_not_floating_stay() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    model.register_buffer("table", torch.zeros(2), persistent=False)
    cast_by_rules(model, [("b.weight", torch.float64), ("*", torch.bfloat16)])
    assert model.a.weight is model.b.weight
    assert (model.a.weight.dtype, model.count.dtype, model.table.dtype) == (torch.bfloat16, torch.int64, torch.float32)
