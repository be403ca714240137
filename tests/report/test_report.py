import json
import re
from pathlib import Path

import fsspec
import pytest

from loader.errors import SinkError
from loader.ground.uri import public_uri
from loader.report import RankReport, Report, Seconds, Source, merge
from loader.report.bound import bound_by, spent

SOURCE = Source(uri="s3://models/llama", files=2, checkpoint_bytes=2_000, pins={"a": '"etag-a"', "b": '"etag-b"'})


def rank(number: int, **changes) -> RankReport:
    fields = {
        "rank": number,
        "host": f"node-{number // 2}",
        "fetched_bytes": 500,
        "gets": 3,
        "retries": 1,
        "exchanged_bytes": 40,
        "shard_bytes": 400,
        "peak_over_shards_bytes": 1 << 20,
        "seconds": Seconds(total=10, read=6, write=2),
    }
    return RankReport(**(fields | changes))


def job(*ranks: RankReport, **changes) -> Report:
    fields = {
        "source": SOURCE,
        "mesh": {"dp_replicate": 2, "tp": 2},
        "tensors": 1_234,
        "needed_bytes": 1_900,
        "budget_bytes": 512 << 20,
    }
    return merge(ranks or [rank(n) for n in range(4)], **(fields | changes))


def test_the_json_has_the_contracts_names_and_no_others():
    seconds = ["total", "catalog", "plan", "read", "exchange", "convert", "write"]
    fields = json.loads(job().to_json())
    assert list(fields) == [
        "version", "source", "world_size", "mesh", "tensors", "needed_bytes", "fetched_bytes", "egress_ratio", "gets",
        "retries", "exchanged_bytes", "memory", "seconds", "bound_by", "fingerprint", "ranks",
    ]  # fmt: skip
    assert list(fields["source"]) == ["uri", "files", "checkpoint_bytes", "pins"]
    assert list(fields["memory"]) == ["budget_bytes", "peak_over_shards_bytes"]
    assert list(fields["seconds"]) == seconds
    assert list(fields["ranks"][0]) == [
        "rank", "host", "fetched_bytes", "gets", "exchanged_bytes", "shard_bytes", "peak_over_shards_bytes", "seconds",
    ]  # fmt: skip
    assert list(fields["ranks"][0]["seconds"]) == seconds
    assert fields["fingerprint"] is None


def test_merging_sums_counts_and_keeps_the_worst_time_and_peak():
    slow = rank(2, peak_over_shards_bytes=9 << 20, seconds=Seconds(total=9, exchange=3, write=5))
    report = job(slow, rank(0), rank(1))
    assert (report.world_size, report.fetched_bytes, report.gets, report.retries, report.exchanged_bytes) == (
        3,
        1500,
        9,
        3,
        120,
    )
    assert report.egress_ratio == 1500 / 1900
    assert report.memory.peak_over_shards_bytes == 9 << 20
    assert report.seconds == Seconds(total=10, read=6, exchange=3, write=5)
    assert [each.rank for each in report.ranks] == [0, 1, 2]


def test_what_was_not_measured_or_needed_is_null():
    report = job(rank(0, peak_over_shards_bytes=None), needed_bytes=0)
    assert report.memory.peak_over_shards_bytes is None
    assert report.egress_ratio is None
    assert "not measured" in report.table()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (Seconds(total=10, plan=1, read=6, write=2), "bucket"),
        (Seconds(total=10, exchange=4, read=3), "exchange"),
        (Seconds(total=10, convert=6), "convert"),
        (Seconds(total=10, write=6), "write"),
        (Seconds(total=10, write=6, sink=5), "sink"),
        (Seconds(total=10, read=5, convert=4, write=3), "convert"),
        (Seconds(total=10, catalog=6), "catalog"),
        (Seconds(total=10, plan=6), "plan"),
        (Seconds(total=10, read=4, plan=1), "start"),
        (Seconds(total=4, read=3, write=3), "bucket"),
        (Seconds(total=0), "bucket"),
    ],
)
def test_bound_by_is_what_took_most_of_the_time(seconds, expected):
    assert bound_by(spent([rank(0, seconds=seconds)])) == expected


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([{"read": 5}, {"exchange": 5}], {"bucket": 5, "exchange": 0}),
        ([{"convert": 5}, {"exchange": 5}], {"convert": 5, "exchange": 0}),
        ([{"read": 3, "exchange": 4}] * 2, {"bucket": 3, "exchange": 4}),
        ([{"read": 5, "exchange": 2}] * 2, {"bucket": 5, "exchange": 2}),
        ([{"read": 5}, {"read": 1, "exchange": 6}], {"bucket": 5, "exchange": 2}),
    ],
)
def test_who_waits_for_another_rank_waits_for_what_that_one_is_busy_with(ranks, expected):
    times = spent([rank(number, seconds=Seconds(total=10, **each)) for number, each in enumerate(ranks)])
    assert {name: times[name] for name in expected} == expected


def test_advice_is_in_the_json_and_the_table_where_there_is_any():
    seconds = Seconds(total=10, exchange=8)
    report = job(*(rank(n, seconds=seconds) for n in range(4)), reading=("world", 16))
    assert report.bound_by == "exchange"
    assert json.loads(report.to_json())["advice"] == report.advice
    assert report.table().splitlines()[-1] == f"advice    {report.advice}"
    for no in (Seconds(total=9), Seconds(total=1, exchange=0.9)):  # none to give, or nothing to gain
        assert "advice" not in json.loads(job(rank(0, seconds=no), reading=("world", 16)).to_json())


