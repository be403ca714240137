"""Parameters that no checkpoint has: first values from the model's own code, the same on every mesh."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from launch.local_checkpoints import tiny_llama
from loader.config import Config
from loader.errors import BuilderError, CoverageError
from loader.exchange.control import Control
from loader.run import run
from tests.checkpoints import same_bits
from tests.ranks import run_ranks

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4,
         "num_hidden_layers": 1, "vocab_size": 320}  # fmt: skip
MESHES = [{"dp_shard": 1}, {"dp_shard": 4}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}]


class LoRA(nn.Module):
    """Parameters of its own, with a dim that four ranks do not share evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(width, 7)), nn.Parameter(torch.empty(7, width))
        self.register_buffer("steps", torch.empty(3, dtype=torch.int64))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)
        self.steps.fill_(5)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4))


class Lazy(Silent):
    def reset_parameters(self) -> None:
        """And gives nothing a value."""


def with_heads(hf_config: Any, mesh: Any) -> nn.Module:
    """A transformers model, and a value head and an adapter beside it, all of it under FSDP2, columns over tp."""
    torch.manual_seed(torch.distributed.get_rank())  # as a trainer may: it must not matter
    with torch.device("meta"):
        model = nn.Module()
        model.backbone = transformers.LlamaForCausalLM(hf_config).to(torch.bfloat16)
        model.value = nn.Linear(hf_config.hidden_size, 1)
        model.lora = LoRA(hf_config.hidden_size)
        for name, extra in EXTRA.items():
            model.add_module(name, extra())
    if "tp" in mesh.mesh_dim_names:
        whole = torch.empty(64, 7, device="meta")
        model.lora.a = nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(1)], src_data_rank=None))
    dims = tuple(name for name in mesh.mesh_dim_names if name != "tp")
    fully_shard(model.value, mesh=mesh[dims])
    return fully_shard(model, mesh=mesh[dims])


EXTRA: dict[str, type[nn.Module]] = {}


def take(model: nn.Module, mesh: Any, report: Any) -> int:
    global HELD  # noqa: PLW0603 - the entrypoint is called with nothing of ours
    HELD = {fqn: t.full_tensor() if isinstance(t, DTensor) else t.clone() for fqn, t in model.state_dict().items()}
    return 0


def load(
    directory: Path, mesh: dict[str, int], builder: str, initialise: list[str], **source: Any
) -> dict[str, Tensor]:
    config = {"source": {"uri": str(directory), **source}, "model": {"builder": builder, "initialise": initialise},
              "mesh": mesh, "report": None, "output": {"entrypoint": f"{__name__}:take"}}  # fmt: skip
    if builder != "transformers":
        config["convert"] = f"{__name__}:into_backbone"
    with Control.of_group() as control:
        assert run(Config.model_validate(config), control, torch.device("cpu"))() == 0
    return HELD


def into_backbone(keys: Any, _: Any) -> dict[str, Tensor]:
    return {f"backbone.{key}": tensor for key, tensor in keys.items()}


def load_all(directory: Path, world_size: int) -> list[dict[str, Tensor]]:
    meshes = [mesh for mesh in MESHES if math.prod(mesh.values()) == world_size]
    return [load(directory, mesh, f"{__name__}:with_heads", ["value.*", "lora.*"]) for mesh in meshes]


def test_a_new_head_and_an_adapter_are_the_same_on_every_mesh(tmp_path) -> None:
    tiny_llama(tmp_path, files=1, **SMALL)
    ((alone,),) = run_ranks(1, load_all, tmp_path, 1)
    assert alone["value.weight"].std() > 0.01
    assert alone["value.weight"].abs().max() <= 1 / 8  # nn.Linear's own bound, 1 / sqrt(64)
    assert alone["lora.a"].unique().numel() > 400
    assert not alone["lora.b"].any()
    assert alone["lora.steps"].tolist() == [5, 5, 5]
    for found in run_ranks(4, load_all, tmp_path, 4):
        assert len(found) == len(MESHES) - 1
        for state in found:
            assert state.keys() == alone.keys()
            assert [fqn for fqn in state if not same_bits(state[fqn], alone[fqn])] == []
    stored = load_file(tmp_path / "model.safetensors")
    assert all(same_bits(alone[f"backbone.{key}"], tensor) for key, tensor in stored.items())


def load_classifier(directory: Path, world_size: int) -> list[dict[str, Tensor]]:
    meshes = [mesh for mesh in MESHES[:3] if math.prod(mesh.values()) == world_size]
    return [load(directory, mesh, "transformers", ["score.*"], ignore=["lm_head.*"]) for mesh in meshes]


def test_a_head_of_transformers_is_initialised_as_its_class_does(tmp_path) -> None:
    tiny_llama(tmp_path, files=1, **SMALL)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"architectures": ["LlamaForSequenceClassification"], "initializer_range": 0.5, "num_labels": 50}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ((alone,),) = run_ranks(1, load_classifier, tmp_path, 1)
    assert alone["score.weight"].shape == (50, 64)
    assert alone["score.weight"].float().std() == pytest.approx(0.5, rel=0.1)
    for found in run_ranks(4, load_classifier, tmp_path, 4):
        assert [same_bits(state["score.weight"], alone["score.weight"]) for state in found] == [True, True]


def refused(directory: Path, initialise: list[str], extra: type[nn.Module] | None, error: type[Exception]) -> str:
    EXTRA.update({} if extra is None else {"extra": extra})
    with pytest.raises(error) as caught:
        load(directory, {"dp_shard": 2}, f"{__name__}:with_heads", initialise)
    return str(caught.value)


@pytest.mark.parametrize(
    ("initialise", "extra", "error", "words"),
    [
        (["lora.*"], None, CoverageError, ["value.weight [1, 64] has no source", "model.initialise"]),
        (["*"], Silent, BuilderError, ["extra.scale", "Silent", "reset_parameters"]),
        (["*"], Lazy, BuilderError, ["extra.scale", "Lazy gave it no value"]),
    ],
)
def test_what_is_not_asked_for_or_cannot_be_initialised_is_an_error(tmp_path, initialise, extra, error, words) -> None:
    tiny_llama(tmp_path, files=1, **SMALL)
    for message in run_ranks(2, refused, tmp_path, initialise, extra, error):
        for word in words:
            assert word in message
