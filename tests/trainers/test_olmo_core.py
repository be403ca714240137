"""`load_hf_model` beside OLMo-core's own: the same arguments, the same shards."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

from loader.errors import ConfigError, CoverageError
from loader.trainers.olmo_core import load_hf_model, uri_of
from tests.checkpoints import same_bits
from tests.olmo_core_models import hf_model, olmo_core_model, save
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3")
    save(directory, "qwen3")
    return directory


def model(rows: int | None = None) -> nn.Module:
    config = hf_model("qwen3").config
    config.vocab_size = rows or config.vocab_size
    return olmo_core_model(config)


def unfilled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {fqn: torch.full_like(tensor, -1) for fqn, tensor in state.items()}


def test_it_takes_what_olmo_cores_own_takes():
    from olmo_core.nn.hf.checkpoint import load_hf_model as theirs

    ours = inspect.signature(load_hf_model).parameters
    assert list(ours) == list(inspect.signature(theirs).parameters)
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)


@pytest.mark.parametrize("rows", [None, 96, 90, 112])
def test_one_process_has_what_olmo_cores_own_loads(checkpoint, rows, tmp_path):
    from olmo_core.nn.hf.checkpoint import load_hf_model as theirs

    expected, found = dict(model(rows).state_dict()), unfilled(model(rows).state_dict())
    theirs(checkpoint, expected, num_embeddings=rows)
    load_hf_model(checkpoint, found, revision="main", num_embeddings=rows, work_dir=tmp_path)
    for fqn, tensor in expected.items():
        known = min(96, rows or 96) if tensor.shape[0] == (rows or 96) else len(tensor)
        assert same_bits(found[fqn][:known], tensor[:known].detach()), fqn
        assert not found[fqn][known:].any()


def _load_sharded(uri: str, expected: Path, rows: int) -> list[str]:
    """HSDP's shards, as a state dict of plain DTensors: OLMo-core takes each rank seconds to import."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    sharded = {fqn: shard(tensor, mesh, [Replicate(), Shard(0)]) for fqn, tensor in load_file(expected).items()}
    state = {fqn: blank(tensor) for fqn, tensor in sharded.items()}
    load_hf_model(uri, state, num_embeddings=rows, process_group=dist.group.WORLD)
    with pytest.raises(ConfigError, match="process_group has 2 of 4 ranks"):
        load_hf_model(uri, state, process_group=mesh.get_group("dp_shard"))
    return differences(state, sharded)


def test_hsdp_shards_from_a_bucket(checkpoint, s3, monkeypatch, tmp_path):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    whole = unfilled(model(101).state_dict())
    load_hf_model(checkpoint, whole, num_embeddings=101)
    save_file(whole, tmp_path / "expected.safetensors")
    assert run_ranks(4, _load_sharded, s3.put(checkpoint), tmp_path / "expected.safetensors", 101) == [[]] * 4


def _load_wrapped(directory: Path, rows: int) -> list[str]:
    """OLMo-core's model as its train module has it: under FSDP2, its state dict by torch's own function."""
    from olmo_core.nn.hf.checkpoint import load_hf_model as theirs

    states = []
    for function in (load_hf_model, theirs):
        wrapped = model(rows)
        for block in wrapped.blocks.values():
            fully_shard(block)
        fully_shard(wrapped)
        options = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=False)
        state = get_model_state_dict(wrapped, options=options)
        function(directory, state, num_embeddings=rows)
        wrapped.load_state_dict(state)
        states.append({fqn: tensor.full_tensor() for fqn, tensor in wrapped.state_dict().items()})
    ours, expected = states
    vocabulary = ("embeddings.weight", "lm_head.w_out.weight")
    known = {fqn: min(96, rows) if fqn in vocabulary else None for fqn in expected}
    wrong = [fqn for fqn, count in known.items() if not same_bits(ours[fqn][:count], expected[fqn][:count])]
    return wrong + [fqn for fqn in vocabulary if ours[fqn][96:].any()]


@pytest.mark.parametrize("rows", [90, 101])
def test_a_model_under_fsdp_has_what_olmo_cores_own_loads(checkpoint, rows):
    assert run_ranks(2, _load_wrapped, checkpoint, rows) == [[], []]


@pytest.mark.parametrize(
    ("name", "revision", "uri"),
    [
        ("Qwen/Qwen3-0.6B", "main", "hf://Qwen/Qwen3-0.6B@main"),
        ("Qwen/Qwen3-0.6B", "refs/pr/3", "hf://Qwen/Qwen3-0.6B@refs%2Fpr%2F3"),
        ("hf://Qwen/Qwen3-0.6B", "v1", "hf://Qwen/Qwen3-0.6B@v1"),
        ("hf://Qwen/Qwen3-0.6B@v2", "main", "hf://Qwen/Qwen3-0.6B@v2"),
        ("here/model", "main", "here/model"),
        ("s3://models/qwen", "main", "s3://models/qwen"),
        ("/models/qwen", "v1", "/models/qwen"),
    ],
)
def test_a_name_on_the_hub_is_its_uri(name, revision, uri, tmp_path, monkeypatch):
    (tmp_path / "here/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert uri_of(name, revision) == uri


def test_a_state_dict_that_the_checkpoint_does_not_fill(checkpoint):
    state = {**model().state_dict(), "blocks.0.attention.w_q.bias": torch.zeros(64)}
    with pytest.raises(CoverageError, match=r"blocks.0.attention.w_q.bias \[64\] has no source"):
        load_hf_model(Path(checkpoint), state)
