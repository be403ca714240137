"""One rank is asked for fewer requests: all ranks of its node make a pause, and no others."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import loader
from loader.exchange import watch
from loader.ground.pause import Pause
from tests.checkpoints import random_checkpoint, same_bits
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.ranks import run_ranks
from tests.servers import http_server

TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (256, 384)) for n in range(3)}  # 9 ranges
pytestmark = pytest.mark.timeout(300)

ASKED = 4
"""Seconds that the server asks rank 0 to wait."""


class Throttling:
    """Refuses rank 0's first range, and holds rank 1's first back until that has heard of it and made `heard`."""

    def __init__(self, heard: Path) -> None:
        self.heard = heard
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
            while not self.heard.exists():
                time.sleep(0.05)
        return forward(request)


def _load(urls: list[str], whole: str, heard: str) -> bool:
    """Each rank by itself, one range after another: so that nobody waits for rank 0 but for the pause. Whether it heard
    of one; what rank 1 does `heard` says at once."""
    from safetensors.torch import load_file

    watch.BEAT = 0.05
    paused = []
    extend = Pause.extend

    def noted(self: Pause, until: float) -> None:
        extend(self, until)
        if until > 0:
            paused.append(until)
            if dist.get_rank() == 1:
                Path(heard).touch()

    Pause.extend = noted  # type: ignore[method-assign]
    expected = load_file(whole)
    target = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    read = {"range_size": "64KiB", "memory_budget": "32MiB", "concurrency": 1, "share": "none", "timeout": "90s"}
    loader.load(target, urls[dist.get_rank()], **read)
    assert all(same_bits(target[key], tensor) for key, tensor in expected.items())
    return bool(paused)


def test_all_ranks_of_the_node_wait_as_long_as_the_server_asks_one_of_them_to(tmp_path: Path):
    random_checkpoint(tmp_path / "checkpoint", TENSORS)
    heard = tmp_path / "heard"
    throttling = Throttling(heard)
    with http_server(tmp_path / "checkpoint") as url, CountingProxy(url, listeners=4) as proxy:
        proxy.on_request(throttling)
        urls = [proxy.url_for(rank) for rank in range(4)]
        whole = str(tmp_path / "checkpoint" / "model.safetensors")
        paused = run_ranks(4, _load, urls, whole, str(heard), nodes=2)
    assert paused == [True, True, False, False]  # the last two are another node's
    asked = throttling.asked
    over = asked[0][0] + ASKED
    assert all(len(times) >= 9 for times in asked.values())
    assert min(asked[0][1:] + asked[1][1:]) > over
