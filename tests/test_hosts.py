"""Several hosts: network namespaces, each with a torchrun of its own, and the bucket outside them.

One is lost in the middle of a load: ended, or cut off, so that its ranks live on and nothing that is sent arrives.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import s3fs
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoints import random_checkpoint, same_bits
from tests.hosts.links import BUCKET, Host, hosts
from tests.hosts.sealed import call_sealed, why_not
from tests.misbehaving import Misbehaving, stall
from tests.processes import seconds_to_end
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.servers import S3Server, s3_server
from tests.torchrun import agents, exit_codes, logs_of, torchrun

HOSTS, EACH = 2, 2
STAYS, LOST = range(2), range(2, 4)
"""Ranks of the first host, which has the rendezvous and the store, and of the second."""
LINK, SLOW = 1000, 4
"""Mbit/s of a host's link: as good as none at all, and so that what each host sends the other, 2 MB, takes 4 s."""
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (2048, 512)) for n in range(4)}  # 8 MB
MISSED = r"rank 2 \(host host-1\) does not answer any more"
BROKEN = r"the connection to rank [23] broke"
"""As which a host is missed that ends, and closes what is open, if something is sent there just then."""
NO_STORE = "the store that ranks talk through is gone"

pytestmark = pytest.mark.timeout(600)  # three starts of torchrun on each host, one after the other


def end(host: Host) -> None:
    for process in host.processes():
        process.kill()


LOSSES: dict[str, tuple[Callable[[Host], None], str]] = {
    "ended": (end, "reading"),
    "cut off": (Host.pull_cables, "reading"),
    "cut off while saving": (Host.pull_cables, "saving"),
}
CUT_OFF = [name for name in LOSSES if name.startswith("cut off")]


@dataclass(frozen=True)
class Loss:
    """What came of a job that lost its second host: by rank, the seconds to its end and the last that it said, as JSON
    has it; the exit codes that torchrun tells on the host that stays; what lies at the output."""

    seconds: dict[int, float]
    told: dict[int, dict[str, Any]]
    codes: dict[int, int]
    left: list[str]


class HeldWrites:
    """A hook: what is written of a checkpoint's weights is taken, and never answered."""

    def __init__(self) -> None:
        self.failed = 0
        self.stop = threading.Event()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.method in {"PUT", "POST"} and request.path.endswith(".distcp"):
            self.failed += 1
            self.stop.wait()
            raise ConnectionResetError
        return forward(request)


class Job:
    """A load on `machines` from the bucket and into it, through a proxy that is outside them."""

    def __init__(self, machines: Sequence[Host], server: S3Server, proxy: CountingProxy, scratch: Path) -> None:
        self._machines = machines
        self._proxy = proxy
        self._scratch = scratch
        self._fs = s3fs.S3FileSystem(**server.storage_options, use_listings_cache=False)
        self._tensors = random_checkpoint(scratch / "source", TENSORS)
        self._uri, self._out = server.put(scratch / "source"), server.prefix()
        config = scratch / "cfg.yaml"
        sections = {
            "source": {"uri": self._uri}, "model": {"builder": None}, "report": str(scratch / "report.json"),
            "placements": [{"match": "*", "shard": {"dp_shard": 1}}], "output": {"checkpoint": self._out},
            "read": {"range_size": "128KiB", "memory_budget": "64MiB"},
        }  # fmt: skip
        config.write_text(json.dumps(sections))
        self._command = ["-m", "loader.init_from_hf", "--config", str(config), "--log-format=json"]
        self._env = server.at(proxy.url).environment

    def lose(self, how: Callable[[Host], None], when: str) -> Loss:
        """Start it, and lose the second host when the bucket holds back its replies to what is read, or saved."""
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        with (
            self._held_back(when) as replies,
            agents(self._machines, EACH, self._command, folder, env=self._env) as started,
        ):
            while not replies.failed:
                assert all(agent.poll() is None for agent in started), _said(folder)
                time.sleep(0.1)
            ranks = {int(p.environ()["RANK"]): p for agent in started for p in psutil.Process(agent.pid).children()}
            since = time.monotonic()
            how(self._machines[1])
            seconds = dict(zip(ranks, seconds_to_end(ranks.values(), since), strict=True))
            started[0].wait(60)  # the other one, cut off, would wait a minute for the rendezvous
        return Loss(seconds, _told(folder), exit_codes(logs_of(folder, 0)[1].read_text()), self._left())

    def run(self) -> tuple[dict[str, Any], list[str]]:
        """Start it, and wait for its end: its report, and which tensors of the checkpoint are not the source's."""
        self._proxy.reset()
        finished = torchrun(EACH, self._command, hosts=self._machines, env=self._env)
        assert finished.returncode == 0, finished.stderr
        return json.loads((self._scratch / "report.json").read_text()), self._differing()

    def _differing(self) -> list[str]:
        self._fs.get(self._out, str(self._scratch / "made"), recursive=True)
        found = {fqn: torch.zeros_like(tensor) for fqn, tensor in self._tensors.items()}
        dcp.load(found, storage_reader=dcp.FileSystemReader(self._scratch / "made"), no_dist=True)
        return [fqn for fqn, tensor in self._tensors.items() if not same_bits(found[fqn], tensor)]

    @contextmanager
    def _held_back(self, when: str) -> Iterator[Misbehaving | HeldWrites]:
        """From the fourth range of weights on replies stop within their bodies, or no write of weights is answered."""
        faults = {self._uri.rsplit("/", 1)[1]: lambda get: stall(get) if get.number >= 3 else None}
        replies = Misbehaving(faults) if when == "reading" else HeldWrites()
        self._proxy.on_request(replies)
        try:
            yield replies
        finally:
            replies.stop.set()

    def _left(self) -> list[str]:
        """The names of the objects at the output. (SeaweedFS lists the emptied directory itself.)"""
        return [name for path in self._fs.ls(self._out, detail=False) if (name := path.rpartition("/")[2])]


