"""What the lab does inside its namespaces: a server, a checkpoint, hosts, and every contender on them in turn."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from launch.local_checkpoints import tiny_llama
from launch.local_s3 import S3Server, s3_server
from loader.config.values import parse_bytes
from loader.place.state_dict import Rule
from tests.benchmarks.frameworks import ALL, not_run
from tests.benchmarks.hosts.fleet import Fleet, FleetError, fleet
from tests.benchmarks.hosts.tasks import Measured, Task
from tests.benchmarks.peers import COLUMNS, DTYPE, ROWS
from tests.hosts.links import BUCKET, hosts
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
        return sum(math.prod(shape) * DTYPE.itemsize for shape in self.shapes.values())

    def run(self, ranks: Fleet, scenario: Scenario, contender: str, *, check: bool) -> Run:
        self.proxy.reset()
        task = Task(
            contender,
            scenario.mesh,
            scenario.rules,
            self.shapes,
            self.uri,
            self.server.at(self.proxy.url).storage_options,
            parse_bytes(self.given.budget),
            {"range_size": parse_bytes(self.given.range), "concurrency": self.given.concurrency},
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
        compared = max(sum(rank.compared for rank in run.ranks) for run in runs)
        between = median(sum(rank.peer_bytes for rank in run.ranks) for run in runs)
        served, gets = median(run.served for run in runs), median(run.gets for run in runs)
        return (
            f"{served / self.bytes:9.3f}{gets:6.0f}{seconds:8.2f}{start_up:9.2f}{(seconds - start_up) / ideal:9.2f}"
            f"{cpu:9.2f}{peak / 2**20:9.0f}{compared / self.bytes:9.3f}{between / self.bytes:10.2f}"
        )


HEADER = "   served  GETs  wall s start-up of ideal CPU s/GB peak MiB compared sent/byte"


@contextmanager
def bench(given: argparse.Namespace) -> Iterator[Bench]:
    """Start the server and put the checkpoint there."""
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch, s3_server() as server:
        hidden = max(128, int((parse_bytes(given.size) / DTYPE.itemsize / (13 * LAYERS + 32)) ** 0.5) // 128 * 128)
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
    reasons = {each: not_run(each) for each in given.contenders or ALL}
    runs: dict[str, list[Run]] = defaultdict(list)
    notes = [reason for reason in reasons.values() if reason]
    with (
        hosts(scenario.hosts, given.bucket, given.peers) as machines,
        bench(given) as made,
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        fleet(machines, scenario.ranks_per_host, Path(folder)) as ranks,
    ):
        running = [each for each, reason in reasons.items() if not reason]
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
            print(f"{contender:32}{made.row(scenario, [found])}", file=sys.stderr, flush=True)
        print(f"{name}: {scenario.hosts} hosts x {scenario.ranks_per_host} ranks, {dict(scenario.mesh)}")
        print(f"{made.bytes / 1e6:.0f} MB; links: bucket {given.bucket:g}, peers {given.peers:g} Mbit/s a host")
        print(f"processes and imports of torchrun and all ranks, before any of it: {ranks.start_up:.1f} s")
        print(f"{'contender':32}{HEADER}")
        for contender, each in runs.items():
            print(f"{contender:32}{made.row(scenario, each)}")
        print(*notes, sep="\n", flush=True)


def check(given: argparse.Namespace) -> None:
    """Raise SystemExit where a scenario or a contender is named that is not."""
    for known, named in ((SCENARIOS, given.scenario), (ALL, given.contenders or ())):
        if unknown := [each for each in named if each not in known]:
            raise SystemExit(f"there is no {unknown[0]!r}, but {', '.join(map(repr, known))}")
