"""Contenders on several hosts with slow links, on one machine: there the network is the bottleneck, as in a cluster.

    python tests/benchmarks/lab.py [--scenario hsdp4] [--contenders world slices] [--repeats 3] [--size 112MiB]
                                   [--bucket 50] [--peers 200] [--budget 64MiB]

Hosts are network namespaces. Each has a link to the bucket and one to the other hosts (veth, held to a rate by tc tbf,
both ways alike; --bucket and --peers in Mbit/s). A real S3 server (SeaweedFS) is on the bucket's side, behind a proxy
that counts. torchrun runs on each host, and each of its ranks loads a Llama-shaped checkpoint of random weights with
each contender (`frameworks.py`) in turn, --repeats times, in fresh processes that have made their imports. The first
time every bit of what landed is compared.

A run's time is from a barrier to a barrier. `of ideal` is that time, less this loader's start-up (its catalog and plan,
in the column beside it), over the needed bytes divided by the sum of the hosts' links to the bucket. Bytes served and
GETs are counted in the proxy; bytes between hosts are the links' own counters, headers among them. Memory is the worst
rank's peak of its proportional share (PSS) above what it had before, mapped files among it; the shards are touched
before.

Nothing is left behind: it all runs in namespaces of its own, which end with their first process. It takes root; where
no namespaces can be made it says why, in a line, and exits with 69.
"""

# ruff: noqa: E402 - a command's own folder is on the path, not the repository
from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # see tests/conftest.py

from safetensors import safe_open

from launch.local_checkpoints import tiny_llama
from launch.local_s3 import S3Server, s3_server
from loader.config.values import parse_bytes
from loader.place.state_dict import Rule
from tests.benchmarks.frameworks import ALL, missing
from tests.benchmarks.hosts.fleet import Fleet, FleetError, fleet
from tests.benchmarks.hosts.links import BUCKET, hosts
from tests.benchmarks.hosts.sealed import CANNOT, run_sealed, why_not
from tests.benchmarks.hosts.tasks import Measured, Task
from tests.benchmarks.peers import COLUMNS, ROWS
from tests.proxy import CountingProxy

LAYERS = 8
FILES = 4


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How many hosts and ranks there are, and how the checkpoint is sharded over them."""

    hosts: int
    ranks_per_host: int
    mesh: Mapping[str, int]
    rules: list[Rule]


SCENARIOS = {
    "hsdp4": Scenario(4, 1, {"dp_replicate": 4, "dp_shard": 1}, ROWS),
    "fsdp8": Scenario(4, 2, {"dp_shard": 8}, ROWS),
    "tp4": Scenario(4, 1, {"tp": 4}, COLUMNS),
    "hsdp2": Scenario(2, 1, {"dp_replicate": 2, "dp_shard": 1}, ROWS),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of one contender: what its ranks measured, and what the bucket served."""

    ranks: list[Measured]
    served: int
    gets: int


@dataclasses.dataclass(frozen=True)
class Bench:
    """A checkpoint in the bucket, and a copy to compare with."""

    given: argparse.Namespace
    server: S3Server
    proxy: CountingProxy
    copy: Path
    uri: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def bytes(self) -> int:
        """All are needed, in every scenario."""
        return sum(2 * _numel(shape) for shape in self.shapes.values())

    def run(self, ranks: Fleet, scenario: Scenario, contender: str, *, check: bool) -> Run:
        self.proxy.reset()
        task = Task(
            contender,
            scenario.mesh,
            scenario.rules,
            self.shapes,
            self.uri,
            self.server.at(self.proxy.url).storage_options,
            self.given.budget,
            {"range_size": self.given.range, "concurrency": self.given.concurrency},
            self.given.timeout,
            self.copy if check else None,
        )
        found = ranks.run(task)
        return Run(found, self.proxy.bytes_served(".safetensors"), len(self.proxy.select(".safetensors")))

    def row(self, scenario: Scenario, runs: Sequence[Run]) -> str:
        def median(of: Iterator[float]) -> float:
            return statistics.median(of)

        seconds = median(max(rank.seconds for rank in run.ranks) for run in runs)
        start_up = median(max(rank.start_up for rank in run.ranks) for run in runs)
        ideal = self.bytes * 8e-6 / (self.given.bucket * scenario.hosts)
        cpu = median(sum(rank.cpu_seconds for rank in run.ranks) for run in runs) / self.bytes * 1e9
        peak = max(rank.peak_bytes for run in runs for rank in run.ranks)
        between = median(sum(rank.peer_bytes for rank in run.ranks) for run in runs)
        served, gets = median(run.served for run in runs), median(run.gets for run in runs)
        return (
            f"{served / self.bytes:9.3f}{gets:6.0f}{seconds:8.2f}{start_up:9.2f}{(seconds - start_up) / ideal:9.2f}"
            f"{cpu:9.2f}{peak / 2**20:9.0f}{between / self.bytes:11.2f}"
        )


