"""A trace's spans as areas over time, for drawing: how busy each rank was with what, and what the bucket gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 400
"""Points of an area; a point stands for the mean of its part of the time."""
WIDTH, HEIGHT = 1000, 18
"""Of a lane, in the units of the drawing."""
SHOWN = 16
"""Ranks that are drawn one by one: of more, rank 0, the last to end, and others evenly between."""

STRIPS = {"read": "GET", "exchange": "exchange", "convert": "convert", "write": "write"}
"""What is drawn of a rank, and the spans that it is of."""

Span = Mapping[str, Any]
Floats = NDArray[np.float64]


class Phase(NamedTuple):
    """A step of a rank, in the units of the drawing; `tip` tells it."""

    name: str
    x: float
    width: float
    tip: str


class Lane(NamedTuple):
    """One rank: its phases, and by strip an SVG path and its tip."""

    title: str
    phases: list[Phase]
    strips: list[tuple[str, str, str]]


class Timeline(NamedTuple):
    """What is drawn. `ticks` are (x, text) of the time axis; `bucket` is a path, `rate` its highest point in bytes/s.
    `ranks` is of how many the trace tells, `left_out` how many shorter spans it does not have."""

    lanes: list[Lane]
    ticks: list[tuple[float, str]]
    bucket: str
    rate: float
    ranks: int
    left_out: int


def timeline(trace: Mapping[str, Any]) -> Timeline | None:
    """What to draw of a trace that `loader.timeline` wrote; None where it has no spans. Raises KeyError, TypeError."""
    spans: dict[int, list[Span]] = {}
    titles: dict[int, str] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            spans.setdefault(event["pid"], []).append(event)
        elif event["name"] == "process_name":
            titles[event["pid"]] = event["args"]["name"]
    if not spans:
        return None
    ends = {rank: max(each["ts"] + each["dur"] for each in mine) for rank, mine in spans.items()}
    edges = np.linspace(0, max(*ends.values(), 1), BINS + 1)
    gets = {rank: [each for each in mine if each["name"] == "GET"] for rank, mine in spans.items()}
    rate: Floats = np.sum([_area(mine, edges, _rate) for mine in gets.values()], axis=0)
    highest = float(np.max(rate))
    return Timeline(
        [_lane(titles[rank], spans[rank], edges) for rank in _chosen(ends)],
        _ticks(edges[-1]),
        _path(rate / highest, 3 * HEIGHT) if highest else "",
        highest,
        len(spans),
        sum(sum(each["shorter_spans_left_out"].values()) for each in trace["otherData"]["ranks"]),
    )


def _chosen(ends: Mapping[int, float]) -> list[int]:
    """16 of 4,096: rank 0, the last to end, and those between by their number."""
    ranks = sorted(ends)
    if len(ranks) <= SHOWN:
        return ranks
    between = (ranks[at * (len(ranks) - 1) // (SHOWN - 2)] for at in range(SHOWN - 1))
    return sorted({max(ends, key=ends.__getitem__), *between})


def _lane(title: str, spans: Sequence[Span], edges: Floats) -> Lane:
    scale = WIDTH / edges[-1]
    phases = [
        Phase(each["name"], each["ts"] * scale, each["dur"] * scale, f"{each['name']}: {each['dur'] / 1e6:.2f} s")
        for each in spans
        if each["tid"] == 0 and each["dur"] * scale >= 0.5
    ]
    strips = []
    for strip, name in STRIPS.items():
        mine = [each for each in spans if each["name"] == name]
        if not mine:
            continue
        area = _area(mine, edges, lambda _: 1.0)
        most = float(np.max(area))
        seconds = sum(each["dur"] for each in mine) / 1e6
        what = f"{len(mine):,} GETs, at most {most:.0f} in flight" if strip == "read" else f"{seconds:.2f} s"
        strips.append((strip, _path(area / max(most, 1.0), HEIGHT), f"{strip}: {what}"))
    return Lane(title, phases, strips)


def _rate(span: Span) -> float:
    """A GET's bytes, per microsecond of it, in bytes/s."""
    return float(span["args"]["bytes"] / max(span["dur"], 1.0) * 1e6)


def _area(spans: Sequence[Span], edges: Floats, weight: Callable[[Span], float]) -> Floats:
    """By bin, the mean over its time of the weights of the spans that are under way."""
    if not spans:
        return np.zeros(len(edges) - 1)
    begun = np.array([each["ts"] for each in spans], float)
    took = np.maximum([float(each["dur"]) for each in spans], 1.0)
    weights = np.array([weight(each) for each in spans], float)
    until = np.array([float((np.clip(edge - begun, 0, took) * weights).sum()) for edge in edges])
    area: Floats = np.diff(until) / np.diff(edges)
    return area


def _path(heights: Floats, top: float) -> str:
    """An SVG path of an area, of heights from 0 to 1, `top` high, from where it rises to where it has fallen."""
    above = np.flatnonzero(heights)
    if not len(above):
        return ""
    step = WIDTH / len(heights)
    first, last = int(above[0]), int(above[-1])
    ys = (top * (1 - heights[first : last + 1].clip(0, 1))).round(1).tolist()
    points = [f"V{y:g}H{(first + at + 1) * step:g}" for at, y in enumerate(ys)]
    return f"M{first * step:g},{top:g}{''.join(points)}V{top:g}Z"


def _ticks(microseconds: float) -> list[tuple[float, str]]:
    """Between 4 and 10 of a round number of seconds."""
    seconds = microseconds / 1e6
    step = 10.0 ** np.floor(np.log10(seconds))
    step *= next(part for part in (0.1, 0.2, 0.5, 1.0) if seconds / (step * part) <= 10)
    return [(at * step / seconds * WIDTH, f"{at * step:g} s") for at in range(int(seconds / step) + 1)]
