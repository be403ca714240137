"""What `verify:` costs a load, in CPU seconds of all ranks for each GB that they read.

    python tests/benchmarks/proofs.py [--size 1GiB] [--repeats 5] [--ranks 2] [--budget 128MiB]

One checkpoint on a real S3 server on loopback, FSDP over all ranks, with `verify:` null, fingerprint and checksum in
turn, each time in another order. Every byte is read, landed, and proved once. It tells the median of the repeats, and
the median of what each repeat took more than the one without a proof beside it: the clock and the machine's other work
do not count, as far as the kernel tells them apart.
"""

# ruff: noqa: E402 - a command's own folder is on the path, not the repository
from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.local_s3 import s3_server
from loader.config.values import parse_bytes
from tests.benchmarks.peers import Benchmark
from tests.proxy import CountingProxy

PROOFS = (None, "fingerprint", "checksum")


def cpu_seconds(benchmark: Benchmark, proof: str | None) -> float:
    """Of one load, for each GB."""
    ranks = benchmark.run("loader, share=world", "fsdp", verify=proof)
    return sum(rank.cpu_seconds for rank in ranks) / benchmark.bytes * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default="1GiB", help="of the checkpoint, about")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--budget", type=parse_bytes, default="128MiB", help="memory for each rank above its shards")
    given = parser.parse_args()
    found: dict[str | None, list[float]] = {proof: [] for proof in PROOFS}
    with s3_server() as server, CountingProxy(server.endpoint) as proxy:
        benchmark = Benchmark(server, proxy, given.size, given.ranks, given.budget)
        with benchmark.checkpoint():
            cpu_seconds(benchmark, None)  # the server has read its files once
            for repeat in range(given.repeats):
                for place in range(len(PROOFS)):
                    proof = PROOFS[(repeat + place) % len(PROOFS)]
                    found[proof].append(cpu_seconds(benchmark, proof))
    print("verify        CPU s/GB    more")
    for proof, took in found.items():
        more = statistics.median(with_it - without for with_it, without in zip(took, found[None], strict=True))
        print(f"{proof or 'null':12}{statistics.median(took):10.2f}{more:8.2f}")


if __name__ == "__main__":
    main()
