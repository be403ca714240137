"""Keys with a common prefix, and a part of a larger checkpoint: loaded under the model's names, the rest not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import loader
from launch.local_checkpoints import tiny_llama
from loader.config import Config
from loader.errors import CoverageError
from loader.exchange.control import Control
from loader.run import run
from tests.checkpoints import same_bits
from tests.modules import module_of
from tests.proxy import CountingProxy
from tests.ranks import run_ranks

FILE, EARLY, WORLD = "model.safetensors", 64 * 1024, 2
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 512}  # fmt: skip
REST = ["vision_tower.*", "multi_modal_projector.*"]
TEXT = "language_model."


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """As transformers saves it: language_model.model.layers… beside vision_tower.…"""
    directory = tmp_path_factory.mktemp("llava")
    vision = {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.LlavaConfig(text_config={"model_type": "llama", **SMALL}, vision_config=vision)
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def text_tower(hf_config: Any, mesh: Any) -> nn.Module:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config.text_config).to(torch.bfloat16)
    return fully_shard(model, mesh=mesh["dp_shard"])


def check(model: nn.Module, mesh: Any, report: Any) -> int:
    state = {fqn: t.full_tensor() if isinstance(t, DTensor) else t for fqn, t in model.state_dict().items()}
    return int(state.keys() != WHOLE.keys() or not all(same_bits(state[fqn], WHOLE[fqn]) for fqn in state))


def load_tower(directory: Path, uri: str, options: Any, ignore: list[str]) -> int:
    global WHOLE  # noqa: PLW0603 - the entrypoint is called with nothing of ours
    WHOLE = tower_of(directory)
    config = {"source": {"uri": uri, "storage_options": options, "strip_prefix": TEXT, "ignore": ignore},
              "model": {"builder": f"{__name__}:text_tower"}, "mesh": {"dp_shard": WORLD}, "report": None,
              "output": {"entrypoint": f"{__name__}:check"}}  # fmt: skip
    with Control.of_group() as control:
        return run(Config.model_validate(config), control, torch.device("cpu"))()


def tower_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / FILE)
    return {key.removeprefix(TEXT): tensor for key, tensor in tensors.items() if key.startswith(TEXT)}


def test_a_text_tower_is_read_without_the_rest(s3, llava) -> None:
    needed = sum(tensor.nbytes for tensor in tower_of(llava).values())
    assert (llava / FILE).stat().st_size > needed + 4 * EARLY  # the rest would be seen
    with CountingProxy(s3.endpoint) as proxy:
        uri, options = s3.put(llava), s3.at(proxy.url).storage_options
        assert run_ranks(WORLD, load_tower, llava, uri, options, REST) == [0] * WORLD
        assert needed <= proxy.bytes_served(FILE) <= needed + EARLY + 16 * 1024


def load_unlisted(directory: Path) -> str:
    with pytest.raises(CoverageError) as caught:
        load_tower(directory, str(directory), {}, REST[:1])
    return caught.value.message


def test_what_is_neither_wanted_nor_ignored_is_an_error(llava) -> None:
    for message in run_ranks(WORLD, load_unlisted, llava):
        assert "multi_modal_projector" in message
        assert "source.ignore" in message


def load_prefixed(directory: Path, prefix: str) -> list[str]:
    tensors = load_file(directory / FILE)
    expected = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    model = fully_shard(module_of(expected)).to_empty(device="cpu")
    loader.load(model, str(directory), strip_prefix=prefix)
    state = {fqn: tensor.full_tensor() for fqn, tensor in model.state_dict().items()}
    return [fqn for fqn in expected if not same_bits(state[fqn], expected[fqn])]


@pytest.mark.parametrize("prefix", ["model.", "language_model.", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_common_prefix_is_taken_off(tmp_path, prefix) -> None:
    tiny_llama(tmp_path, files=1, **SMALL)
    if prefix != "model.":  # there as it is, on all keys but lm_head
        tensors = load_file(tmp_path / FILE)
        save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / FILE)
    assert run_ranks(WORLD, load_prefixed, tmp_path, prefix) == [[]] * WORLD