MANY = {"get_seconds": 540.0, "fetched_bytes": 27_000_000_000, "gets": 3000}
BUCKET = {"seconds": Seconds(total=10, read=9), "gets": 100, "fetched_bytes": 800_000_000, "get_seconds": 144.0}


@pytest.mark.parametrize(
    ("changes", "reading", "setting"),
    [
        ({"throttled": 6}, ("none", 16), "read.concurrency: the bucket throttled 24 of 400 GETs"),
        ({}, ("none", 16), "read.share: world reads each byte once; it was 2.0 times"),
        ({}, ("world", 16), "the link is full, at 5.6 MB/s over each of 16 connections"),
        (MANY, ("world", 16), "read.concurrency: 50.0 MB/s over each of 60 connections"),
        (
            MANY | {"seconds": Seconds(total=30, read=27)},
            ("world", 16),
            "the link is full, at 50.0 MB/s over each of 20",
        ),
        (
            MANY | {"seconds": Seconds(total=30, read=27), "gets": 90},
            ("world", 16),
            "read.concurrency: 50.0 MB/s over ",
        ),
        ({"get_seconds": 14.4}, ("world", 16), "read.memory_budget: 2 of 16 ranges were in flight"),
        ({"get_seconds": 14.4, "gets": 3}, ("world", 16), "read.range_size: 2 of 16 ranges were in flight"),
        ({"seconds": Seconds(total=9, exchange=8)}, ("world", 16), "read.share: node"),
        ({"seconds": Seconds(total=9, exchange=8)}, ("node", 16), "read.share: none"),
        ({"seconds": Seconds(total=9, exchange=8), "host": "node-0"}, ("world", 16), "read.share: none"),
        (
            {"seconds": Seconds(total=9, convert=8), "threads": 2},
            ("world", 16),
            "OMP_NUM_THREADS: the conversion ran on 2",
        ),
        (
            {"seconds": Seconds(total=9, write=8)},
            ("world", 16),
            "OMP_NUM_THREADS: the shards were written on 1 thread ",
        ),
        ({"seconds": Seconds(total=9, write=8, sink=7)}, ("world", 16), "output.checkpoint: "),
        ({"seconds": Seconds(total=9, catalog=8)}, ("world", 16), "read.concurrency: the files' headers"),
        ({"seconds": Seconds(total=9, plan=8)}, ("world", 16), "read.range_size: "),
    ],
)
def test_advice_names_the_setting_that_would_help(changes, reading, setting):
    report = job(*(rank(n, **(BUCKET | changes)) for n in range(4)), reading=reading, needed_bytes=1_600_000_000)
    assert (report.advice or "").startswith(setting)


def test_a_fingerprint_is_in_the_json_and_the_table():
    report = job(fingerprint="f10123456789abcdef")
    assert json.loads(report.to_json())["fingerprint"] == "f10123456789abcdef"
    assert report.table().splitlines()[-1] == "verified  fingerprint f10123456789abcdef"


def test_the_table_tells_it_in_five_lines():
    table = job(rank(0), rank(1), rank(2), rank(3, peak_over_shards_bytes=431 << 20), needed_bytes=2_000).table()
    assert table == (
        "loaded    1,234 tensors, 2.0 kB, s3://models/llama over dp_replicate 2 x tp 2 (4 ranks)\n"
        "bucket    12 GETs, 2.0 kB, egress ratio 1.000, 4 retries; 160 Bytes exchanged between ranks\n"
        "memory    peak over the shards 431.0 MiB (rank 3 on node-1), budget 512.0 MiB\n"
        "seconds   total 10.0, catalog 0.0, plan 0.0, read 6.0, exchange 0.0, convert 0.0, write 2.0\n"
        "bound by  bucket, 6.0 s of 10.0 s"
    )


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://models/a@b/c", "s3://models/a@b/c"),
        ("s3://KEY:SECRET@models/a", "s3://models/a"),
        ("https://me@host:80/a.safetensors?X-Amz-Signature=SECRET", "https://host:80/a.safetensors"),
        ("https://host?sig=SECRET@x", "https://host"),
        ("simplecache::s3://KEY:SECRET@models/a", "simplecache::s3://models/a"),
        ("/data/what?/a@b", "/data/what?/a@b"),
    ],
)
def test_a_uri_is_shown_without_what_may_be_secret(uri, shown):
    assert public_uri(uri) == shown
    source = SOURCE.model_copy(update={"uri": uri}).model_dump()
    report = job(source=Source(**source))
    assert report.source.uri == shown
    assert "SECRET" not in report.to_json() + report.table()


def test_a_local_report_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "out" / "report.json"
    for report in (job(), job(tensors=7)):
        report.write(str(path))
        assert Report.model_validate_json(path.read_text()).tensors == report.tensors
    assert [each.name for each in path.parent.iterdir()] == ["report.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_report_goes_to_any_fsspec_url(tmp_path: Path):
    job().write("memory://reports/report.json")
    with fsspec.open("memory://reports/report.json") as file:
        assert json.load(file)["world_size"] == 4


@pytest.mark.parametrize("path", ["{file}/report.json", "nosuch://me:SECRET@bucket/report.json"])
def test_a_report_that_cannot_be_written_says_where_and_why(tmp_path: Path, path: str):
    file = tmp_path / "file"
    file.touch()
    path = path.format(file=file)
    with pytest.raises(SinkError, match=re.escape(public_uri(path))) as caught:
        job().write(path)
    assert "SECRET" not in str(caught.value)
