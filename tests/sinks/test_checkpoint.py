import threading
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from loader.errors import SinkError
from loader.exchange.control import Control
from loader.ground.memory import PeakMemory
from loader.place.targets import targets_of
from loader.plan.geometry import Box, disjoint, whole
from loader.sinks import checkpoint, directory
from loader.stream import save as stream
from tests.ranks import run_ranks

MIB = 1 << 20
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32,
    torch.int64, torch.uint64,
]  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any bits, the same in every process."""
    seed = torch.Generator().manual_seed(hash((shape, dtype.itemsize)) % (1 << 31))
    if dtype is torch.bool:
        return torch.rand(shape, generator=seed) > 0.5
    shape_of_bytes = (*shape, dtype.itemsize)
    return torch.randint(0, 256, shape_of_bytes, dtype=torch.uint8, generator=seed).view(dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def shard(tensor: torch.Tensor, mesh, placements) -> DTensor:
    """Without communication, for gloo does not know every dtype."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def save(state_dict, url: str) -> None:
    """As the loader does: one rank prepares, all save."""
    with Control.of_group() as control:
        with control.phase("prepare"):
            if control.rank == 0:
                assert directory.prepare(url, "error")
        stream.save(targets_of(state_dict), url, control)
    assert directory.exists(url) == "complete"


def load(state_dict, url: str):
    dcp.load(state_dict, storage_reader=FsspecReader(url), no_dist=not dist.is_initialized())
    return state_dict


# ---------------------------------------------------------------- every layout, 4 ranks to 2 and to 1


def _full() -> dict[str, torch.Tensor]:
    full = {f"dtypes.{dtype}": random(5, 6, dtype=dtype) for dtype in DTYPES}
    return full | {
        "odd": random(13, 7),
        "few_rows": random(3, 5),
        "columns": random(6, 9),
        "both": random(11, 13),
        "strided": random(11, 6),
        "several_boxes": random(19, 4),
        "plain": random(9),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "no_columns": torch.empty(6, 0),
        "on_a_submesh": random(10, 3),
    }


def _shard(full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    placements = {name: (flat, [Shard(0)]) for name in full}
    placements |= {
        "columns": (flat, [Shard(1)]),
        "both": (grid, [Shard(0), Shard(1)]),
        "strided": (grid, [_StridedShard(0, split_factor=2), Shard(0)]),
        "several_boxes": (flat, [_StridedShard(0, split_factor=3)]),
        "scalar": (flat, [Replicate()]),
        "dtypes.torch.float32": (grid, [Replicate(), Shard(0)]),
        "on_a_submesh": (grid["tp"], [Shard(0)]),
    }
    return {name: tensor if name == "plain" else shard(tensor, *placements[name]) for name, tensor in full.items()}


def _save_all(url: str) -> None:
    save(_shard(_full()), url)


def _load_all(url: str) -> list[str]:
    """Into Shard(1) where there is a second dim; returns what differs."""
    full = _full()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    targets = {
        name: shard(torch.zeros_like(tensor), mesh, [Shard(1) if tensor.ndim > 1 else Replicate()])
        for name, tensor in full.items()
    }
    load(targets, url)
    expected = {name: shard(full[name], mesh, each.placements) for name, each in targets.items()}
    return [name for name in full if not same(targets[name].to_local(), expected[name].to_local())]


def _read_alone(url: str) -> list[str]:
    full = _full()
    got = load({name: torch.zeros_like(tensor) for name, tensor in full.items()}, url)
    return [name for name in full if not same(got[name], full[name])]


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path: Path, monkeypatch) -> str:
    if request.param == "local":
        return str(tmp_path / "checkpoint")
    server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.prefix()


def test_every_layout_comes_back_in_other_world_sizes(url: str):
    run_ranks(4, _save_all, url)
    fs, root = url_to_fs(url)
    assert not fs.exists(f"{root}/{directory.MARKER}"), "what is complete is not marked as what is not"
    assert run_ranks(2, _load_all, url) == [[], []]
    assert _read_alone(url) == []


def test_one_process_needs_no_group(url: str):
    full = _full()
    save(full, url)
    assert run_ranks(2, _load_all, url) == [[], []]


# ---------------------------------------------------------------- models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 22, bias=False)
        self.down = nn.Linear(22, 6, bias=False)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("steps", torch.tensor(5))


def _model(replicate: int, shard: int, tp: int) -> Net:
    torch.manual_seed(1)
    net = Net()
    mesh = init_device_mesh("cpu", (replicate, shard, tp), mesh_dim_names=("replicate", "shard", "tp"))
    if tp > 1:
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(net, mesh=mesh["replicate", "shard"] if replicate > 1 else mesh["shard"])
    return net


def _save_model(url: str, *sizes: int) -> None:
    net = _model(*sizes)
    assert any(isinstance(each, DTensor) for each in net.parameters())
    save(net, url)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 1), (1, 2, 2)], ids=["fsdp", "hsdp", "fsdp and tp"])