HEADER = "   served  GETs  wall s start-up of ideal CPU s/GB peak MiB sent/byte"


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


@contextmanager
def bench(given: argparse.Namespace) -> Iterator[Bench]:
    """Start the server and put the checkpoint there."""
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch, s3_server() as server:
        hidden = max(128, int((given.size / 2 / (13 * LAYERS + 32)) ** 0.5) // 128 * 128)
        directory = tiny_llama(
            Path(scratch),
            files=FILES,
            vocab_size=16 * hidden,
            hidden_size=hidden,
            intermediate_size=hidden * 7 // 2,
            num_hidden_layers=LAYERS,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 128,
        )
        shapes = {}
        for path in directory.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        with CountingProxy(server.endpoint, address=BUCKET) as proxy:
            yield Bench(given, server, proxy, directory, server.put(directory), dict(sorted(shapes.items())))


def run_scenario(name: str, given: argparse.Namespace) -> None:
    """Every contender in turn; a table at the end."""
    scenario = SCENARIOS[name]
    lacking = {each: missing(each) for each in given.contenders}
    runs: dict[str, list[Run]] = defaultdict(list)
    notes = [f"{each}: not run, for there is no package {lacks}" for each, lacks in lacking.items() if lacks]
    with (
        hosts(scenario.hosts, given.bucket, given.peers) as machines,
        bench(given) as made,
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        fleet(machines, scenario.ranks_per_host, Path(folder)) as ranks,
    ):
        running = [each for each, lacks in lacking.items() if not lacks]
        for repeat, contender in itertools.product(range(given.repeats), list(running)):
            if contender not in running:
                continue
            try:
                found = made.run(ranks, scenario, contender, check=repeat == 0)
            except FleetError as error:
                running.remove(contender)
                notes.append(str(error))
                continue
            runs[contender].append(found)
            print(f"{contender:28}{made.row(scenario, [found])}", file=sys.stderr, flush=True)
        print(f"{name}: {scenario.hosts} hosts x {scenario.ranks_per_host} ranks, {dict(scenario.mesh)}")
        print(f"{made.bytes / 1e6:.0f} MB; links: bucket {given.bucket:g}, peers {given.peers:g} Mbit/s a host")
        print(f"processes and imports of torchrun and all ranks, before any of it: {ranks.start_up:.1f} s")
        print(f"{'contender':28}{HEADER}")
        for contender, each in runs.items():
            print(f"{contender:28}{made.row(scenario, each)}")
        print(*notes, sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenario", action="append", choices=SCENARIOS, help="may be repeated; default: the first three"
    )
    parser.add_argument("--contenders", nargs="+", choices=ALL, default=list(ALL), metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=parse_bytes, default="112MiB", help="of the checkpoint, about")
    parser.add_argument("--bucket", type=float, default=50, help="Mbit/s of a host's link to the bucket")
    parser.add_argument("--peers", type=float, default=200, help="Mbit/s of a host's link to the others")
    parser.add_argument("--budget", type=parse_bytes, default="64MiB", help="memory for each rank above its shards")
    parser.add_argument("--range", type=parse_bytes, default="512KiB", help="this loader's read.range_size")
    parser.add_argument("--concurrency", type=int, default=4, help="this loader's read.concurrency")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run")
    parser.add_argument("--sealed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sealed:
        for name in given.scenario or list(SCENARIOS)[:3]:
            run_scenario(name, given)
        return 0
    if reason := why_not():
        print(f"the lab cannot make its hosts here: {reason}")
        return CANNOT
    return run_sealed([__file__, *sys.argv[1:], "--sealed"])


if __name__ == "__main__":
    sys.exit(main())
