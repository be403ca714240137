import time

import pytest

from loader.exchange.clocks import Offset, clock_offset
from loader.exchange.control import Control
from tests.ranks import run_ranks

AHEAD = [0.0, 0.0, 1000.0, 1000.0, -50.0]
"""Seconds by rank; the ranks of one kernel have one clock."""


def offset(ahead):
    with Control.of_group() as control, control.phase("clocks"):
        mine = ahead[control.rank]
        return clock_offset(control, lambda: time.monotonic() + mine, lambda: f"kernel {mine}")


def real():
    with Control.of_group() as control, control.phase("clocks"):
        return clock_offset(control)


def test_clocks_of_several_kernels_are_compared_through_rank_0():
    found = run_ranks(5, offset, AHEAD)
    assert found[:2] == [Offset(0, 0)] * 2
    assert found[2] == found[3]
    for each, ahead in zip(found, AHEAD, strict=True):
        assert each.seconds == pytest.approx(ahead, abs=each.error + 1e-6)
        assert each.error < 5


def test_ranks_of_one_kernel_have_one_clock():
    assert run_ranks(2, real) == [Offset(0, 0)] * 2
