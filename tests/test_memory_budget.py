"""A rank's memory above its own shards stays within the budget, however large the checkpoint and its tensors: the
host's, and a device's where there is one."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from loader.errors import MemoryBudgetError
from loader.library import load  # now: imports are no part of a load
from loader.report import Report
from loader.store.base import Access
from loader.store.schemes import import_scheme
from tests.ranks import run_ranks
from tests.shards import write_file

MIB = 1 << 20
BUDGET = 16 * MIB
WITH_CLIENT = 32 * MIB
"""An open S3 client takes 16 MiB, whatever it reads (botocore's models), and is counted."""
LAYOUTS = {"fsdp": Shard(0), "tp columns": Shard(1), "replicated": Replicate()}
NODES = [1, 4]
"""Of one, ranks share memory; between several they send messages, which they hold beside what they read."""
SHAPES = {"large": (4096, 5632), **{f"layers.{n}": (2048, 1024) for n in range(30)}, "odd": (1021, 513)}


class Peak:
    """The most anonymous memory that the kernel counts while the context lasts, above that at its begin."""

    def __enter__(self):
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.peak - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(kilobytes) * 1024 for kilobytes in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))


class DevicePeak:
    """The most that torch gave out on this process's device since the context began, above that at its begin."""

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        torch.cuda.synchronize()

    @property
    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


def _tensor(key: str) -> torch.Tensor:
    """Every element tells its key and place."""
    shape = SHAPES[key]
    first = list(SHAPES).index(key) * 1_000_003
    return torch.arange(first, first + shape[0] * shape[1], dtype=torch.int32).view(shape).view(torch.float32)


def _load(
    uri: str, options: Mapping, layout: str, budget: int, range_size: str = "4MiB", device: str = "cpu"
) -> tuple[list[str], int, Report]:
    mesh = init_device_mesh(device, (4,))
    placement = LAYOUTS[layout]
    state = {}
    for key, shape in SHAPES.items():
        local = list(shape)
        if isinstance(placement, Shard):
            first, stop = _part(shape[placement.dim])
            local[placement.dim] = stop - first
        # Touched before the load, so that all that comes on top is the load's.
        shard = torch.full(local, -1.0, device=device)
        state[key] = DTensor.from_local(shard, mesh, [placement], run_check=False, shape=shape, stride=(shape[1], 1))
    import_scheme(Access(uri, dict(options), 1, 1.0))
    with Peak() if device == "cpu" else DevicePeak() as peak:
        report = load(state, uri, storage_options=options, memory_budget=budget, range_size=range_size)
    wrong = [key for key, each in state.items() if not _right(each.to_local().cpu(), _tensor(key), placement)]
    return wrong, peak.bytes, report


def _part(size: int) -> tuple[int, int]:
    step = -(-size // 4)
    return tuple(min(size, step * n) for n in (int(os.environ["RANK"]), int(os.environ["RANK"]) + 1))


def _right(local: torch.Tensor, whole: torch.Tensor, placement: Shard | Replicate) -> bool:
    if isinstance(placement, Shard):
        first, stop = _part(whole.shape[placement.dim])
        whole = whole.narrow(placement.dim, first, stop - first)
    return torch.equal(local.view(torch.int32), whole.view(torch.int32))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    path = directory / "model.safetensors"
    write_file(path, {key: _tensor(key) for key in SHAPES})
    assert path.stat().st_size >= 8 * WITH_CLIENT
    assert _tensor("large").nbytes > 2 * WITH_CLIENT
    return directory


@pytest.fixture(scope="module")
def uri(s3, directory):
    return s3.put(directory)


def _check(uri: str, options: Mapping, layout: str, budget: int, *range_size: str, nodes: int = 1) -> None:
    for wrong, peak, report in run_ranks(4, _load, uri, options, layout, budget, *range_size, nodes=nodes):
        assert wrong == []
        assert peak <= budget
        assert 0 < report.memory.peak_over_shards_bytes <= budget == report.memory.budget_bytes


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_above_the_shards_is_within_the_budget(directory, layout, nodes):
    _check(str(directory), {}, layout, BUDGET, nodes=nodes)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bucket_s_client_is_within_it_too(s3, uri, layout, nodes):
    _check(uri, s3.storage_options, layout, WITH_CLIENT, nodes=nodes)


@pytest.mark.parametrize("nodes", NODES)
def test_what_small_ranges_take_beside_their_bytes_is_within_it(s3, uri, nodes):
    _check(uri, s3.storage_options, "replicated", 2 * WITH_CLIENT, "64KiB", nodes=nodes)


if torch.cuda.is_available():

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_peak_on_a_device_is_within_it_too(directory, layout):
        for wrong, peak, _ in run_ranks(4, _load, str(directory), {}, layout, BUDGET, "4MiB", "cuda"):
            assert wrong == []
            assert peak <= BUDGET


def _refused(uri: str, options: Mapping) -> str:
    with pytest.raises(MemoryBudgetError) as error:
        _load(uri, options, "fsdp", BUDGET)
    return str(error.value)


def test_a_budget_that_the_client_alone_takes_is_refused(s3, uri):
    (message,) = set(run_ranks(4, _refused, uri, s3.storage_options))
    assert message.startswith("read.memory_budget: 16777216 bytes, of which the storage client")
    assert message.endswith("set it to at least 26MiB")
