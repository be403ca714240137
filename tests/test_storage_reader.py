"""`dcp.load` with our reader: the same tensors as torch's own reader gives, by range, each byte once over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import loader
from loader.errors import ConfigError, StoreError
from tests.checkpoints import random_checkpoint, same_bits, tiny_llama
from tests.proxy import CountingProxy, Reply
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard

WORLD = 4
R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "fsdp": ((4,), [ROWS]),
    "hsdp": ((2, 2), [R, ROWS]),
    "tp columns": ((4,), [COLUMNS]),
    "tp rows and fsdp": ((2, 2), [_StridedShard(0, split_factor=2), ROWS]),
    "replicated": ((4,), [R]),
}
TENSORS = {
    "embed.weight": (torch.bfloat16, (1024, 512)),
    "up.weight": (torch.bfloat16, (512, 512)),
    "odd.weight": (torch.float32, (13, 8)),
    "few.weight": (torch.float32, (3, 8)),
    "norm.weight": (torch.float32, (512,)),
    "steps": (torch.int64, ()),
}
SIZE = 1024 * 512 * 2 + 512 * 512 * 2 + (13 * 8 + 3 * 8 + 512) * 4 + 8
READ = {"range_size": "128KiB", "memory_budget": "64MiB"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(path, TENSORS, files=2)
    return path


def expected_of(directory: str, layout: str, keys: Sequence[str] = tuple(TENSORS)) -> dict[str, Any]:
    """As torch's own reader finds it on this machine, sharded by torch."""
    whole = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in TENSORS.items() if key in keys}
    dcp.load(whole, storage_reader=HuggingFaceStorageReader(directory), no_dist=True)
    sizes, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", sizes)
    return {key: shard(tensor, mesh, placements) for key, tensor in whole.items()}


# ---------------------------------------------------------------- what is read


def _load(
    directory: str, uri: str, options: Sequence[Mapping[str, Any]], layout: str, keys: Sequence[str]
) -> list[str]:
    expected = expected_of(directory, layout, keys)
    state = {key: blank(tensor) for key, tensor in expected.items()}
    memory = {key: tensor.to_local().data_ptr() for key, tensor in state.items()}
    reader = loader.StorageReader(uri, storage_options=options[dist.get_rank()], **READ)
    dcp.load(state, storage_reader=reader)
    assert {key: tensor.to_local().data_ptr() for key, tensor in state.items()} == memory
    return differences(state, expected)


@pytest.fixture(scope="module")
def bucket(s3, directory):
    with CountingProxy(s3.endpoint, listeners=WORLD) as proxy:
        options = [s3.at(proxy.url_for(rank)).storage_options for rank in range(WORLD)]
        yield s3.put(directory), proxy, options


def served(proxy: CountingProxy, rank: int) -> int:
    """Bytes that left the server for this rank, but for each file's first 64 KiB, which come with its header."""
    return sum(request.body_bytes for request in proxy.select(".safetensors", rank=rank) if request.span[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_leaves_the_bucket_once(bucket, directory, layout):
    uri, proxy, options = bucket
    proxy.reset()
    assert run_ranks(WORLD, _load, str(directory), uri, options, layout, list(TENSORS)) == [[]] * WORLD
    shares = [served(proxy, rank) for rank in range(WORLD)]
    assert sum(shares) == SIZE
    assert max(shares) < SIZE / WORLD * 1.5, "ranks share the reading"


def test_what_the_state_dict_lacks_is_not_read(bucket, directory):
    uri, proxy, options = bucket
    proxy.reset()
    assert run_ranks(WORLD, _load, str(directory), uri, options, "hsdp", ["up.weight", "steps"]) == [[]] * WORLD
    assert sum(served(proxy, rank) for rank in range(WORLD)) == 512 * 512 * 2 + 8


def _transposed(checkpoint: Mapping[str, torch.Tensor], _: Any) -> Any:
    return {f"model.{key}": tensor.t() if tensor.ndim == 2 else tensor for key, tensor in checkpoint.items()}


def _load_converted(directory: str, uri: str) -> list[str]:
    whole = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in TENSORS.items()}
    dcp.load(whole, storage_reader=HuggingFaceStorageReader(directory), no_dist=True)
    mesh = init_device_mesh("cpu", (WORLD,))
    whole["up.weight"] = whole["up.weight"].float()  # cast on the way
    expected = {f"model.{k}": shard(t.t() if t.ndim == 2 else t, mesh, [ROWS]) for k, t in whole.items()}
    reader = loader.StorageReader(uri, convert=_transposed, ignore=["nothing*"])
    found = []
    for _ in range(2):  # a reader can be used again
        state = {key: blank(tensor) for key, tensor in expected.items()}
        dcp.load(state, storage_reader=reader)
        found += differences(state, expected)
    return found


def test_a_conversion_a_cast_and_a_bin_file(directory, tmp_path):
    whole = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in TENSORS.items()}
    dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    torch.save(whole, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert run_ranks(WORLD, _load_converted, str(directory), str(tmp_path)) == [[]] * WORLD


def _load_llama(directory: str) -> list[str]:
    """A trainer's usual lines, with one changed."""
    expected = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    state = get_model_state_dict(model)
    dcp.load(state, storage_reader=loader.StorageReader(directory))
    set_model_state_dict(model, state)
    found = {fqn: tensor.full_tensor() for fqn, tensor in get_model_state_dict(model).items()}
    assert found.keys() == expected.keys()
    return [fqn for fqn in found if not same_bits(found[fqn], expected[fqn])]


def test_a_tied_model_of_transformers(tmp_path):
    directory = tiny_llama(tmp_path / "llama", dtype=torch.float32, tied=True)
    assert run_ranks(WORLD, _load_llama, str(directory)) == [[]] * WORLD


def _load_in_groups(directory: str, uri: str, options: Sequence[Mapping[str, Any]]) -> list[str]:
    """Two groups, of other ranks than their own numbers, of which one loads once more than the other; then all."""
    rank, found = dist.get_rank(), []
    groups = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    group, times = (groups[0], 1) if rank in {0, 3} else (groups[1], 2)
    for process_group in [group] * times + [None]:
        mesh = init_device_mesh("cpu", (WORLD,)) if process_group is None else DeviceMesh.from_group(group, "cpu")
        whole = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in TENSORS.items()}
        dcp.load(whole, storage_reader=HuggingFaceStorageReader(directory), no_dist=True)
        expected = {key: shard(tensor, mesh, [COLUMNS if tensor.ndim == 2 else R]) for key, tensor in whole.items()}
        state = {key: blank(tensor) for key, tensor in expected.items()}
        reader = loader.StorageReader(uri, process_group=process_group, storage_options=options[rank], **READ)
        dcp.load(state, storage_reader=reader, process_group=process_group)
        found += differences(state, expected)
    return found