def _told(folder: Path) -> dict[int, dict[str, Any]]:
    said = [line for number in range(HOSTS) for line in logs_of(folder, number)[1].read_text().splitlines()]
    lines = [json.loads(line) for line in said if line.startswith('{"time"')]
    return {line["rank"]: line for line in lines if line["level"] == "error"}


def _said(folder: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(folder.iterdir()))


Outcome = tuple[dict[str, Loss], dict[str, Any], list[str]]


def lose_and_start_again() -> Outcome:
    """One loss after the other, each of a job that begins where the last one ended, and then none, on slow links."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        hosts(HOSTS, LINK, LINK) as machines,
        s3_server() as server,
        CountingProxy(server.endpoint, address=BUCKET) as proxy,
    ):
        job = Job(machines, server, proxy, Path(scratch))
        losses = {}
        for name, (how, when) in LOSSES.items():
            losses[name] = job.lose(how, when)
            machines[1].plug_cables_in()
        for host in machines:
            host.set_rate("peer", SLOW)
        return losses, *job.run()


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    if reason := why_not():
        pytest.skip(f"no hosts can be made here: {reason}")
    return call_sealed(lose_and_start_again)


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_that_stay_end_within_10_s_and_name_who_is_lost(outcome, name):
    loss = outcome[0][name]
    assert max(loss.seconds[rank] for rank in STAYS) < 10, loss
    for rank in STAYS:
        told = loss.told[rank]
        assert (told["error"], told["exit_code"]) == ("LostRankError", 1)
        assert told["first_rank"] in LOST
        assert re.search(MISSED if name in CUT_OFF else f"{MISSED}|{BROKEN}", told["message"]), told
    assert loss.codes == dict.fromkeys(STAYS, 1)


@pytest.mark.parametrize("name", CUT_OFF)
def test_ranks_that_are_cut_off_end_as_soon(outcome, name):
    loss = outcome[0][name]
    assert max(loss.seconds[rank] for rank in LOST) < 10, loss
    for rank in LOST:
        told = loss.told[rank]
        assert (told["error"], told["exit_code"]) == ("LostRankError", 1)
        assert NO_STORE in told["message"]


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_left_that_could_pass_for_a_checkpoint(outcome, name):
    assert set(outcome[0][name].left) <= {".incomplete", "config.json"}


def test_started_again_it_loads_every_bit(outcome):
    _, report, differing = outcome
    assert report["world_size"] == HOSTS * EACH
    assert differing == []


def test_a_slow_link_between_the_hosts_is_what_bounds_it(outcome):
    _, report, _ = outcome
    assert (report["bound_by"], report["advice"].split(":")[0]) == ("exchange", "read.share")
    assert "node keeps the exchange within each host" in report["advice"]
    assert {rank["host"] for rank in report["ranks"]} == {"host-0", "host-1"}
