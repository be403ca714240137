"""Embedding and head, tied or not in the checkpoint and in the model: all four cases, and both keys for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import loader
from launch.local_checkpoints import tiny_llama
from loader.errors import CoverageError
from tests.checkpoints import same_bits
from tests.modules import module_of
from tests.proxy import CountingProxy
from tests.ranks import run_ranks

FILE, EARLY, WORLD = "model.safetensors", 64 * 1024, 2
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL = {"hidden_size": 128, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
         "vocab_size": 1024, "num_hidden_layers": 1}  # fmt: skip


def checkpoint(directory: Path, *, tied: bool, head: str = "") -> Path:
    """`head` saves a head beside a tied embedding: the "same", as `.bin` files had it, or "another"."""
    tiny_llama(directory, files=1, tied=tied, **SMALL)
    if head:
        tensors = load_file(directory / FILE)
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += head == "another"
        save_file(tensors, directory / FILE)
    return directory


def model(directory: Path, *, tied: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Under FSDP, tied within the root group as FSDP2 wants it; and what it should hold."""
    expected = load_file(directory / FILE)
    expected.setdefault(HEAD, expected[EMBEDDING])
    module = module_of(expected)
    if tied:
        module.lm_head.weight = module.model.embed_tokens.weight
    fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    return module.to_empty(device="cpu"), expected


def load(directory: Path, uri: str, options: Any, tied: bool) -> tuple[list[str], int]:
    module, expected = model(directory, tied=tied)
    report = loader.load(module, uri, storage_options=options)
    state = {fqn: t.full_tensor() if isinstance(t, DTensor) else t for fqn, t in module.state_dict().items()}
    assert state.keys() == expected.keys()
    assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied
    return [fqn for fqn in expected if not same_bits(state[fqn], expected[fqn])], report.needed_bytes


@pytest.mark.parametrize(
    ("checkpoint_tied", "head", "model_tied"),
    [(True, "", True), (True, "", False), (False, "", False), (False, "same", True), (True, "same", True)],
)
def test_each_case_loads_and_each_key_is_read_once(s3, tmp_path, checkpoint_tied, head, model_tied) -> None:
    directory = checkpoint(tmp_path, tied=checkpoint_tied, head=head)
    stored = sum(tensor.nbytes for tensor in load_file(directory / FILE).values())
    with CountingProxy(s3.endpoint) as proxy:
        uri, options = s3.put(directory), s3.at(proxy.url).storage_options
        assert run_ranks(WORLD, load, directory, uri, options, model_tied) == [([], stored)] * WORLD
        assert stored <= proxy.bytes_served(FILE) <= stored + EARLY + 1024


def refused(directory: Path, tied: bool) -> str:
    module, _ = model(directory, tied=tied)
    with pytest.raises(CoverageError) as caught:
        loader.load(module, str(directory))
    return caught.value.message


@pytest.mark.parametrize(("tied", "head"), [(True, "another"), (False, "")])
def test_two_tensors_for_one_are_an_error_and_not_one_of_them(tmp_path, tied, head) -> None:
    for message in run_ranks(WORLD, refused, checkpoint(tmp_path, tied=tied, head=head), True):
        assert f"{HEAD} = {EMBEDDING}" in message
        assert "several that differ" in message


def test_a_head_that_the_config_does_not_tie_is_missing(tmp_path) -> None:
    directory = checkpoint(tmp_path, tied=False)
    tensors = load_file(directory / FILE)
    del tensors[HEAD]
    save_file(tensors, directory / FILE)
    for message in run_ranks(WORLD, refused, directory, False):
        assert "lm_head.weight [1024, 128] has no source" in message
