"""One checkpoint into one mesh by several ways: this loader, with and without sharing, and what is done without it.

    python tests/benchmarks/peers.py [--size 2GiB] [--repeats 3] [--ranks 4] [--nodes 1] [--mesh fsdp]
                                     [--contenders NAME …] [--budget 128MiB]

A Llama-shaped checkpoint of random bits, in several files, is put on a real S3 server (SeaweedFS) on loopback. Then for
each mesh (FSDP over all ranks; HSDP, twice over half of them; TP, every matrix cut by columns) each contender (see
`frameworks.py`; obstore and Run:ai's streamer where the extra `bench` is installed) loads it

- once through a counting proxy: what the server sent is counted there, and every bit of what landed is compared;
- `--repeats` times straight from the server, all contenders in turn, each time in another order: the timed runs.

Each run is in fresh processes that have made their imports. A run's time is from a barrier to a barrier, the slowest
rank's. Peak memory is the worst rank's private and shared anonymous memory (as the kernel counts it) above what it had
before, the shards among that: they are touched before the clock starts, so no contender pays for their pages. What a
contender leaves to the page cache is not counted. `ratio` is the time as a multiple of the first contender's.

`http.client, reused buffers` is no contender but a floor under their CPU: the ranks together read every byte of the
files once, each its part of the ranges, of this loader's default size, with as many threads as it has ranges in flight
at first (see `clients.py`). Nothing lands or is checked, and what it needs (a client, signed URLs, touched buffers) it
has before the clock starts. `of floor` is a contender's CPU as a multiple of it.

All ranks share this machine's memory; with `--nodes` they believe to be on so many nodes, each with its own. Server and
ranks share this machine's cores and there is no network between them: read the bytes, GETs, memory and CPU as they are,
and the clock as what a contender's own work takes.
"""

# ruff: noqa: E402 - a command's own folder is on the path, not the repository
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # the fork server imports gcsfs: see tests/conftest.py

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from launch.local_s3 import S3Server, s3_server
from loader.config.model import Read
from loader.config.values import parse_bytes
from loader.ground.memory import PeakMemory
from loader.place.state_dict import Rule, empty_state_dict
from tests.benchmarks.clients import files_of, ranges_of, reading
from tests.benchmarks.contenders import IN_FLIGHT, Job, part_of
from tests.benchmarks.frameworks import ALL, not_run
from tests.checkpoints import random_checkpoint, same_bits
from tests.proxy import CountingProxy
from tests.ranks import run_ranks

CONTENDERS = [
    "loader, share=world", "loader, share=none", "s3fs, own slices", "s3fs get, dcp.load",
    "obstore, own slices", "Run:ai streamer", "Run:ai, distributed",
]  # fmt: skip
FLOOR = "http.client, reused buffers"
FILES = 8
LAYERS = 8
DTYPE = torch.bfloat16
ROWS: list[Rule] = [("*", {"dp_shard": 0})]
COLUMNS: list[Rule] = [("*norm*", {}), ("*", {"tp": 1})]


