"""The timeline of a load: every rank's, on one clock, in a file that viewers of Chrome's trace format open."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import loader
from loader import timeline
from loader.ground.recording import Recorder, Span
from loader.init_from_hf import main
from tests.checkpoints import random_checkpoint
from tests.misbehaving import Get, Misbehaving, first, from_then_on, status
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.ranks import run_ranks

RANKS = 3
AT_ONCE = 4
HELD = 1.0
"""Seconds that the first replies are held back."""
TENSORS = {f"layers.{number}.weight": (torch.bfloat16, (768, 512)) for number in range(4)}


def _main(config: str, kept: int | None = None) -> int:
    timeline.KEPT = kept or timeline.KEPT
    return main(["--config", config])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(directory, TENSORS)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def _config(directory: Path, uri: str, options: dict[str, Any], **sections: Any) -> str:
    path = directory / "config.yaml"
    sections = {
        "source": {"uri": uri, "storage_options": options},
        "model": {"builder": None},
        "mesh": {"dp_replicate": RANKS},
        "read": {"range_size": "64KiB", "memory_budget": "64MiB", "retries": 1, "concurrency": AT_ONCE},
        "report": str(directory / "report.json"),
        "trace": str(directory / "trace.json"),
        **sections,
    }
    path.write_text(json.dumps(sections))
    return str(path)


def _read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    trace = json.loads((directory / "trace.json").read_text())
    return trace, [each for each in trace["traceEvents"] if each["ph"] == "X"]


def _of(spans: list[dict[str, Any]], name: str, rank: int | None = None) -> list[dict[str, Any]]:
    return [each for each in spans if each["name"] == name and rank in {None, each["pid"]}]


@pytest.fixture(scope="module")
def loaded(s3, checkpoint, tmp_path_factory):
    """A load whose every rank is refused its first GET and waits for the next, saved as a checkpoint: its trace, the
    spans in it, its report."""
    directory, uri = tmp_path_factory.mktemp("loaded"), s3.put(checkpoint)
    with CountingProxy(s3.endpoint, listeners=RANKS) as proxy:
        proxy.on_request(Misbehaving({uri.rsplit("/", 1)[1]: first(2 * AT_ONCE, _refused_or_held)}))
        config = _config(directory, uri, {}, output={"checkpoint": str(directory / "out")})
        environment = [s3.at(proxy.url_for(rank)).environment for rank in range(RANKS)]
        assert run_ranks(RANKS, _at, config, environment, init=False) == [0] * RANKS
    assert s3.storage_options["secret"] not in (directory / "trace.json").read_text()
    return *_read(directory), json.loads((directory / "report.json").read_text())


def _refused_or_held(get: Get) -> Reply | None:
    return status(503)(get) if get.number == 0 else time.sleep(HELD)


def _at(config: str, environment: list[dict[str, str]]) -> int:
    os.environ |= environment[int(os.environ["RANK"])]
    return _main(config)


def test_every_rank_and_lane_is_named(loaded):
    trace, spans, report = loaded
    named = {each["pid"]: each["args"]["name"] for each in trace["traceEvents"] if each["name"] == "process_name"}
    assert named == {each["rank"]: f"rank {each['rank']} on {each['host']}" for each in report["ranks"]}
    lanes = [each for each in trace["traceEvents"] if each["name"] == "thread_name"]
    names = {(each["pid"], each["tid"]): each["args"]["name"] for each in lanes}
    assert len(names) == len(lanes)
    assert names.keys() == {(each["pid"], each["tid"]) for each in spans}
    for rank in range(RANKS):
        mine = {name for (pid, _), name in names.items() if pid == rank}
        assert {"phases", "rounds", "write", "read 0"} <= mine


def test_reads_are_there_range_by_range(loaded):
    _, spans, report = loaded
    for rank in report["ranks"]:
        gets = _of(spans, "GET", rank["rank"])
        looked = 0 if rank["rank"] else 1  # rank 0 reads the header too
        assert sum(each["args"]["gets"] for each in gets) == rank["gets"] - looked
        assert sorted(each["args"]["retries"] for each in gets)[-2:] == [0, 1]
        assert {each["args"]["file"] for each in gets} == {"model.safetensors"}
    starts = sorted((each["args"]["start"], each["args"]["bytes"]) for each in _of(spans, "GET"))
    assert all(start + size == after for (start, size), (after, _) in itertools.pairwise(starts))
    assert sum(size for _, size in starts) == report["needed_bytes"]


def test_a_range_that_waits_for_its_turn_is_not_in_flight(loaded):
    _, spans, _ = loaded
    for rank in range(RANKS):
        gets = _of(spans, "GET", rank)
        first_end = min(each["ts"] + each["dur"] for each in gets)
        begun_before = [each for each in gets if each["ts"] < first_end - HELD / 2 * 1e6]
        assert len(gets) > 12
        assert 0 < len(begun_before) <= AT_ONCE + 1  # the place of the one that is refused is free until it is retried


def test_exchange_writes_phases_and_the_sink_are_there(loaded):
    _, spans, report = loaded
    for rank in range(RANKS):
        sent = sum(
            each["args"]["bytes"] * each["args"]["to"] for each in _of(spans, "exchange", rank) if "to" in each["args"]
        )
        assert sent == report["ranks"][rank]["exchanged_bytes"] > 0
        assert sum(each["args"]["bytes"] for each in _of(spans, "write", rank)) == report["needed_bytes"]
        for phase in ("open", "catalog", "build", "plan", "rounds", "save"):
            (span,) = _of(spans, phase, rank)
            assert 0 < span["dur"] <= report["seconds"]["total"] * 1e6


def test_the_reports_seconds_are_the_spans(loaded):
    _, spans, report = loaded
    for rank in report["ranks"]:
        for name in ("read", "exchange"):
            assert rank["seconds"][name] == pytest.approx(
                sum(each["dur"] for each in _of(spans, name, rank["rank"])) / 1e6, abs=1e-3
            )
        written = (
            sum(
                each["dur"]
                for name in ("write", "upload", "save plan", "save")
                for each in _of(spans, name, rank["rank"])
            )
            / 1e6
        )
        assert rank["seconds"]["write"] == pytest.approx(written, abs=1e-3)


def test_all_is_on_one_clock(loaded):
    """No rank is done with a phase before every rank has begun it."""
    trace, spans, _ = loaded
    for phase in ("catalog", "plan", "rounds"):
        ends = [each["ts"] + each["dur"] for each in _of(spans, phase)]
        assert len(ends) >= RANKS
        assert max(each["ts"] for each in _of(spans, phase)) < min(ends)
    assert all(each["ts"] >= 0 for each in spans)
    assert [each["offset_seconds"] for each in trace["otherData"]["ranks"]] == [0] * RANKS


META = {"process_name": ("name", str), "process_sort_index": ("sort_index", int)}
META |= {"thread_name": ("name", str), "thread_sort_index": ("sort_index", int)}


def test_every_event_has_what_the_format_asks_for(loaded):
    """As the Trace Event Format has it, of which Perfetto reads what is used here."""
    trace, _, _ = loaded
    assert trace["displayTimeUnit"] in {"ms", "ns"}
    assert trace.keys() == {"traceEvents", "displayTimeUnit", "otherData"}
    for event in trace["traceEvents"]:
        assert event["ph"] in {"M", "X"}
        assert type(event["pid"]) is int
        if event["ph"] == "M":
            name, kind = META[event["name"]]
            assert type(event["args"][name]) is kind
            assert ("tid" in event) == event["name"].startswith("thread")
            continue
        assert event.keys() == {"ph", "pid", "tid", "name", "ts", "dur", "args"}
        assert (type(event["tid"]), type(event["name"])) == (int, str)
        assert min(event["ts"], event["dur"]) >= 0
        assert all(isinstance(value, int | str) for value in event["args"].values())


def test_no_two_spans_of_a_lane_overlap(loaded):
    """Perfetto, to which times are whole nanoseconds, leaves out a span that ends after the one in which it begins."""
    _, spans, _ = loaded
    by_lane = itertools.groupby(sorted(spans, key=_lane), key=_lane)
    for _, lane in by_lane:
        open_until: list[int] = []
        for begin, end in sorted(((_ns(each["ts"]), _ns(each["ts"] + each["dur"])) for each in lane), key=_outer_first):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def test_spans_that_touch_do_not_overlap_when_they_are_rounded():
    head = timeline.Head(0, "host", 0.0, timeline.Offset(0.0, 0.0), {})
    events = [timeline.Event(at * 1.6e-7, 1.6e-7, "read", "loader-rounds", {}) for at in range(100)]
    slices = [timeline._slice(head, event, 0.0) for event in events]
    assert all(_ns(one["ts"] + one["dur"]) <= _ns(after["ts"]) for one, after in itertools.pairwise(slices))


def _lane(event: dict[str, Any]) -> tuple[int, int]:
    return event["pid"], event["tid"]


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def _outer_first(times: tuple[int, int]) -> tuple[int, int]:
    return times[0], -times[1]


def test_of_more_spans_than_are_kept_the_longest_are_there_and_the_rest_is_told(checkpoint, tmp_path):
    config = _config(tmp_path, str(checkpoint), {})
    assert run_ranks(RANKS, _main, config, 12, init=False) == [0] * RANKS
    trace, spans = _read(tmp_path)
    for about in trace["otherData"]["ranks"]:
        assert len([each for each in spans if each["pid"] == about["rank"]]) == 12
        assert about["shorter_spans_left_out"]["GET"] > 3
        assert _of(spans, "rounds", about["rank"])


def test_a_load_that_fails_leaves_what_was_there_until_then(s3, checkpoint, tmp_path):
    uri = s3.put(checkpoint)
    with CountingProxy(s3.endpoint) as proxy:  # one listener: it counts what all ranks ask for as rank 0's
        late = 2 * RANKS * AT_ONCE  # which is asked for only when half of these have been read
        proxy.on_request(Misbehaving({uri.rsplit("/", 1)[1]: from_then_on(0, late, status(500))}))
        config = _config(tmp_path, uri, s3.at(proxy.url).storage_options)
        ends = run_ranks(RANKS, _main, config, init=False, outcomes=True)
    assert all("StoreError" in each.output for each in ends)
    trace, spans = _read(tmp_path)
    assert {each["pid"] for each in spans} == set(range(RANKS))
    assert {each["args"].get("error") for each in _of(spans, "GET")} >= {None, "StoreError"}
    assert s3.storage_options["secret"] not in json.dumps(trace)
    assert not (tmp_path / "report.json").exists()


def _load(uri: str, path: str) -> str:
    target = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in TENSORS.items()}
    try:
        loader.load(target, uri, trace=path, range_size="64KiB")
    except loader.errors.LoaderError as error:
        dist.barrier()  # the group is usable
        return type(error).__name__
    return "loaded"


def test_the_library_writes_one_too(checkpoint, tmp_path):
    assert run_ranks(RANKS, _load, str(checkpoint), str(tmp_path / "trace.json")) == ["loaded"] * RANKS
    _, spans = _read(tmp_path)
    assert {each["pid"] for each in _of(spans, "GET")} == set(range(RANKS))
    assert {each["pid"] for each in _of(spans, "rounds")} == set(range(RANKS))
    (tmp_path / "file").touch()
    told = run_ranks(RANKS, _load, str(checkpoint), str(tmp_path / "file" / "trace.json"))
    assert told == ["ConfigError"] * RANKS


def test_a_trace_that_cannot_be_written_ends_the_job(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    for path, says in {
        str(
            tmp_path / "file" / "trace.json"
        ): "ConfigError: trace: nothing can be written at",  # before anything is read
        "http://127.0.0.1:9/trace.json": "SinkError: http://127.0.0.1:9/trace.json: cannot write the trace",
    }.items():
        config = _config(tmp_path, str(checkpoint), {}, trace=path)
        for end in run_ranks(RANKS, _main, config, init=False, outcomes=True):
            assert says.split(": ", 1)[0] in end.output
            assert says.split(": ", 1)[1] in end.output


def test_without_the_key_there_is_none(checkpoint, tmp_path):
    config = _config(tmp_path, str(checkpoint), {}, trace=None)
    assert run_ranks(RANKS, _main, config, init=False) == [0] * RANKS
    assert {each.name for each in tmp_path.iterdir()} == {"config.yaml", "report.json"}


def twice(checkpoint: Mapping[str, torch.Tensor], _: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in checkpoint.items():
        yield name, tensor * 2


class LastRangeHeld:
    """A hook. Each rank's last range stays unanswered until the rank has noted WORK; the ones before it are answered
    once that one has been asked for, so all that is noted is noted meanwhile."""

    RANGES, WORK = 8, {"exchange", "convert", "write"}

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        self.asked: defaultdict[int, set[int]] = defaultdict(set)
        self.change = threading.Condition()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.range and request.method == "GET" and not request.range.startswith("bytes=0-"):  # that is the header
            start, mine = int(re.findall(r"\d+", request.range)[0]), self.asked[request.rank]
            with self.change:
                mine.add(start)
                self.change.notify_all()
                assert self.change.wait_for(lambda: len(mine) == self.RANGES, 60)
            notes = [self.notes / f"{request.rank} {name}" for name in self.WORK]
            while start == max(mine) and not all(note.exists() for note in notes):
                time.sleep(0.01)
        return forward(request)


def _noting(config: str, environment: list[dict[str, str]], notes: Path) -> int:
    leave = Recorder.leave

    def noted(self: Recorder, span: Span, *facts: Any) -> None:
        leave(self, span, *facts)
        (notes / f"{os.environ['RANK']} {span.name}").touch()

    Recorder.leave = noted
    return _at(config, environment)


def test_reading_exchange_conversion_and_writing_go_on_side_by_side(s3, checkpoint, tmp_path):
    uri, notes = s3.put(checkpoint), tmp_path / "notes"
    notes.mkdir()
    with CountingProxy(s3.endpoint, listeners=RANKS) as proxy:
        proxy.on_request(LastRangeHeld(notes))
        read = {"range_size": "128KiB", "concurrency": LastRangeHeld.RANGES}
        config = _config(tmp_path, uri, {}, read=read, convert=f"{__name__}:twice")
        environment = [s3.at(proxy.url_for(rank)).environment for rank in range(RANKS)]
        assert run_ranks(RANKS, _noting, config, environment, notes, init=False) == [0] * RANKS
    _, spans = _read(tmp_path)
    for rank in range(RANKS):
        last = max(_of(spans, "GET", rank), key=lambda each: each["args"]["start"])
        meanwhile = {
            each["name"]
            for each in spans
            if each["pid"] == rank and last["ts"] < each["ts"] and each["ts"] + each["dur"] < last["ts"] + last["dur"]
        }
        assert meanwhile >= LastRangeHeld.WORK
