"""What bound the load: each resource is throttled in turn, by far, and the report names it and what would help.

The link between hosts, as the exchange's, is in `test_hosts.py`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import fsspec.asyn
import pytest
import torch
import torch.distributed as dist

import loader
from loader.exchange.gloo import GlooTransport, GlooWork
from loader.init_from_hf import main
from loader.stream import load as load_module
from loader.stream.buffers import Buffer
from loader.stream.pipeline import Pipeline
from tests import stages
from tests.checkpoints import random_checkpoint
from tests.misbehaving import Misbehaving, first, status
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.ranks import run_ranks

RANKS = 2
SIZE = 2 << 20
TENSORS = {f"layers.{number}.weight": (torch.float32, (256, SIZE // 1024)) for number in range(2)}
NEEDED = SIZE * len(TENSORS)
SLOW = 1 << 20
"""Bytes a second of whatever is throttled: NEEDED takes it 4 s."""


class Link:
    """Passes `SLOW` bytes a second: `until(size)` is when so much more has passed."""

    def __init__(self) -> None:
        self._free = 0.0
        self._lock = threading.Lock()

    def until(self, size: int) -> float:
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / SLOW
            return self._free

    def carry(self, chunks: Any) -> Iterator[bytes]:
        for chunk in chunks:
            for at in range(0, len(chunk), 1 << 14):
                piece = bytes(chunk[at : at + (1 << 14)])
                time.sleep(max(0.0, self.until(len(piece)) - time.monotonic()))
                yield piece


def through(link: Link, wanted: Callable[[Request], bool]) -> Callable[[Request, Forward], Reply]:
    """A hook: the replies to `wanted` requests, from the second range of a file on, come over `link`."""

    def hook(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        weights = request.method == "GET" and request.range and not request.range.startswith("bytes=0-")
        return Reply(reply.status, reply.headers, link.carry(reply.chunks)) if weights and wanted(request) else reply

    return hook


class SlowWork(GlooWork):
    """A message that came over a slow link."""

    arrival = 0.0

    def wait(self) -> None:
        super().wait()
        time.sleep(max(0.0, self.arrival - time.monotonic()))


def slow_exchange() -> None:
    """From now on messages to this rank come over a slow link."""
    link, receive = Link(), GlooTransport.receive

    def slowly(self: GlooTransport, number: int, view: torch.Tensor, sender: int) -> GlooWork:
        work = receive(self, number, view, sender)
        slow = SlowWork(work._works, work._peer, work._crc)
        slow.arrival = link.until(view.numel())
        return slow

    GlooTransport.receive = slowly  # type: ignore[method-assign]


def busy_event_loop() -> None:
    """From the first round on, fsspec's event loop computes for 0.1 s between any two looks at what has arrived."""

    def compute() -> None:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        loop.call_soon(compute)

    def run_beside(self: Pipeline) -> None:
        loop.call_soon_threadsafe(compute)
        run(self)

    loop, run = fsspec.asyn.get_loop(), Pipeline.run
    Pipeline.run = run_beside  # type: ignore[method-assign]


class Far(torch.Tensor):
    """Memory behind a slow link."""

    link = Link()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            time.sleep(max(0.0, cls.link.until(args[1].nbytes) - time.monotonic()))
        return super().__torch_function__(func, types, args, kwargs)