def mesh_of(name: str, ranks: int) -> tuple[dict[str, int], list[Rule]]:
    """The mesh's dims, and how it shards."""
    return {
        "fsdp": ({"dp_shard": ranks}, ROWS),
        "hsdp": ({"dp_replicate": 2, "dp_shard": ranks // 2}, ROWS),
        "tp": ({"tp": ranks}, COLUMNS),
    }[name]


def llama_shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of about `size` bytes in DTYPE, in the proportions of Llama 3 (hidden size a multiple of 64)."""
    hidden = max(64, int(math.sqrt(size / DTYPE.itemsize / (13 * LAYERS + 32))) // 64 * 64)
    inner, kv, vocabulary = hidden * 7 // 2, hidden // 4, 16 * hidden
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in layer.items()}
    ends = {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {"model.embed_tokens.weight": (vocabulary, hidden), **layers, **ends}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One rank's run: seconds between the barriers, CPU seconds of all its threads, bytes above the shards."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def floor(job: Job) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """What reads this rank's part of all ranges, and lands nothing."""
    files = files_of(job.uri, job.storage_options, IN_FLIGHT)
    stored = [files[name] for name in sorted(files) if name.endswith(".safetensors")]
    ranges = [each for file in stored for each in ranges_of(file, Read().range_size)]
    return reading(ranges[dist.get_rank() :: dist.get_world_size()], IN_FLIGHT)


def ready(
    contender: str, job: Job, state: dict[str, DTensor]
) -> contextlib.AbstractContextManager[Callable[[], object]]:
    """What runs it: a contender gets ready while the clock goes, the floor does before."""
    if contender == FLOOR:
        return floor(job)
    return contextlib.nullcontext(functools.partial(ALL[contender], job, state))


def measure(
    contender: str, mesh: str, shapes: Mapping[str, tuple[int, ...]], job: Job, compare_with: Path | None
) -> Measured:
    """Run one contender on this rank."""
    sizes, rules = mesh_of(mesh, dist.get_world_size())
    device_mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    state = empty_state_dict({key: (shape, DTYPE) for key, shape in shapes.items()}, device_mesh, rules, "cpu")
    for tensor in state.values():
        tensor.to_local().zero_()
    job = job._replace(scratch=job.scratch / os.environ["GROUP_RANK"])
    job.scratch.mkdir(exist_ok=True)
    with ready(contender, job, state) as run:
        memory = PeakMemory()
        memory.start()
        dist.barrier()
        begun, cpu = time.perf_counter(), time.process_time()
        run()
        dist.barrier()
        result = Measured(time.perf_counter() - begun, time.process_time() - cpu, memory.stop() or 0)
    if compare_with is not None and contender != FLOOR:
        compare(state, compare_with)
    return result


def compare(state: Mapping[str, torch.Tensor], directory: Path) -> int:
    """Compare every shard with its part of the files in `directory`, bit for bit. Returns how many bytes these are."""
    left, compared = set(state), 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                tensor = state[key]
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                assert same_bits(local, file.get_slice(key)[part_of(tensor)]), f"{key} differs"
                left.remove(key)
                compared += local.nbytes
    assert not left, left
    return compared


Runs = Sequence[list[Measured]]
"""Of one contender: each run's ranks."""


class Benchmark:
    """A checkpoint on a server, for loading again and again."""

    def __init__(
        self, server: S3Server, proxy: CountingProxy, size: int, ranks: int, budget: int, nodes: int = 1
    ) -> None:
        self.server, self.proxy, self.ranks, self.nodes, self.budget = server, proxy, ranks, nodes, budget
        self.shapes = llama_shapes(size)
        self.uri = server.prefix()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """Write the checkpoint, upload it, and keep a copy to compare with."""
        with tempfile.TemporaryDirectory(prefix="peers-") as directory:
            path = Path(directory)
            random_checkpoint(path, {key: (DTYPE, shape) for key, shape in self.shapes.items()}, files=FILES)
            self.bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            self.server.put(path, self.uri)
            yield path

    def run(self, contender: str, mesh: str, *, compare_with: Path | None = None, **read: Any) -> list[Measured]:
        """Every rank's measures; with `compare_with`, through the proxy, and compared with that directory. `read` are
        settings of this loader."""
        server = self.server if compare_with is None else self.server.at(self.proxy.url)
        with tempfile.TemporaryDirectory(prefix="peers-") as scratch, contextlib.redirect_stdout(io.StringIO()):
            job = Job(self.uri, server.storage_options, self.budget, Path(scratch), read)
            args = (contender, mesh, self.shapes, job, compare_with)
            return run_ranks(self.ranks, measure, *args, timeout=600, nodes=self.nodes)

    def count(self, contender: str, mesh: str, directory: Path) -> tuple[float, int]:
        """Bytes that the server sent for each byte of the checkpoint, and GETs of its files."""
        self.proxy.reset()
        self.run(contender, mesh, compare_with=directory)
        return self.proxy.bytes_served(".safetensors") / self.bytes, len(self.proxy.select(".safetensors"))

    def row(self, counts: tuple[float, int], runs: Runs, first: Runs, floor: Runs) -> str:
        ratio, gets = counts
        peak = max(rank.peak_bytes for run in runs for rank in run) / 2**20
        used = f"{cpu(runs) / self.bytes * 1e9:10.2f}{cpu(runs) / cpu(floor):10.2f}"
        return f"{ratio:10.3f}{gets:7}{peak:10.0f}{used}{wall(runs):9.2f}{wall(runs) / wall(first):8.2f}"


def cpu(runs: Runs) -> float:
    """The median of the runs' CPU seconds, each its ranks' together."""
    return statistics.median(sum(rank.cpu_seconds for rank in run) for run in runs)


def wall(runs: Runs) -> float:
    """The median of the runs' times, each its slowest rank's."""
    return statistics.median(max(rank.seconds for rank in run) for run in runs)


def run_all(benchmark: Benchmark, meshes: Sequence[str], contenders: Sequence[str], repeats: int) -> None:
    reasons = {name: not_run(name) for name in contenders}
    names = [*(name for name, reason in reasons.items() if not reason), FLOOR]
    with benchmark.checkpoint() as directory:
        world = f"{benchmark.ranks} ranks on {benchmark.nodes} nodes"
        print(f"{benchmark.bytes / 2**20:.0f} MiB in {FILES} files, {world}, {os.cpu_count()} cores")
        counts = {(mesh, name): benchmark.count(name, mesh, directory) for mesh in meshes for name in names}
        runs: dict[tuple[str, str], list[list[Measured]]] = {pair: [] for pair in counts}
        for repeat in range(repeats):
            for mesh in meshes:
                for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                    runs[mesh, name].append(benchmark.run(name, mesh))
        print(f"mesh  {'contender':28} sent/byte   GETs  peak MiB  CPU s/GB  of floor   wall s   ratio")
        for (mesh, name), measured in runs.items():
            first, lowest = runs[mesh, names[0]], runs[mesh, FLOOR]
            print(f"{mesh:6}{name:28}{benchmark.row(counts[mesh, name], measured, first, lowest)}")
        print(f"{FLOOR}: a floor under CPU and no loader; every byte is read once, and none lands")
        print(*filter(None, reasons.values()), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default="2GiB", help="of the checkpoint, about")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=1, help="that the ranks believe to be on")
    parser.add_argument("--mesh", action="append", choices=["fsdp", "hsdp", "tp"], help="may be repeated; default: all")
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", choices=ALL, default=CONTENDERS, help="as in the table"
    )
    parser.add_argument("--budget", type=parse_bytes, default="128MiB", help="memory for each rank above its shards")
    given = parser.parse_args()
    with s3_server() as server, CountingProxy(server.endpoint) as proxy:
        benchmark = Benchmark(server, proxy, given.size, given.ranks, given.budget, given.nodes)
        run_all(benchmark, given.mesh or ["fsdp", "hsdp", "tp"], given.contenders, given.repeats)


if __name__ == "__main__":
    main()