def test_a_sharded_model_comes_back_whole(tmp_path: Path, sizes: tuple[int, int, int]):
    url = str(tmp_path / "checkpoint")
    run_ranks(4, _save_model, url, *sizes)
    torch.manual_seed(1)
    expected = Net().state_dict()
    got = load({name: torch.zeros_like(tensor) for name, tensor in expected.items()}, url)
    assert all(same(got[name], tensor) for name, tensor in expected.items())
    metadata = FsspecReader(url).read_metadata()
    stored = sum(info.length for info in metadata.storage_data.values())
    # What is replicated is there once: each entry costs about 1 KB beside its bytes, and all four norms would be more.
    chunks = [chunk for each in metadata.state_dict_metadata.values() for chunk in each.chunks]
    assert len(metadata.storage_data) == len(chunks)
    assert stored < sum(tensor.nbytes for tensor in expected.values()) + 1600 * len(chunks)


def test_a_tied_tensor_is_there_under_each_name(tmp_path: Path):
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    net["head"].weight = net["embed"].weight
    save(net, str(tmp_path))
    got = load({"embed.weight": torch.zeros(5, 3), "head.weight": torch.zeros(5, 3)}, str(tmp_path))
    assert same(got["embed.weight"], net["embed"].weight)
    assert same(got["head.weight"], net["embed"].weight)


# ---------------------------------------------------------------- pieces and files


def test_a_box_is_cut_in_pieces_that_cover_it_once():
    for box, most in [(whole((7, 5, 3)), 16), (whole((7, 5, 3)), 2), (Box((2, 1), (1, 9)), 4), (whole(()), 1)]:
        parts = list(checkpoint._cut(box, most))
        assert all(part.numel <= most for part in parts)
        assert sum(part.numel for part in parts) == sum(part.numel for part in disjoint(parts)) == box.numel


def test_large_shards_go_in_pieces_and_files(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1000)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 3000)
    full = {"big": random(31, 17), "row": random(1, 700), "column": random(40, 40)[:, 3:9]}
    save(full, str(tmp_path))
    assert len(list(tmp_path.glob("*.distcp"))) > 2
    got = load({name: torch.zeros_like(tensor) for name, tensor in full.items()}, str(tmp_path))
    assert all(same(got[name], tensor) for name, tensor in full.items())


def _memory_to_save(url: str) -> int | None:
    shards = {f"{n}.weight": torch.full((100 * MIB,), n, dtype=torch.uint8)[MIB:] for n in range(4)}
    assert directory.prepare(url, "error")
    with PeakMemory() as memory, Control.of_group() as control:
        stream.save(targets_of(shards), url, control)
    return memory.stop()


def test_saving_does_not_hold_the_shards_twice(url: str):
    """Of 400 MiB, whose storages are larger than the tensors, so that DCP copies what it writes."""
    (peak,) = run_ranks(1, _memory_to_save, url, init=False)
    assert peak < 220 * MIB


# ---------------------------------------------------------------- failures


def _save_where_one_rank_cannot_write(url: str) -> list[Path]:
    if dist.get_rank() == 0:
        directory.prepare(url, "error")
    dist.barrier()
    state_dict = _shard(_full())
    if dist.get_rank() == 2:
        Path(url, "__2_0_0.distcp").mkdir()
    with (
        pytest.raises(SinkError, match=r"rank 2 could not write .*IsADirectoryError") as caught,
        Control.of_group() as it,
    ):
        stream.save(targets_of(state_dict), url, it)
    assert caught.value.rank == 2
    assert url in caught.value.message
    dist.barrier()
    assert directory.exists(url) == "partial"
    if dist.get_rank() == 2:
        Path(url, "__2_0_0.distcp").rmdir()
    dist.barrier()
    directory.discard(url)  # of several ranks at once
    dist.barrier()
    return list(Path(url).parent.iterdir())


def test_one_ranks_failure_is_every_ranks_error_and_leaves_nothing(tmp_path: Path):
    url = str(tmp_path / "checkpoint")
    assert run_ranks(4, _save_where_one_rank_cannot_write, url) == [[]] * 4


def test_metadata_comes_last(tmp_path: Path):
    url = str(tmp_path / "checkpoint")
    directory.prepare(url, "error")
    (tmp_path / "checkpoint" / ".metadata.tmp").mkdir()
    with pytest.raises(SinkError, match=r"rank 0 .*IsADirectoryError"), Control.of_group() as control:
        stream.save(targets_of(_full()), url, control)
    assert sorted(path.name for path in Path(url).iterdir()) == [".incomplete", ".metadata.tmp", "__0_0_0.distcp"]
    assert directory.exists(url) == "partial"


def test_a_save_that_is_left_behind_publishes_nothing(monkeypatch):
    """Another rank fails while rank 0 writes the metadata: what goes on in its thread comes too late."""
    url = f"memory://{uuid.uuid4().hex}"
    writing, go_on = threading.Event(), threading.Event()
    create = checkpoint._Files.create_stream

    @contextmanager
    def slowly(self, path, mode):
        with create(self, path, mode) as stream:
            yield stream
            if str(path).endswith(".metadata.tmp"):
                writing.set()
                assert go_on.wait(60)

    monkeypatch.setattr(checkpoint._Files, "create_stream", slowly)
    directory.prepare(url, "error")

    control = Control.of_group()

    def fail():
        assert writing.wait(60)
        control.fail(SinkError("another rank's"))

    threading.Thread(target=fail).start()
    with pytest.raises(SinkError, match="another rank's"), control:
        stream.save(targets_of({"weight": torch.ones(3)}), url, control)
    (left_behind,) = [each for each in threading.enumerate() if each.name == "loader-save"]
    directory.discard(url)
    go_on.set()
    left_behind.join(60)
    assert directory.exists(url) != "complete"
