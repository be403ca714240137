"""What breaks in the middle of a load: mended and counted, or told alike on every rank within 10 s."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from launch.local_s3 import free_ports
from loader.errors import LoaderError
from loader.place.landing import Landings
from loader.store.store import Store
from tests.checkpoints import random_checkpoint
from tests.endings import SOON, Ending, Giving, took
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.ranks import Outcome, run_ranks
from tests.shards import blank, differences, shard
from tests.torchrun import TWO_HOSTS, torchrun

RANKS = 4
pytestmark = pytest.mark.timeout(300)
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (1000, 1000)) for n in range(8)}  # 16 MB, in several rounds
READ = {"range_size": "128KiB", "memory_budget": "32MiB", "retries": 1, "timeout": "30s", "concurrency": 4}
FILE = "model.safetensors"

Told = tuple[str, str, int | None, Ending]


# One world, one failure after the other; the client's name tells which


class Trouble:
    """The proxy's hook: what goes wrong in which load. It counts each rank's GETs of weights, from 0."""

    def __init__(self, overwrite: Callable[[], Any]) -> None:
        self.overwrite = overwrite
        self.counts: dict[tuple[str, int], itertools.count[int]] = defaultdict(itertools.count)
        self.failed: dict[str, int] = defaultdict(int)
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        name = _name(request)
        if request.method != "GET" or not request.path.endswith(FILE) or request.range.startswith("bytes=0-"):
            return forward(request)
        with self.lock:
            number = next(self.counts[name, request.rank])
        trouble = getattr(self, name, None)
        reply = trouble(request, number, forward) if trouble else None
        if reply is None:
            return forward(request)
        with self.lock:
            self.failed[name] += 1
        return reply

    # For good

    def e500(self, request, number, forward):
        return _empty(500) if request.rank == 2 and number >= 3 else None

    def e403(self, request, number, forward):
        return _empty(403) if request.rank == 1 and number >= 3 else None

    def reset(self, request, number, forward):
        if request.rank == 3 and number >= 3:
            raise ConnectionResetError

    def stall(self, request, number, forward):
        if request.rank != 0 or number < 3:
            return None
        reply = forward(request)
        reply.chunks = self._then_silence(b"".join(map(bytes, reply.chunks)))
        return reply

    def _then_silence(self, body):
        yield body[: len(body) // 2]
        self.stop.wait()
        raise ConnectionResetError

    def changed(self, request, number, forward):
        if request.rank == 2 and number == 3:
            self.overwrite()

    # For a while

    def burst(self, request, number, forward):
        return _empty(503) if number in (1, 2) else None

    def cut(self, request, number, forward):
        if number % 3:
            return None
        reply = forward(request)
        body = b"".join(map(bytes, reply.chunks))
        reply.headers.append(("Connection", "close"))
        reply.chunks = [body[: len(body) // 3]]
        return reply

    def resets(self, request, number, forward):
        with self.lock:
            again = self.failed["resets"] >= 6
            self.failed["resets"] += not again
        if not again:
            raise ConnectionResetError


def _name(request: Request) -> str:
    """Of the load, which its client was given."""
    return request.headers["User-Agent"].rpartition("load/")[2]


def _empty(status: int) -> Reply:
    return Reply(status, [("Content-Length", "0")])


FATAL = {
    "e500": ("StoreError", 2, ["status 500", "2 tries", "read.retries is 1"]),
    "e403": ("StoreError", 1, ["status 403", "refuses now"]),
    "reset": ("StoreError", 3, ["reset by peer", "2 tries"]),
    "stall": ("StoreError", 0, ["nothing came for 5 s", "2 tries"]),
    "landing": ("InternalError", 1, ["no room on this device"]),
    "changed": ("PinError", None, ["changed while it was read"]),  # the last: the object stays another
}
MENDED = ["burst", "cut", "resets", "good"]


def _whole() -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.randint(256, (2_000_000,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
        for key, (dtype, shape) in TENSORS.items()
    }


def _suffer(uri: str, endpoints: Sequence[str]) -> dict[str, Any]:
    """Each load's error on this rank, or its report; after each, the group must work as before."""
    rank = dist.get_rank()
    os.environ["AWS_ENDPOINT_URL"] = endpoints[rank]
    mesh = init_device_mesh("cpu", (2, 2))
    expected = {key: shard(tensor, mesh, [Replicate(), Shard(1)]) for key, tensor in _whole().items()}
    told: dict[str, Any] = {}
    for name in [*MENDED, *FATAL]:
        target = {key: blank(tensor) for key, tensor in expected.items()}
        with pytest.MonkeyPatch.context() as patch:
            if name == "landing" and rank == 1:
                patch.setattr(Landings, "land", _landing_that_fails(Landings.land))
            giving = Giving(patch)
            try:
                options = {"config_kwargs": {"user_agent_extra": f"load/{name}"}}
                # What passes by may hit one range again.
                more = {"retries": 30} if name in MENDED else {"timeout": "5s"} if name == "stall" else {}
                told[name] = loader.load(target, uri, storage_options=options, **READ | more)
                assert differences(target, expected) == [], name
            except LoaderError as error:
                told[name] = (type(error).__name__, str(error), error.rank, giving.end())
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == RANKS
    return told