def test_groups_that_are_not_all_ranks(bucket, directory):
    uri, proxy, options = bucket
    proxy.reset()
    assert run_ranks(WORLD, _load_in_groups, str(directory), uri, options) == [[]] * WORLD
    served_by = [served(proxy, rank) for rank in range(WORLD)]
    assert sum(served_by) == 4 * SIZE  # each load of a group, and that of all, once


class Copying(DefaultLoadPlanner):
    """Has what it asks for elsewhere first, and takes it when it is told that it is there."""

    def resolve_tensor(self, read_item):
        return torch.zeros_like(super().resolve_tensor(read_item))

    def commit_tensor(self, read_item, tensor):
        super().resolve_tensor(read_item).copy_(tensor)


def _load_alone(directory: str) -> bool:
    state = {"steps": torch.zeros((), dtype=torch.int64), "odd.weight": torch.zeros(13, 8), "theirs": torch.ones(2)}
    expected = {key: tensor.clone() for key, tensor in state.items()}
    for found, reader in (
        (state, loader.StorageReader(directory, no_dist=True)),
        (expected, HuggingFaceStorageReader(directory)),
    ):
        planner = Copying(allow_partial_load=True)
        dcp.load(found, storage_reader=reader, planner=planner, no_dist=True)
    return bool(state["steps"].any()) and all(same_bits(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("init", [True, False], ids=["beside others", "without a group"])
def test_a_process_alone(directory, init):
    assert run_ranks(2 if init else 1, _load_alone, str(directory), init=init) in ([True], [True, True])


# ---------------------------------------------------------------- what goes wrong


def _fails(uri: str, options: Sequence[Mapping[str, Any]], change: Mapping[str, Any]) -> tuple[str, dict[int, Any]]:
    state = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in (TENSORS | dict(change)).items()}
    reader = loader.StorageReader(uri, storage_options=options[dist.get_rank()], retries=0)
    with pytest.raises(CheckpointException) as raised:
        dcp.load(state, storage_reader=reader)
    dist.all_reduce(total := torch.ones(1))
    assert total.item() == WORLD
    return str(raised.value), {rank: error for rank, (error, _) in raised.value.failures.items()}


def test_a_server_that_fails_is_the_same_error_on_every_rank(bucket):
    uri, proxy, options = bucket
    proxy.reset()
    proxy.on_request(_fail_data)
    told = run_ranks(WORLD, _fails, uri, options, {})
    proxy.reset()
    for _, failures in told:
        assert len({str(error) for error in failures.values()}) == 1
        assert failures.keys() == set(range(WORLD))
        assert all(isinstance(error, StoreError) for error in failures.values())
        assert ".safetensors" in str(failures[0])


def _fail_data(request, forward):
    data = (
        request.method == "GET" and request.path.endswith(".safetensors") and not request.range.startswith("bytes=0-")
    )
    return Reply(500, [("Content-Length", "0")]) if data else forward(request)


def test_a_key_that_is_not_there_and_a_place_that_is_not(bucket):
    uri, _, options = bucket
    for message, _ in run_ranks(WORLD, _fails, uri, options, {"more": (torch.float32, (2,))}):
        assert "Missing key in checkpoint state_dict: more" in message
    for message, _ in run_ranks(WORLD, _fails, f"{uri}/nowhere", options, {}):
        assert "nowhere" in message
        assert "metadata read failed" in message


def _load_strided(directory: str) -> str:
    mesh = init_device_mesh("cpu", (WORLD,))
    state = {"odd.weight": shard(torch.zeros(13, 8), mesh, [_StridedShard(0, split_factor=2)])}
    with pytest.raises(CheckpointException) as raised:
        dcp.load(state, storage_reader=loader.StorageReader(directory))
    return str(raised.value)


def test_a_shard_that_dcp_takes_for_another_is_refused(directory):
    for message in run_ranks(WORLD, _load_strided, str(directory)):
        assert "BuilderError: odd.weight: this rank's shard is 2 boxes of the tensor" in message


def test_arguments_are_checked_at_once():
    with pytest.raises(ConfigError, match="did you mean 'memory_budget'"):
        loader.StorageReader("s3://b/m", memory_bugdet="1GiB")
