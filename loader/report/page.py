"""A report as one page that needs nothing beside it: bars for every rank, what bound the load, and its timeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import humanize
from jinja2 import Environment, PackageLoader, StrictUndefined

from loader.report import Report
from loader.report.bound import spent
from loader.report.lanes import HEIGHT, WIDTH, timeline
from loader.report.rank import RankReport

ALONE = 64
ROWS = 32
"""Of more ranks than `ALONE`, neighbours share one of so many rows."""
WORST = 10
"""Ranks that are named besides, where rows are shared."""
PHASES = ("catalog", "plan", "read", "exchange", "convert", "write")


class Bar(NamedTuple):
    """A number of a row: percent of the widest, of its mean and its most; as text, and in full."""

    mean: float
    most: float
    text: str
    tip: str


class Row(NamedTuple):
    """One rank, or several in sequence."""

    name: str
    host: str
    fetched: Bar
    exchanged: Bar
    memory: Bar
    seconds: list[tuple[str, float, str]]
    """By phase: percent, and in full."""
    latest: float
    """Percent of the rank that took most seconds."""
    total: str


def page(report: Report, trace: Mapping[str, Any] | None = None) -> str:
    """HTML. `trace` is a parsed trace.json of the same load. Raises KeyError or TypeError where it is none."""
    pages = Environment(
        loader=PackageLoader("loader.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    times = spent(report.ranks)
    return pages.get_template("page.html").render(
        report=report,
        title=f"{'to load' if report.predicted else 'loaded'} {report.source.uri}",
        mesh=" x ".join(f"{name} {size}" for name, size in report.mesh.items()),
        facts=_facts(report),
        bound=times[report.bound_by] or report.seconds.write,  # a sink's seconds are among write's
        rows=_rows(report.ranks, report.memory.budget_bytes),
        worst=_worst(report.ranks) if len(report.ranks) > ALONE else [],
        phases=PHASES,
        timeline=timeline(trace) if trace is not None else None,
        width=WIDTH,
        height=HEIGHT,
        size=_size,
    )


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """What stands first: a number, its name, and what more there is to it."""
    peak, budget = report.memory.peak_over_shards_bytes, _size(report.memory.budget_bytes, binary=True)
    ratio = "-" if report.egress_ratio is None else f"{report.egress_ratio:.3f}"
    return [
        (f"{report.seconds.total:.1f} s", "in all", f"{report.tensors:,} tensors"),
        (_size(report.fetched_bytes), "from the bucket", f"{report.gets:,} GETs, {report.retries:,} retries"),
        (ratio, "egress ratio", f"{_size(report.needed_bytes)} needed"),
        (_size(report.exchanged_bytes), "between ranks", f"{report.world_size:,} ranks"),
        ("-" if peak is None else _size(peak, binary=True), "peak over the shards", f"of {budget}"),
    ]


def _rows(ranks: Sequence[RankReport], budget: int) -> list[Row]:
    size = -(-len(ranks) // ROWS) if len(ranks) > ALONE else 1
    groups = [ranks[at : at + size] for at in range(0, len(ranks), size)]
    most = {
        "fetched": max(each.fetched_bytes for each in ranks),
        "exchanged": max(each.exchanged_bytes for each in ranks),
        "seconds": max(map(_busy, ranks)),
    }
    return [
        Row(
            f"{group[0].rank}" if len(group) == 1 else f"{group[0].rank}-{group[-1].rank}",
            _hosts(group),
            _bar(group, lambda each: each.fetched_bytes, most["fetched"]),
            _bar(group, lambda each: each.exchanged_bytes, most["exchanged"]),
            _bar(group, lambda each: each.peak_over_shards_bytes or 0, budget, binary=True),
            [_phase(group, phase, most["seconds"]) for phase in PHASES],
            _percent(max(map(_busy, group)), most["seconds"]),
            f"{max(each.seconds.total for each in group):.1f} s",
        )
        for group in groups
    ]


def _worst(ranks: Sequence[RankReport]) -> list[tuple[RankReport, str]]:
    """The ranks with the longest phase of all, and which it is."""
    longest = {each.rank: max(PHASES, key=lambda phase: _of(each, phase)) for each in ranks}
    chosen = sorted(ranks, key=lambda each: _of(each, longest[each.rank]), reverse=True)[:WORST]
    return [(each, f"{longest[each.rank]} {_of(each, longest[each.rank]):.2f} s") for each in chosen]


def _hosts(group: Sequence[RankReport]) -> str:
    hosts = list(dict.fromkeys(each.host for each in group))
    return hosts[0] if len(hosts) == 1 else f"{hosts[0]} and {len(hosts) - 1} more"


def _bar(group: Sequence[RankReport], of: Callable[[RankReport], int], widest: float, *, binary: bool = False) -> Bar:
    values = [of(each) for each in group]
    mean, most = sum(values) / len(values), max(values)
    text = _size(round(mean), binary=binary)
    tip = text
    if len(values) > 1:
        tip = f"least {_size(min(values), binary=binary)}, mean {text}, most {_size(most, binary=binary)}"
    return Bar(_percent(mean, widest), _percent(most, widest), text, tip)


def _phase(group: Sequence[RankReport], phase: str, widest: float) -> tuple[str, float, str]:
    values = [_of(each, phase) for each in group]
    mean = sum(values) / len(values)
    more = f", least {min(values):.2f}, most {max(values):.2f}" if len(values) > 1 else ""
    return phase, _percent(mean, widest), f"{phase} {mean:.2f} s{more}"


def _of(rank: RankReport, phase: str) -> float:
    return float(getattr(rank.seconds, phase))


def _busy(rank: RankReport) -> float:
    """Its phases, one after another."""
    return sum(_of(rank, phase) for phase in PHASES)


def _percent(value: float, widest: float) -> float:
    return round(min(100.0, 100 * value / widest), 2) if widest else 0.0


def _size(count: int, *, binary: bool = False) -> str:
    return humanize.naturalsize(count, binary=binary)
