import io
import logging
from itertools import pairwise

import pytest

from loader.ground.progress import Progress, Reached, line


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def nobody_has_set_up_logging(monkeypatch):
    monkeypatch.setattr(logging.getLogger("loader.progress"), "hasHandlers", lambda: False)  # pytest has


def alone(done: int, todo: int = 1_000) -> list[Reached]:
    return [Reached("node-0", done, todo)]


def test_a_log_gets_a_line_every_interval_and_one_at_the_end():
    clock, log = Clock(), io.StringIO()
    with Progress(16_000_000_000, "bar", log, interval=5, clock=clock) as progress:
        for second in range(12):
            clock.now = 100.0 + second
            progress.look(lambda done=second * 500_000_000: [Reached("a", done, 8_000_000_000)] * 2)
        clock.now = 117.0
    assert log.getvalue().splitlines() == [
        "loading 5.0 GB of 16.0 GB   31%  1.0 GB/s  eta 00:11  slowest rank 0 on a: 31%",
        "loading 10.0 GB of 16.0 GB   62%  1.0 GB/s  eta 00:06  slowest rank 0 on a: 62%",
        "loading 16.0 GB of 16.0 GB  100%  941.2 MB/s  eta 00:00",
    ]


def test_the_slowest_rank_is_the_one_with_most_of_its_own_part_before_it():
    clock, log = Clock(), io.StringIO()
    ranks = [Reached("a", 60, 100), Reached("a", 70, 200), Reached("b", 0, 0), Reached("b", 50, 100)]
    with Progress(400, "lines", log, interval=1, clock=clock) as progress:
        clock.now += 1
        progress.look(lambda: ranks)
        clock.now += 1
        progress.look(lambda: [Reached("a", 100, 100), Reached("b", 0, 0)])
        clock.now += 1
        progress.look(list)  # not every rank has told yet
    first, second, _ = log.getvalue().splitlines()
    assert first.endswith("slowest rank 1 on a: 35%")
    assert "slowest" not in second


def test_ranks_are_not_asked_more_often_than_they_tell():
    clock, asked = Clock(), []
    with Progress(10, "bar", io.StringIO(), clock=clock) as progress:
        for step in range(21):
            clock.now = 100 + step / 10
            progress.look(lambda: asked.append(clock.now) or alone(1))
    assert len(asked) == 5


def test_where_logging_is_set_up_lines_are_logged_with_their_numbers(caplog, monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.undo()
    with caplog.at_level(logging.INFO), Progress(100, "lines", stream, interval=1, clock=clock) as progress:
        clock.now += 2
        progress.look(lambda: [Reached("a", 60, 60), Reached("b", 10, 40)])
    assert stream.getvalue() == ""
    first, last = caplog.records
    assert first.levelno == logging.INFO
    assert first.fields == {
        "done_bytes": 70,
        "total_bytes": 100,
        "seconds": 2.0,
        "slowest_rank": 1,
        "slowest_done_bytes": 10,
        "slowest_total_bytes": 40,
    }
    assert last.fields == {"done_bytes": 100, "total_bytes": 100, "seconds": 2.0}


def test_a_load_that_failed_is_not_shown_as_ended():
    log = io.StringIO()

    def fail() -> None:
        with Progress(10, "bar", log, clock=Clock()) as progress:
            progress.look(lambda: alone(5))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_that_never_goes_back_and_names_the_slowest():
    clock, terminal = Clock(), Terminal()
    with Progress(1_000, "bar", terminal, clock=clock) as progress:
        for done in (300, 200, 900):
            clock.now += 1
            progress.look(lambda done=done: [Reached("a", 0, 100), Reached("b", done, 900)])
            progress._bar.refresh()  # else it shows no more than ten in a real second
    bars = terminal.getvalue().split("\r")
    assert "1.00k/1.00k" in bars[-1]
    assert "slowest" not in bars[-1]
    assert any("slowest rank 0: 0%" in bar for bar in bars)
    percents = [int(bar.split("%")[0].split()[-1]) for bar in bars if "%|" in bar]
    assert all(a <= b for a, b in pairwise(percents))
    assert percents[-1] == 100


def test_lines_are_lines_on_a_terminal_too():
    terminal = Terminal()
    with Progress(10, "lines", terminal, clock=Clock()):
        pass
    assert terminal.getvalue() == line(10, 10, 0.0) + "\n"


def test_nothing_to_load_and_no_time_are_shown_too():
    assert line(0, 0, 0.0) == "loading 0 Bytes of 0 Bytes  100%  0 Bytes/s  eta ?"
    assert line(0, 10, 3.0) == "loading 0 Bytes of 10 Bytes    0%  0 Bytes/s  eta ?"