def laborious(checkpoint: Mapping[str, torch.Tensor], _: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in checkpoint.items():
        made = tensor.double()
        for _ in range(200):
            made = made**1.01
        yield name, made


def slow_device() -> None:
    """From now on the shards are on a device to which copies take their time, beside what else is done."""

    class Device(stages.Elsewhere):
        link, arrival = Link(), 0.0

        def upload(self, buffer: Buffer) -> None:
            super().upload(buffer)
            self.arrival = self.link.until(buffer.host.numel())

        def arrive(self) -> None:
            time.sleep(max(0.0, self.arrival - time.monotonic()))

    stages.use("elsewhere")
    load_module.stage_for = lambda _: Device()


THROTTLES = {"exchange": slow_exchange, "loop": busy_event_loop, "device": slow_device}


def _load(uri: str, options: Sequence[Mapping[str, Any]], throttle: str = "", **read: Any) -> tuple[str, str, dict]:
    if throttle in THROTTLES:
        THROTTLES[throttle]()
    kind = Far if throttle == "write" else torch.Tensor
    target = {key: torch.zeros(shape, dtype=dtype).as_subclass(kind) for key, (dtype, shape) in TENSORS.items()}
    convert = laborious if throttle == "convert" else None
    read = {"range_size": "64KiB", "memory_budget": "64MiB", **read}
    report = loader.load(target, uri, storage_options=options[dist.get_rank()], convert=convert, **read)
    return report.bound_by, report.advice or "", report.seconds.model_dump()


def load(uri: str, options: Sequence[Mapping[str, Any]], **how: Any) -> tuple[str, str, dict]:
    found = run_ranks(RANKS, _call, uri, options, how, nodes=RANKS)
    assert all(each == found[0] for each in found)
    return found[0]


def _call(uri: str, options: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> tuple[str, str, dict]:
    return _load(uri, options, **how)


@pytest.fixture(scope="module")
def uri(s3, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(directory, TENSORS)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return s3.put(directory)


@pytest.fixture
def bucket(s3):
    with CountingProxy(s3.endpoint, listeners=RANKS) as proxy:
        yield proxy


@pytest.fixture
def options(s3, bucket):
    return [s3.at(bucket.url_for(rank)).storage_options for rank in range(RANKS)]


def test_a_bucket_that_throttles(uri, bucket, options):
    bucket.on_request(Misbehaving({uri.rsplit("/", 1)[1]: first(4, status(503, Retry_After="2"))}))
    bound, advice, seconds = load(uri, options)
    assert (bound, advice.split(":")[0]) == ("bucket", "read.concurrency")
    assert "throttled 8 of" in advice
    assert seconds["read"] >= 2


def test_a_link_to_the_bucket_over_which_replicas_read_the_same_twice(uri, bucket, options):
    bucket.on_request(through(Link(), lambda _: True))
    bound, advice, seconds = load(uri, options, share="none")
    assert (bound, advice.split(":")[0]) == ("bucket", "read.share")
    assert "2.0 times" in advice
    assert seconds["read"] >= 1.8 * NEEDED / SLOW


def test_a_link_to_the_bucket_that_is_full(uri, bucket, options):
    bucket.on_request(through(Link(), lambda _: True))
    bound, advice, seconds = load(uri, options)
    assert bound == "bucket"
    assert advice.startswith("the link is full")
    assert seconds["exchange"] < 0.5 * seconds["read"]


def test_too_few_ranges_for_the_connections(uri, bucket, options):
    bucket.on_request(through(Link(), lambda _: True))
    bound, advice, _ = load(uri, options, range_size="1MiB")
    assert (bound, advice.split(":")[0]) == ("bucket", "read.range_size")


def test_one_ranks_link_to_the_bucket_for_which_the_other_waits(uri, bucket, options):
    bucket.on_request(through(Link(), lambda request: request.rank == 1))
    bound, _, seconds = load(uri, options)
    assert bound == "bucket"
    assert seconds["exchange"] > 0.8 * seconds["read"]  # the other one's


def test_the_exchange(uri, options):
    bound, advice, seconds = load(uri, options, throttle="exchange")
    assert (bound, advice.split(":")[0]) == ("exchange", "read.share")
    assert seconds["exchange"] >= 0.4 * NEEDED / SLOW


def test_the_conversion(uri, options):
    bound, advice, seconds = load(uri, options, throttle="convert")
    assert (bound, advice.split(":")[0]) == ("convert", "OMP_NUM_THREADS")
    assert seconds["convert"] > 4 * seconds["write"]


def test_the_memory_of_the_shards(uri, options):
    bound, advice, seconds = load(uri, options, throttle="write")
    assert (bound, advice.split(":")[0]) == ("write", "OMP_NUM_THREADS")
    assert seconds["write"] >= NEEDED / SLOW


def test_the_copies_to_a_device(uri, options):
    bound, advice, seconds = load(uri, options, throttle="device", share="none")
    assert bound == "write"
    assert advice.startswith("the host's link to the device is full")
    assert seconds["write"] >= 0.9 * NEEDED / SLOW


def test_the_event_loop_of_the_storage_client(uri, options):
    bound, advice, _ = load(uri, options, throttle="loop", backend="fsspec")
    assert (bound, advice.split(":")[0]) == ("bucket", "read.range_size")
    assert "event loop was busy" in advice
    assert "read.backend: direct" in advice


def test_the_catalog(uri, bucket, options):
    def slow_header(request: Request, forward: Forward) -> Reply:
        time.sleep(3 if (request.range or "").startswith("bytes=0-") else 0)
        return forward(request)

    bucket.on_request(slow_header)
    bound, advice, seconds = load(uri, options)
    assert (bound, advice.split(":")[0]) == ("catalog", "read.concurrency")
    assert seconds["catalog"] >= 3


def _main(config: str) -> int:
    return main(["--config", config])


def test_the_sink(s3, uri, bucket, options, tmp_path):
    link = Link()

    def slow_upload(request: Request, forward: Forward) -> Reply:
        time.sleep(max(0.0, link.until(len(request.body)) - time.monotonic()))
        return forward(request)

    bucket.on_request(slow_upload)
    config = tmp_path / "config.yaml"
    sections = {
        "source": {"uri": uri},
        "model": {"builder": None},
        "output": {"checkpoint": s3.prefix()},
        "report": str(tmp_path / "report.json"),
    }
    config.write_text(json.dumps(sections))
    assert run_ranks(RANKS, _main, str(config), init=False, env=s3.at(bucket.url).environment) == [0] * RANKS
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["bound_by"], report["advice"].split(":")[0]) == ("sink", "output.checkpoint")
    assert report["seconds"]["write"] >= NEEDED / SLOW
