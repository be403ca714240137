"""`loader.load` end to end, from a real bucket: every rank's shard equals, bit for bit, what torch makes of the whole.

One load takes every layout, shape and dtype together: each layout has keys of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import loader
from tests import stages
from tests.checkpoints import random_tensor
from tests.ranks import run_ranks
from tests.shards import DTYPES, blank, differences, shard, write_file

R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)

LAYOUTS = {
    "fsdp": ((4,), [ROWS]),
    "hsdp": ((2, 2), [R, ROWS]),
    "tp rows": ((4,), [ROWS]),
    "tp columns": ((4,), [COLUMNS]),
    "third dim": ((4,), [Shard(2)]),
    "replicated": ((4,), [R]),
    "replicated over two dims": ((2, 2), [R, R]),
    "fsdp, tp rows": ((2, 2), [_StridedShard(0, split_factor=2), ROWS]),
    "fsdp, tp columns": ((2, 2), [ROWS, COLUMNS]),
    "columns, rows": ((2, 2), [COLUMNS, ROWS]),
    "nested rows": ((2, 2), [ROWS, ROWS]),
    "nested columns": ((2, 2), [COLUMNS, COLUMNS]),
    "tp with replicas": ((2, 2), [R, COLUMNS]),
    "several boxes": ((4,), [_StridedShard(0, split_factor=3)]),
    "three dims": ((1, 2, 2), [R, ROWS, COLUMNS]),
}

SHAPES = {
    "even": (8, 4),
    "odd": (13, 7),
    "few rows": (3, 5),
    "few columns": (5, 3),
    "one": (1, 1),
    "vector": (11,),
    "short vector": (2,),
    "experts": (5, 6, 7),
    "one expert": (1, 9, 4),
    "scalar": (),
    "empty": (0, 4),
    "no columns": (6, 0),
    "several ranges": (257, 131),
    "wide": (3, 20_001),
}

READS = [{}, {"range_size": "64KiB", "memory_budget": "32MiB", "concurrency": 2}]


def _whole() -> dict[str, torch.Tensor]:
    """For each layout every shape and dtype; the same in every process, for some dtypes do not travel by pickle."""
    generator = torch.Generator().manual_seed(0)
    kinds = {name: (torch.float32, shape) for name, shape in SHAPES.items()}
    kinds |= {f"{name} {shape}": (dtype, shape) for name, dtype in DTYPES.items() for shape in ((9, 6), (7,), ())}
    del kinds["F4 ()"]  # it packs pairs
    return {
        f"{layout}: {kind}": random_tensor(dtype, shape, generator)
        for layout in LAYOUTS
        for kind, (dtype, shape) in kinds.items()
    }


@pytest.fixture(scope="module")
def checkpoint(s3, tmp_path_factory):
    """Three files, the odd tensors among the even, so that hardly anything is aligned."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tensors = _whole()
    for number in range(3):
        keys = list(tensors)[number::3]
        write_file(directory / f"model-{number + 1:05}-of-00003.safetensors", {key: tensors[key] for key in keys})
    return s3.put(directory), s3.storage_options


def _load_layouts(uri: str, options: Mapping, read: Mapping, device: str = "cpu") -> list[str]:
    kind = stages.use(device)
    meshes = {sizes: init_device_mesh(kind, sizes) for sizes, _ in LAYOUTS.values()}
    expected = {}
    for key, tensor in _whole().items():
        sizes, placements = LAYOUTS[key.partition(":")[0]]
        expected[key] = shard(tensor, meshes[sizes], placements)
    state = {key: blank(each) for key, each in expected.items()}
    loader.load(state, uri, storage_options=options, **read)
    return differences(state, expected)


@pytest.mark.parametrize("device", stages.DEVICES)
@pytest.mark.parametrize("read", READS, ids=["defaults", "small ranges"])
def test_every_layout_shape_and_dtype(checkpoint, read, device):
    assert run_ranks(4, _load_layouts, *checkpoint, read, device) == [[]] * 4


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("read", READS, ids=["defaults", "small ranges"])
def test_every_layout_on_several_nodes(checkpoint, read, nodes):
    assert run_ranks(4, _load_layouts, *checkpoint, read, nodes=nodes) == [[]] * 4


@pytest.mark.parametrize("share", ["node", "none"])
def test_every_layout_where_less_is_shared(checkpoint, share):
    assert run_ranks(4, _load_layouts, *checkpoint, {"share": share, **READS[1]}, nodes=2) == [[]] * 4


# ---------------------------------------------------------------- models


