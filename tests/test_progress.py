import io
from itertools import pairwise

import pytest

from loader.progress import Progress, line


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_interval_and_one_at_the_end():
    clock, log = Clock(), io.StringIO()
    with Progress(16_000_000_000, log, interval=5, clock=clock) as progress:
        for second in range(12):
            clock.now = 100.0 + second
            progress.update_to(second * 1_000_000_000)
        clock.now = 116.0
        progress.update_to(16_000_000_000)
        clock.now = 117.0
    assert log.getvalue().splitlines() == [
        "loading 5.0 GB of 16.0 GB   31%  1.0 GB/s  eta 00:11",
        "loading 10.0 GB of 16.0 GB   62%  1.0 GB/s  eta 00:06",
        "loading 16.0 GB of 16.0 GB  100%  1.0 GB/s  eta 00:00",
        "loading 16.0 GB of 16.0 GB  100%  941.2 MB/s  eta 00:00",
    ]


def test_a_load_that_failed_is_not_shown_as_ended():
    log = io.StringIO()

    def fail() -> None:
        with Progress(10, log, clock=Clock()) as progress:
            progress.update_to(5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_that_never_goes_back():
    terminal = Terminal()
    with Progress(1_000, terminal, clock=Clock()) as progress:
        for done in (300, 200, 1_000):
            progress.update_to(done)
    bars = terminal.getvalue().split("\r")
    assert "1.00k/1.00k" in bars[-1]
    percents = [int(bar.split("%")[0].split()[-1]) for bar in bars if "%" in bar]
    assert all(a <= b for a, b in pairwise(percents))
    assert percents[-1] == 100


def test_nothing_to_load_and_no_time_are_shown_too():
    assert line(0, 0, 0.0) == "loading 0 Bytes of 0 Bytes  100%  0 Bytes/s  eta ?"
    assert line(0, 10, 3.0) == "loading 0 Bytes of 10 Bytes    0%  0 Bytes/s  eta ?"
