"""What ends a job in the middle, on whichever rank: every rank ends soon with one error, and a restart just works."""

from __future__ import annotations

import itertools
import json
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

import loader
from loader.errors import LoaderError
from loader.place.landing import Landings
from loader.stream.pipeline import Pipeline
from tests.checkpoints import random_checkpoint
from tests.endings import SOON, Giving, took
from tests.misbehaving import FILE, Get, Misbehaving, stall
from tests.processes import kill_tree, seconds_to_end
from tests.proxy import CountingProxy, Reply
from tests.ranks import run_ranks
from tests.servers import http_server
from tests.torchrun import TWO_HOSTS, Finished, torchrun

RANKS = 4
pytestmark = pytest.mark.timeout(300)
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (2048, 1024)) for n in range(4)}  # 16 MB

# In one process group: every rank raises alike, and the group works on


def _raises(checkpoint: Any, _: Any) -> Any:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("in the user's code")
    return dict(checkpoint)


def _out_of_memory(patch: pytest.MonkeyPatch) -> None:
    land, calls = Landings.land, itertools.count()

    def full(self: Landings, *args: Any) -> None:
        if next(calls) == 2:
            raise MemoryError
        land(self, *args)

    patch.setattr(Landings, "land", full)


def _no_address_space(patch: pytest.MonkeyPatch) -> None:
    """As much as is mapped when the rounds begin, and little more: their buffers take 8 MiB. (Before that, gloo ends
    the process where it gets no thread: to the others that rank is lost.)"""
    run = Pipeline.run

    def limited(self: Pipeline) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (2 << 20), most))
        run(self)

    patch.setattr(Pipeline, "run", limited)


FAILURES = {
    "conversion": ("ConversionError", "ZeroDivisionError: in the user's code"),
    "out of memory": ("MemoryBudgetError", "read.memory_budget"),
    "address space": ("MemoryBudgetError", "read.memory_budget"),
}


def _fail(uri: str) -> dict[str, Any]:
    rank, told = dist.get_rank(), {}
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in FAILURES:
        target = {key: zeros(*s, dtype=d, device_mesh=mesh, placements=[Shard(1)]) for key, (d, s) in TENSORS.items()}
        options: dict[str, Any] = {"memory_budget": "48MiB", "range_size": "128KiB"}
        if name == "conversion":
            options["convert"] = _raises
        limits = resource.getrlimit(resource.RLIMIT_AS)
        with pytest.MonkeyPatch.context() as patch:
            giving = Giving(patch)
            if rank == 1 and name == "out of memory":
                _out_of_memory(patch)
            if rank == 1 and name == "address space":
                _no_address_space(patch)
            with pytest.raises(LoaderError) as raised:
                loader.load(target, uri, **options)
            resource.setrlimit(resource.RLIMIT_AS, limits)
        error = raised.value
        told[name] = type(error).__name__, str(error), error.rank, giving.end()
        dist.all_reduce(total := torch.ones(1))
        assert total.item() == RANKS
    return told


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    random_checkpoint(directory, TENSORS)
    (directory / "config.json").write_text("{}")
    return run_ranks(RANKS, _fail, str(directory))


@pytest.mark.parametrize("name", FAILURES)
def test_one_ranks_failure_is_everyones(failed, name):
    told = [each[name] for each in failed]
    assert {each[:3] for each in told} == {told[0][:3]}
    kind, message, rank, _ = told[0]
    assert (kind, rank) == (FAILURES[name][0], 1)
    assert FAILURES[name][1] in message
    assert took(ending for *_, ending in told) < SOON


# Under several torchruns: none of them may be left to clean up for another


class Job:
    """A job of two hosts with two ranks each, which hangs in the middle of its reads until `go_on`."""

    def __init__(self, directory: Path, url: str, proxy: CountingProxy) -> None:
        self.out = directory / "out"
        self.hanging = Misbehaving({"good": self._hang})
        self.proxy = proxy
        proxy.on_request(self.hanging)
        self.config = directory / "cfg.yaml"
        sections = {
            "source": {"uri": f"{url}/good"}, "model": {"builder": None}, "report": None,
            "placements": [{"match": "*", "shard": {"dp_shard": 1}}], "output": {"checkpoint": str(self.out)},
            "read": {"range_size": "128KiB", "memory_budget": "32MiB", "timeout": "60s"},
        }  # fmt: skip
        self.config.write_text(json.dumps(sections))
        self.seconds = 0.0
        """From the strike to the last rank's end: torchrun's own, after that, may take longer."""

    @staticmethod
    def _hang(get: Get) -> Reply | None:
        return stall(get) if get.number >= 3 else None

    def run(self, strike: Any) -> Finished:
        """Start it, and `strike(agents)` when it hangs."""

        def meanwhile(agents: Any) -> None:
            while not self.hanging.failed:
                assert all(agent.poll() is None for agent in agents)
                time.sleep(0.1)
            assert self.out.exists()
            ranks = [rank for agent in agents for rank in psutil.Process(agent.pid).children()]
            since = time.monotonic()
            strike(agents)
            self.seconds = max(seconds_to_end(ranks, since))

        return torchrun(2, ["-m", "loader.init_from_hf", "--config", self.config], hosts=TWO_HOSTS, meanwhile=meanwhile)

    def works_when_started_again(self) -> None:
        self.proxy.reset()
        again = torchrun(2, ["-m", "loader.init_from_hf", "--config", self.config])
        assert again.returncode == 0, again.stderr
        assert (self.out / ".metadata").exists()


@pytest.fixture
def job(tmp_path) -> Iterator[Job]:
    random_checkpoint(tmp_path / "served" / "good", TENSORS)
    assert (tmp_path / "served" / "good" / FILE).exists()
    with http_server(tmp_path / "served") as url, CountingProxy(url) as proxy:
        made = Job(tmp_path, proxy.url, proxy)
        try:
            yield made
        finally:
            made.hanging.stop.set()


def _told(finished: Finished) -> dict[int, str]:
    """The last words of each rank that had any."""
    return {int(r): said for r, said in re.findall(r"^rank (\d): (.*)", finished.stderr, re.MULTILINE)}


def test_the_stores_host_that_is_lost_ends_the_other(job):
    """It takes its agent with it, so the other host's ranks must see for themselves. (`test_hosts.py` has the rest.)"""
    finished = job.run(lambda agents: kill_tree(agents[0].pid))
    assert job.seconds < SOON
    told = _told(finished)
    assert len(told) == 2, finished.stderr
    for said in told.values():
        assert said.startswith("LostRankError: ")
        assert re.search(r"rank \d|the store that ranks talk through is gone", said)
    job.works_when_started_again()


def test_sigterm_ends_it_cleanly(job):
    finished = job.run(lambda agents: [agent.send_signal(signal.SIGTERM) for agent in agents])
    assert job.seconds < 15  # within which a launcher's own grace, often 30 s, is not spent
    assert finished.returncode != 0
    told = _told(finished)
    assert told, finished.stderr
    assert any(said.startswith("TerminatedError: ended by SIGTERM") for said in told.values()), told
    assert not job.out.exists()
    job.works_when_started_again()
