"""What memory a load takes above the shards, for budgets from 64 MiB to 1 GiB and checkpoints many times as large.

    python tests/benchmarks/budgets.py [--budget 64MiB …] [--times 6] [--ranks 2] [--nodes 1] [--mesh fsdp]

As `peers.py` does it: random bits on a real S3 server, fresh processes, all bits compared, the peak of anonymous memory
as the kernel counts it, of the worst rank. With as many `--nodes` as ranks these do not share memory, so that all that
one reads for another goes through messages. The time is as a multiple of the first budget's, for as many bytes.
"""

# ruff: noqa: E402 - a command's own folder is on the path, not the repository
from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.local_s3 import s3_server
from loader.config.values import parse_bytes
from tests.benchmarks.peers import Benchmark, wall
from tests.proxy import CountingProxy

CONTENDER = "loader, share=world"
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", nargs="+", type=parse_bytes, default=[64 * MIB, 256 * MIB, 1024 * MIB])
    parser.add_argument("--times", type=int, default=6, help="how many budgets the checkpoint is large")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1, help="that the ranks believe to be on")
    parser.add_argument("--mesh", nargs="+", choices=["fsdp", "hsdp", "tp"], default=["fsdp", "tp"])
    given = parser.parse_args()
    print("budget MiB  checkpoint MiB  mesh  peak MiB  of budget  time", flush=True)
    first: dict[str, float] = {}
    with s3_server() as server, CountingProxy(server.endpoint) as proxy:
        for budget in given.budget:
            benchmark = Benchmark(server, proxy, given.times * budget, given.ranks, budget, given.nodes)
            with benchmark.checkpoint() as directory:
                for mesh in given.mesh:
                    benchmark.count(CONTENDER, mesh, directory)
                    ranks = benchmark.run(CONTENDER, mesh)
                    peak, pace = max(rank.peak_bytes for rank in ranks), wall([ranks]) / benchmark.bytes
                    ratio = pace / first.setdefault(mesh, pace)
                    sizes = f"{budget / MIB:10.0f}{benchmark.bytes / MIB:16.0f}"
                    print(f"{sizes}  {mesh:4}{peak / MIB:10.0f}{peak / budget:11.2f}{ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
