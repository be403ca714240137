"""The page of a report, opened in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from loader import timeline
from loader.exchange.clocks import Offset
from loader.ground.recording import Event
from loader.report import RankReport, Report, Seconds, Source, merge
from loader.report.__main__ import main
from loader.stream.planning import pack
from tests.browser import opened

pytestmark = pytest.mark.timeout(700)  # the first on a machine installs the browser

SLOW = 3
"""The rank that takes longest, of however many."""

MEASURE = """<script>
const seen = (what) => [...document.querySelectorAll(what)].map((each) => each.getBoundingClientRect());
document.body.dataset.seen = JSON.stringify({
  bars: Object.fromEntries(["catalog", "read", "write"].map(
    (phase) => [phase, seen(`#ranks .${phase}`).map((box) => box.width)])),
  memory: seen("#ranks .memory").map((box) => box.width),
  held: seen("#ranks .memory i").map((box) => box.width),
  areas: seen("#timeline path").map((box) => [box.width, box.height]),
  page: [document.documentElement.scrollWidth, window.innerWidth],
});
</script>"""


def report(ranks: int) -> Report:
    return merge(
        [
            RankReport(
                rank=rank,
                host=f"node-{rank // 8}",
                fetched_bytes=400 << 20,
                gets=50,
                exchanged_bytes=rank << 20,
                shard_bytes=1 << 30,
                peak_over_shards_bytes=256 << 20,
                get_seconds=90.0,
                seconds=Seconds(total=9.0, catalog=1.0, read=6.0 if rank == SLOW else 3.0, write=0.5),
            )
            for rank in range(ranks)
        ],
        source=Source(
            uri="s3://models/<llama>", files=2, checkpoint_bytes=99, pins={"a.safetensors": '"<pin>"', "b": "2"}
        ),
        mesh={"dp_shard": ranks},
        tensors=7,
        needed_bytes=ranks * 400 << 20,
        budget_bytes=512 << 20,
        fingerprint="f10123456789abcdef",
        reading=("world", 16),
    )


def write_trace(path: Path, ranks: int, events: int) -> None:
    """As a load writes it: a second of catalog, then `events` GETs, two at a time."""
    parts = []
    for rank in range(ranks):
        took = 6.0 if rank == SLOW else 3.0
        gets = [
            Event(
                11 + took * (at // 2) / events * 2,
                took / events * 2,
                "GET",
                f"loader-read_{at % 2}",
                {"bytes": 1 << 20},
            )
            for at in range(events)
        ]
        spans = [Event(10.0, 1.0, "catalog", "MainThread", {}), Event(11.0, took, "rounds", "MainThread", {}), *gets]
        head = timeline.Head(rank, f"node-{rank // 8}", 10.0, Offset(0.0, 0.0), {"write": 5})
        parts.append(pack((head, pack([tuple(each) for each in spans]))))
    timeline._write(str(path), parts)


class Seen(NamedTuple):
    document: str
    console: list[str]
    bars: dict[str, list[float]]
    memory: list[float]
    held: list[float]
    areas: list[tuple[float, float]]
    page: tuple[float, float]


def shown(directory: Path, ranks: int, *, events: int = 20, trace: bool = True) -> Seen:
    """Make the page as a user does, and open it."""
    report(ranks).write(str(directory / "report.json"))
    arguments = [str(directory / "report.json"), "--html", str(directory / "out.html")]
    if trace:
        write_trace(directory / "trace.json", ranks, events)
        arguments += ["--trace", str(directory / "trace.json")]
    assert main(arguments) == 0
    text = (directory / "out.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", text), "it needs something beside it"
    (directory / "out.html").write_text(text.replace("</body>", f"{MEASURE}</body>"))
    document, console = opened(directory / "out.html")
    found = re.search(r'data-seen="([^"]*)"', document)
    assert found, document[-2000:]
    return Seen(document, console, **json.loads(found[1].replace("&quot;", '"')))


def test_eight_ranks_have_a_row_and_a_lane_each(tmp_path):
    seen = shown(tmp_path, 8)
    assert seen.console == []
    assert {phase: len(bars) for phase, bars in seen.bars.items()} == {"catalog": 8, "read": 8, "write": 8}
    widest = seen.bars["read"][SLOW]
    assert widest > 100
    assert all(bar == pytest.approx(widest / 2, rel=0.02) for rank, bar in enumerate(seen.bars["read"]) if rank != SLOW)
    assert all(bar == pytest.approx(widest / 6, rel=0.02) for bar in seen.bars["catalog"])
    assert all(held == pytest.approx(track / 2, rel=0.02) for held, track in zip(seen.held, seen.memory, strict=True))
    assert len(seen.areas) == 1 + 8  # the bucket's, and each rank's reads
    widths = [width for width, _ in seen.areas[1:]]
    assert widths[SLOW] == pytest.approx(2 * widths[0], rel=0.02)
    assert all(height > 10 for _, height in seen.areas)
    assert seen.page[0] <= seen.page[1], "it is wider than the window"
    for text in ("Bound by bucket", "6.0 s of 9.0 s", "the link is full", "f10123456789abcdef", "&lt;pin&gt;"):
        assert text in seen.document


def test_4096_ranks_share_rows_and_the_slowest_are_named(tmp_path):
    seen = shown(tmp_path, 4096, events=4)
    assert seen.console == []
    assert len(seen.bars["read"]) == len(seen.held) == 32
    assert len(seen.areas) == 1 + 16
    worst = seen.document.partition('id="worst"')[2]
    assert re.findall(r"<tr><td>(\d+)</td>", worst)[0] == str(SLOW)
    assert "16 of 4,096 ranks" in seen.document
    assert "rank 3 on node-0" in seen.document  # the last to end
    assert "20,480 short spans" in seen.document
    assert seen.page[0] <= seen.page[1]
    assert len(seen.document) < 1_000_000


def test_without_a_trace_it_says_how_to_get_one(tmp_path):
    seen = shown(tmp_path, 1, trace=False)
    assert seen.console == []
    assert seen.areas == []
    assert "set trace: trace.json" in seen.document


def test_what_the_browser_minds_would_be_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><body><script>missing()</script>")
    _, console = opened(page)
    assert "missing is not defined" in " ".join(console)


@pytest.mark.parametrize(
    ("wrong", "text", "message"),
    [
        ("report.json", None, "cannot be read"),
        ("report.json", "{}", "is not one of this loader's"),
        ("trace.json", "[1", "is not one of this loader's"),
        ("trace.json", '{"traceEvents": [{"ph": "X"}]}', "is not one of this loader's"),
    ],
)
def test_what_is_no_report_or_trace_is_told(tmp_path, capsys, wrong, text, message):
    report(2).write(str(tmp_path / "report.json"))
    write_trace(tmp_path / "trace.json", 2, 4)
    (tmp_path / wrong).unlink()
    if text is not None:
        (tmp_path / wrong).write_text(text)
    paths = [str(tmp_path / name) for name in ("report.json", "trace.json", "out.html")]
    assert main([paths[0], "--trace", paths[1], "--html", paths[2]]) == 2
    told = capsys.readouterr().err
    assert wrong in told
    assert message in told
    assert not (tmp_path / "out.html").exists()
