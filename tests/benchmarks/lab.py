"""Contenders on several hosts with slow links, on one machine: there the network is the bottleneck, as in a cluster.

    python tests/benchmarks/lab.py [--scenario hsdp4 …] [--contenders NAME …] [--repeats 3] [--size 336MiB]
                                   [--bucket 50] [--peers 200] [--budget 64MiB]

Hosts are network namespaces. Each has a link to the bucket and one to the other hosts (veth, held to a rate by tc tbf,
both ways alike; --bucket and --peers in Mbit/s). A real S3 server (SeaweedFS) is on the bucket's side, behind a proxy
that counts. torchrun runs on each host, and each of its ranks loads a Llama-shaped checkpoint of random weights with
each contender (`frameworks.py`) in turn, --repeats times, in fresh processes that have made their imports. The first
time every bit of what landed is compared: `compared` are these bytes, of all ranks, over the checkpoint's. A contender
whose package is not installed is not run, and told.

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
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # see tests/conftest.py

from tests.hosts.sealed import CANNOT, run_sealed, why_not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", default=["hsdp4", "fsdp8", "tp4"], help="also: hsdp2, a small one")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="as in the table; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="336MiB", help="of the checkpoint, about")
    parser.add_argument("--bucket", type=float, default=50, help="Mbit/s of a host's link to the bucket")
    parser.add_argument("--peers", type=float, default=200, help="Mbit/s of a host's link to the others")
    parser.add_argument("--budget", default="64MiB", help="memory for each rank above its shards")
    parser.add_argument("--range", default="512KiB", help="this loader's read.range_size")
    parser.add_argument("--concurrency", type=int, default=4, help="this loader's read.concurrency")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run")
    parser.add_argument("--sealed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sealed:
        from tests.benchmarks.hosts import bench  # takes seconds to import, of which a reason has no need

        bench.check(given)
        for name in given.scenario:
            bench.run_scenario(name, given)
        return 0
    if reason := why_not():
        print(f"the lab cannot make its hosts here: {reason}")
        return CANNOT
    return run_sealed([__file__, *sys.argv[1:], "--sealed"])


if __name__ == "__main__":
    sys.exit(main())