def _landing_that_fails(land: Callable[..., None]) -> Callable[..., None]:
    calls = itertools.count()

    def failing(self: Landings, *args: Any) -> None:
        if next(calls) == 5:
            raise RuntimeError("no room on this device")
        land(self, *args)

    return failing


@pytest.fixture(scope="module")
def suffered(s3, tmp_path_factory):
    """What every rank told of every load; the proxy's requests; how often it refused."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    _save(one, _whole())
    (other / FILE).write_bytes(b"another")
    uri = s3.put(one)
    with CountingProxy(s3.endpoint, listeners=RANKS) as proxy:
        trouble = Trouble(lambda: s3.put(other, uri))
        proxy.on_request(trouble)
        endpoints = [proxy.url_for(rank) for rank in range(RANKS)]
        try:
            outcomes = run_ranks(RANKS, _suffer, uri, endpoints, env=s3.environment, nodes=2, outcomes=True)
        finally:
            trouble.stop.set()
        for outcome in outcomes:
            assert outcome.report == "", outcome.output
        return [outcome.value for outcome in outcomes], list(proxy.requests), trouble.failed


def _save(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), directory / FILE)


@pytest.mark.parametrize("name", FATAL)
def test_one_ranks_failure_is_everyones_and_soon(suffered, name):
    kind, rank, says = FATAL[name]
    told: list[Told] = [values[name] for values in suffered[0]]
    assert {each[:3] for each in told} == {told[0][:3]}
    found, message, first, _ = told[0]
    assert found == kind
    assert rank in (first, None)
    assert all(words in message for words in says), message
    if found == "StoreError":
        assert re.search(rf"s3://loader/\w+: {FILE} bytes \d+-\d+: ", message)
    if found == "PinError":
        assert len(set(re.findall(r'"[0-9a-f]{32}"', message))) == 2, message
    assert took(ending for *_, ending in told) < SOON


@pytest.mark.parametrize("name", MENDED)
def test_what_passes_by_is_mended_and_counted(suffered, name):
    values, _, failed = suffered
    report = values[0][name]
    assert report == values[3][name]
    assert report.retries == failed[name]
    assert (report.retries > 0) == (name != "good")


def test_after_a_cut_only_the_rest_is_read(suffered):
    values, requests, _ = suffered
    served = {
        name: sum(r.body_bytes for r in requests if r.method == "GET" and r.path.endswith(FILE) and _name(r) == name)
        for name in ["cut", "good"]
    }
    assert values[0]["cut"].retries > RANKS
    assert served["cut"] == served["good"] == values[0]["cut"].fetched_bytes


# Ranks that are lost


def _config(directory: Path, uri: str, **sections: Any) -> str:
    path = directory / "cfg.yaml"
    rules = [{"match": "*", "shard": {"dp_shard": 1}}]  # columns: every rank needs something of every other
    sections = {"model": {"builder": None}, "placements": rules, **sections}
    YAML().dump({"source": {"uri": uri}, "mesh": {"dp_shard": -1}, "read": READ, "report": None, **sections}, path)
    return str(path)


def _lose_one(config: str, rank: int, how: int, mark: str) -> int:
    """Run the command; rank `rank` gets the signal `how` when it has read a few ranges."""
    from loader.init_from_hf import main

    if os.environ["RANK"] == str(rank):
        read, calls = Store.read, itertools.count()

        def fatal(self: Store, *args: Any) -> int:
            if next(calls) == 5:
                Path(mark).write_text(f"{time.time()} {os.getpid()}")
                os.kill(os.getpid(), how)
            return read(self, *args)

        Store.read = fatal  # type: ignore[method-assign]
    return main(["--config", config])


def _kill_later(mark: Path) -> None:
    """End a rank that was only stopped, when the others must have ended."""
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.05)
    time.sleep(10)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(mark.read_text().split()[1]), signal.SIGKILL)


LOST = {
    "killed": (2, signal.SIGKILL, {}),
    "silent": (1, signal.SIGSTOP, {}),
    "host of the store": (0, signal.SIGKILL, {"TORCHELASTIC_USE_AGENT_STORE": "False"}),
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_rank_ends_the_others(s3, tmp_path, name):
    rank, how, env = LOST[name]
    _save(tmp_path, _whole())
    config = _config(tmp_path, f"file://{tmp_path}", output={"checkpoint": str(tmp_path / "out")})
    mark = tmp_path / "mark"
    if env:
        env = {**env, "MASTER_PORT": str(free_ports(1)[0])}
    if how == signal.SIGSTOP:
        threading.Thread(target=_kill_later, args=(mark,), daemon=True).start()
    arguments = (config, rank, how, str(mark))
    outcomes = run_ranks(RANKS, _timed, *arguments, env=env, init=False, outcomes=True, patient=False)
    begun = float(mark.read_text().split()[0])
    for number, outcome in enumerate(outcomes):
        if number == rank:
            assert "SIGKILL" in outcome.report
            continue
        assert outcome.report == "died: exit code 1", outcome
        assert _ended(outcome) - begun < 10
        last = _last_words(outcome, number)
        assert "LostRankError" in last
        assert f"rank {rank}" in last or "the store that ranks talk through is gone" in last
    if rank != 0:
        assert not (tmp_path / "out").exists()


def _timed(*args: Any) -> int:
    """As `_lose_one`; the moment of the end stands last in the output."""
    end = os._exit

    def timed(code: int) -> None:
        print(f"\nended {time.time()}", flush=True)
        end(code)

    os._exit = timed  # type: ignore[assignment]
    return _lose_one(*args)


def _ended(outcome: Outcome) -> float:
    return float(outcome.output.rsplit("ended ", 1)[1])


def _last_words(outcome: Outcome, rank: int) -> str:
    """The last line of a rank, which is the error's and no other's."""
    last = outcome.output.rsplit("\nended ", 1)[0].rstrip().splitlines()[-1]
    assert last.startswith(f"rank {rank}: "), outcome.output
    return last


def die(_config: Any, _mesh: Any) -> torch.nn.Module:
    """A builder in which rank DYING is killed."""
    if os.environ["RANK"] == os.environ["DYING"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.nn.Linear(1, 4, bias=False)


def test_with_two_agents_no_rank_stays_behind(tmp_path):
    """Each ends by itself and names a lost one, unless its agent is quicker: torchrun ends its ranks with SIGTERM when
    one of them, or the agent that hosts the rendezvous, has ended. To the others these are lost as well."""
    random_checkpoint(tmp_path, {"weight": (torch.float32, (4, 1))})
    (tmp_path / "config.json").write_text("{}")
    config = _config(tmp_path, str(tmp_path), model={"builder": "tests.test_failures:die"}, placements=[])
    finished = torchrun(2, ["-m", "loader.init_from_hf", "--config", config], hosts=TWO_HOSTS, env={"DYING": "3"})
    assert finished.returncode == 1
    assert re.search(r"rank\s*: 3 .*\n\s*exitcode\s*: -9 ", finished.stderr)
    for rank in range(3):
        told = re.search(rf"^rank {rank}: (.*)", finished.stderr, re.MULTILINE)
        by_agent = finished.stderr.count("closing signal SIGTERM")
        assert told or by_agent, finished.stderr
        if told:
            assert "LostRankError" in told[1]
            assert re.search("rank [23]", told[1]) or "the store that ranks talk through is gone" in told[1]
