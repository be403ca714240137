"""One rank is asked for fewer requests: all ranks of its node make a pause, and no others."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

import loader
from loader.exchange import watch
from tests.checkpoints import random_checkpoint, same_bits
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.ranks import run_ranks
from tests.servers import http_server

TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (256, 384)) for n in range(3)}  # 9 ranges
ASKED = 4
HEARD_OF = 2
"""Seconds, of which the server asks the first; and after which the others have heard of it, by a beat of 50 ms."""


class Throttling:
    """Refuses rank 0's first range, and holds back rank 1's first until its node must know of that."""

    def __init__(self) -> None:
        self.asked: dict[int, list[float]] = defaultdict(list)
        self.refused = threading.Event()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if not request.range or request.range.startswith("bytes=0-"):
            return forward(request)
        self.asked[request.rank].append(time.monotonic())
        if request.rank == 0 and not self.refused.is_set():
            self.refused.set()
            return Reply(503, [("Content-Length", "0"), ("Retry-After", str(ASKED))])
        if request.rank == 1 and len(self.asked[1]) == 1:
            self.refused.wait()
            time.sleep(HEARD_OF)
        return forward(request)


def _load(urls: list[str], whole: str) -> None:
    """Each rank by itself, one range after another: so that nobody waits for rank 0 but for the pause."""
    from safetensors.torch import load_file

    watch.BEAT = 0.05
    expected = load_file(whole)
    target = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    read = {"range_size": "64KiB", "memory_budget": "32MiB", "concurrency": 1, "share": "none"}
    loader.load(target, urls[dist.get_rank()], **read)
    assert all(same_bits(target[key], tensor) for key, tensor in expected.items())


def test_all_ranks_of_the_node_wait_as_long_as_the_server_asks_one_of_them_to(tmp_path: Path):
    random_checkpoint(tmp_path / "checkpoint", TENSORS)
    throttling = Throttling()
    with http_server(tmp_path / "checkpoint") as url, CountingProxy(url, listeners=4) as proxy:
        proxy.on_request(throttling)
        urls = [proxy.url_for(rank) for rank in range(4)]
        run_ranks(4, _load, urls, str(tmp_path / "checkpoint" / "model.safetensors"), nodes=2)
    asked = throttling.asked
    over = asked[0][0] + ASKED
    on_its_way = asked[0][0] + HEARD_OF / 2
    assert all(len(times) >= 9 for times in asked.values())
    for rank in (0, 1):
        assert not [at for at in asked[rank] if on_its_way < at < over]
        assert max(asked[rank]) > over
    assert asked[2][1] < over  # another node's
    assert asked[3][1] < over
