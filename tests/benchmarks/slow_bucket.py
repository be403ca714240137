"""What a bucket that is slow to answer costs: a load from one that waits before every reply, and from one that stalls.

    python tests/benchmarks/slow_bucket.py [--size 512MiB] [--range 1MiB] [--concurrency 4] [--delay 50] [--repeats 5]

One process loads a tensor from a real S3 server (SeaweedFS) on loopback, through a proxy

- `prompt`: that only passes on;
- `slow`: that waits --delay ms before every reply;
- `stalling`: in which the connection that --at range (from 0) comes through is silent for 5 s in the middle of its
  body, and so is each 50th from there on.

The loads are interleaved. `found` is how many ranges at once the load came to, of --concurrency at first. Medians; the
ratios are to `prompt`, `rate` of the bytes a second in the last half of the load, when the concurrency has been found.
"""

# ruff: noqa: E402 - a command's own folder is on the path, not the repository
from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

import loader
from launch.local_s3 import s3_server
from loader.config.values import parse_bytes
from tests.checkpoints import random_checkpoint
from tests.proxy import CountingProxy, Forward, Reply, Request

STALL = 5.0
ONE_IN = 50
"""Connections of which one stalls."""


class Bucket:
    """A hook for the proxy, and what it saw: when each reply was done, and the most that were under way."""

    def __init__(self, wait: float, stall_at: float) -> None:
        self.wait, self.stall_at = wait, stall_at
        self.now = self.most = 0
        self.times: list[float] = []
        self.lock = threading.Lock()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.method != "GET" or not request.range:
            return forward(request)
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            count = len(self.times)
            self.times.append(0.0)
        time.sleep(self.wait)
        reply = forward(request)
        stalls = count >= self.stall_at and (count - self.stall_at) % ONE_IN == 0
        return Reply(reply.status, reply.headers, self._passed_on(reply, STALL * stalls, count))

    def _passed_on(self, reply: Reply, stall: float, count: int) -> Iterator[bytes | memoryview]:
        for chunk in reply.chunks:
            yield chunk
            time.sleep(stall)
            stall = 0.0
        with self.lock:
            self.now -= 1
            self.times[count] = time.monotonic()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512MiB")
    parser.add_argument("--range", default="1MiB", help="read.range_size")
    parser.add_argument("--concurrency", type=int, default=4, help="read.concurrency")
    parser.add_argument("--delay", type=float, default=50, help="ms")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--at", type=int, default=5, help="the first range whose connection stalls")
    given = parser.parse_args()
    rows = parse_bytes(given.size) // 8192
    kinds = {
        "prompt": (0.0, math.inf),
        "slow": (given.delay / 1000, math.inf),
        "stalling": (0.0, given.at),
    }
    runs = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder, s3_server() as server, CountingProxy(server.endpoint) as proxy:
        random_checkpoint(Path(folder), {"weight": (torch.bfloat16, (rows, 4096))})
        uri = server.put(Path(folder))
        target = {"weight": torch.zeros(rows, 4096, dtype=torch.bfloat16)}
        for _ in range(given.repeats):
            for name, trouble in kinds.items():
                bucket = Bucket(*trouble)
                proxy.on_request(bucket)
                begun = time.monotonic()
                report = loader.load(
                    target,
                    uri,
                    storage_options=server.at(proxy.url).storage_options,
                    concurrency=given.concurrency,
                    range_size=given.range,
                )
                seconds = time.monotonic() - begun
                times = sorted(filter(None, bucket.times))
                half = times[len(times) // 2]
                rate = len(times) / 2 / (times[-1] - half)
                runs[name].append((seconds, rate, bucket.most, report.hedged_bytes / report.fetched_bytes))
    prompt = [statistics.median(column) for column in zip(*runs["prompt"], strict=True)]
    print(f"{given.size}, {given.range} ranges, {given.concurrency} at first")
    print(f"{'bucket':10}{'wall s':>9}{'longer by':>11}{'rate':>8}{'found':>8}{'twice':>8}")
    for name, each in runs.items():
        seconds, rate, most, hedged = (statistics.median(column) for column in zip(*each, strict=True))
        longer, ratio = seconds - prompt[0], rate / prompt[1]
        print(f"{name:10}{seconds:9.2f}{longer:9.2f} s{ratio:8.2f}{most:8.0f}{hedged:8.2%}")