class Block(nn.Module):
    """Odd sizes, a buffer, and two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(51, 10)
        self.up = nn.Linear(10, 22)
        self.down = nn.Linear(22, 10, bias=False)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 51, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def _block() -> Block:
    torch.manual_seed(1)
    return Block()


def _parallelise(block: Block, replicate: int, rows: int, tp: int) -> None:
    mesh = init_device_mesh("cpu", (replicate, rows, tp), mesh_dim_names=("replicate", "shard", "tp"))
    if tp > 1:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if rows > 1:
        fully_shard(block, mesh=mesh["replicate", "shard"] if replicate > 1 else mesh["shard"])


def _load_modules(uri: str, options: Mapping) -> list[tuple[tuple[int, int, int], str]]:
    """What torch shards from the true weights, against what is loaded into the same shards."""
    wrong = []
    for sizes in [(1, 4, 1), (2, 2, 1), (1, 1, 4), (1, 2, 2)]:
        block = _block()
        _parallelise(block, *sizes)
        expected = {fqn: tensor.clone() for fqn, tensor in block.state_dict().items()}
        if sizes == (1, 2, 2):
            assert any(isinstance(p, _StridedShard) for p in expected["up.weight"].placements)
        with torch.no_grad():
            for tensor in block.state_dict().values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
        report = loader.load(block, uri, storage_options=options, ignore=["unwanted.*"])
        assert set(report.mesh.values()) - {1} == set(sizes) - {1}
        assert block.head.weight is block.embed.weight
        wrong += [(sizes, fqn) for fqn in differences(block.state_dict(), expected)]
    return wrong


@pytest.fixture(scope="module")
def block_checkpoint(s3, tmp_path_factory):
    directory = tmp_path_factory.mktemp("block")
    tensors = {fqn: tensor for fqn, tensor in _block().state_dict().items() if fqn != "head.weight"}
    write_file(directory / "model.safetensors", {"unwanted.bias": torch.ones(3, dtype=torch.uint8), **tensors})
    return s3.put(directory), s3.storage_options


def test_modules_sharded_by_torch_one_after_the_other_in_one_group(block_checkpoint):
    assert run_ranks(4, _load_modules, *block_checkpoint) == [[]] * 4


def test_a_plain_module_in_one_process_without_a_group(block_checkpoint):
    uri, options = block_checkpoint
    block, expected = Block(), _block().state_dict()
    report = loader.load(block, uri, storage_options=options, ignore=["unwanted.*"])
    assert differences(block.state_dict(), expected) == []
    assert (report.world_size, report.mesh, report.exchanged_bytes) == (1, {}, 0)
    assert report.needed_bytes == sum(t.nbytes for name, t in expected.items() if name != "head.weight")


# ---------------------------------------------------------------- sub-meshes


def _load_parts(uri: str, options: Mapping) -> list[str]:
    """Two pipeline stages of two ranks; dense tensors over all; experts on meshes of their own; some on few ranks."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    everyone = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert_replicas", "experts"))
    stage = dist.get_rank() // 2
    places: dict[str, tuple[DeviceMesh, list]] = {
        f"stage{stage}.up": (grid["dp"], [ROWS]),
        f"stage{stage}.down": (grid["dp"], [COLUMNS]),
        "dense": (everyone, [ROWS]),
        "experts": (experts, [R, ROWS]),
        "experts on columns": (experts["experts"], [Shard(2)]),
        "on ranks 1 and 3": (DeviceMesh("cpu", [1, 3]), [ROWS]),
    }
    tensors = _parts()
    expected = {key: shard(tensors[key], *places[key]) for key in places}
    if dist.get_rank() == 0:
        expected["on rank 0"] = tensors["on rank 0"]
    state = {key: blank(t) if isinstance(t, DTensor) else torch.zeros_like(t) for key, t in expected.items()}
    loader.load(state, uri, storage_options=options, range_size="64KiB")
    return differences(state, expected)


def _parts() -> dict[str, torch.Tensor]:
    shapes = {
        "stage0.up": (33, 17), "stage0.down": (17, 33), "stage1.up": (300, 101), "stage1.down": (101, 300),
        "dense": (13, 5), "experts": (5, 40, 60), "experts on columns": (3, 4, 5), "on ranks 1 and 3": (7,),
        "on rank 0": (9,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {key: random_tensor(torch.bfloat16, shape, generator) for key, shape in shapes.items()}


def test_stages_experts_and_what_only_some_ranks_hold(s3, tmp_path):
    write_file(tmp_path / "model.safetensors", _parts())
    assert run_ranks(4, _load_parts, s3.put(tmp_path), s3.storage_options) == [[]] * 4


# ---------------------------------------------------------------- casts

CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float16),
    (torch.float16, torch.float32),
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.float32, torch.float8_e5m2),
    (torch.uint8, torch.int64),
    (torch.bool, torch.float32),
    (torch.int32, torch.float32),
]


def _castable() -> dict[str, tuple[torch.Tensor, torch.dtype]]:
    """Finite values: a NaN's payload is no one's promise in a cast."""
    torch.manual_seed(0)
    values = torch.randn(23, 31) * 50
    odd = torch.arange(3, dtype=torch.uint8)
    return {"odd": (odd, torch.uint8)} | {
        f"{source} to {target}": ((values if source.is_signed else values.abs()).to(source), target)
        for source, target in CASTS
    }


def _load_cast(uri: str, options: Mapping) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2))
    sharded = {key: shard(tensor, mesh, [ROWS, COLUMNS]) for key, (tensor, _) in _castable().items()}
    expected = {key: shard(tensor.to(target), mesh, [ROWS, COLUMNS]) for key, (tensor, target) in _castable().items()}
    state = {key: blank(sharded[key], target) for key, (_, target) in _castable().items()}
    loader.load(state, uri, storage_options=options)
    return differences(state, expected)


def test_what_is_loaded_is_cast_to_the_shards_dtype(s3, tmp_path):
    write_file(tmp_path / "model.safetensors", {key: tensor for key, (tensor, _) in _castable().items()})
    assert run_ranks(4, _load_cast, s3.put(tmp_path), s3.storage_options) == [[]] * 4
