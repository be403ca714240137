"""Several ranks' Controls in one process, each in a thread of its own, on one of torch.distributed's stores."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from torch.distributed import HashStore, TCPStore

from loader.errors import CatalogError, InternalError, LoaderError, LostRankError, StoreError
from loader.exchange import control as control_module
from loader.exchange import watch
from loader.exchange.control import Control

pytestmark = pytest.mark.timeout(180)

_worlds = itertools.count()

QUICKLY = 4.0
"""Seconds without a beat in which a thread that lives gets its turn, also on a busy machine."""
SOON = 30.0
"""Seconds: not before long, and far below what would pass if nobody told."""


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """Beats are quick, and nobody passes for lost on a busy machine but where a test has that in mind."""
    monkeypatch.setattr(watch, "BEAT", 0.02)
    monkeypatch.setattr(watch, "LOST_AFTER", 90.0)
    monkeypatch.setattr(watch, "SILENT_AFTER", 90.0)


@pytest.fixture
def quickly_lost(monkeypatch):
    monkeypatch.setattr(watch, "LOST_AFTER", QUICKLY)
    monkeypatch.setattr(watch, "SILENT_AFTER", QUICKLY)


@pytest.fixture
def world(monkeypatch):
    """`world(size)`: a Control for every rank, not entered yet. With the port of a TCPStore, they meet there."""

    def make(size, port=None):
        monkeypatch.setattr(control_module, "_loads", {"": itertools.repeat(next(_worlds))})
        shared = HashStore()
        stores = [TCPStore("127.0.0.1", port, is_master=False) if port else shared for _ in range(size)]
        return [Control(store, rank, size) for rank, store in enumerate(stores)]

    return make


def together(controls, fn, *, within=120):
    """`fn(control)` of every rank at once, inside its context: what each returned or raised."""

    def run(control):
        try:
            with control:
                return fn(control)
        except Exception as error:  # noqa: BLE001 - the outcome
            return error

    with ThreadPoolExecutor(len(controls)) as pool:
        return [future.result(within) for future in [pool.submit(run, control) for control in controls]]


def stop_beating(control):
    control._closed.set()
    control._changed.set()


def told(outcomes):
    return {(type(error), str(error), error.rank) for error in outcomes}


def test_results_travel(world):
    def share(control):
        with control.phase("share"):
            everyone = control.broadcast("word", b"from 1" if control.rank == 1 else None, source=1)
            control.put("mine", bytes([control.rank]) * 3)
            return everyone, control.take("mine", [2, 0])

    assert together(world(3), share) == [(b"from 1", [b"\2\2\2", b"\0\0\0"])] * 3


def test_a_phase_of_one_name_is_a_meeting_each_time(world):
    seen, late = [], threading.Event()

    def twice(control):
        for _ in range(2):
            with control.phase("same"):
                if control.rank == 1:
                    late.wait(0.1)
                    seen.append("worked")
            seen.append("through")
            control.agree("between")

    together(world(2), twice)
    assert seen == ["worked", "through", "through"] * 2


def test_a_failed_phase_raises_one_error_on_all_with_its_cause_where_it_began(world):
    def work(control):
        with control.phase("work"):
            if control.rank == 2:
                raise CatalogError("wrong file") from OSError("below")

    outcomes = together(world(4), work)
    assert told(outcomes) == {(CatalogError, "wrong file", 2)}
    assert str(outcomes[2].__cause__) == "below"


def test_of_many_errors_at_once_all_ranks_tell_the_same(world):
    def work(control):
        with control.phase("work"):
            raise StoreError(f"of {control.rank}")

    assert len(told(together(world(6), work))) == 1


def test_what_no_phase_caught_reaches_the_others_too(world):
    def work(control):
        if control.rank == 1:
            raise ZeroDivisionError("a bug")
        control.agree("after")

    first, second, third = together(world(3), work)
    assert isinstance(second, ZeroDivisionError)
    assert told([first, third]) == {(InternalError, str(first), 1)}
    assert "a bug" in str(first)


def test_a_busy_rank_learns_of_an_error(world):
    def work(control):
        if control.rank == 0:
            raise control.fail(CatalogError("no"))
        begun = time.monotonic()
        while control.error is None:
            time.sleep(0.01)
        return time.monotonic() - begun

    _, waited = together(world(2), work)
    assert waited < SOON


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_end_with_the_same_round(world, seed):
    """Whoever fails, whenever, before its rounds, in them or after them: each rank runs exactly the same rounds."""
    rounds, size, failing = 40, 5, seed % 5
    chance = random.Random(seed)
    at = chance.choice([0, 1, chance.randrange(rounds), rounds])
    pauses = {rank: [chance.random() * 0.005 for _ in range(rounds + 1)] for rank in range(size)}

    def run(control):
        started = []
        for number in range(rounds + 1):
            if control.rank == failing and number == at:
                control.fail(StoreError("gone"))
            time.sleep(pauses[control.rank][number])
            if number == rounds or not control.may_start(number):
                break
            started.append(number)
        control.rounds = started
        control.agree("rounds")

    controls = world(size)
    assert told(together(controls, run)) == {(StoreError, "gone", failing)}
    assert len({tuple(control.rounds) for control in controls}) == 1
    assert len(controls[0].rounds) >= at


def test_a_rank_that_is_through_before_the_error_does_not_leave_the_others_waiting(world):
    def run(control):
        control.may_start(0)
        if control.rank == 0:
            control.agree("rounds")  # has no more to do, and leaves at once when it learns of the error
        if control.rank == 1:
            control.fail(StoreError("gone"))
        begun = time.monotonic()
        while control.error is None:
            time.sleep(0.01)
        control.may_start(1)
        control.waited = time.monotonic() - begun
        control.agree("rounds")

    controls = world(3)
    assert told(together(controls, run)) == {(StoreError, "gone", 1)}
    assert max(control.waited for control in controls[1:]) < SOON


@pytest.mark.parametrize("lost", [{0}, {3}, {1, 2}])
@pytest.mark.usefixtures("quickly_lost")
def test_a_rank_that_stops_beating_is_lost_to_all(world, lost):
    def run(control):
        control.agree("begin")
        if control.rank in lost:
            stop_beating(control)
            return
        control.may_start(0)
        while control.may_start(1):
            time.sleep(0.01)
        control.agree("never")

    outcomes = together(world(4), run)
    errors = [error for error in outcomes if error]
    assert len(errors) == 4 - len(lost)
    assert len(told(errors)) == 1
    assert isinstance(errors[0], LostRankError)
    assert errors[0].rank in lost
    assert f"rank {errors[0].rank} (host " in str(errors[0])


@pytest.mark.usefixtures("quickly_lost")
def test_a_rank_lost_while_all_end_for_another_error_keeps_nobody(world):
    def run(control):
        control.may_start(0)
        control.agree("begin")
        if control.rank == 1:
            stop_beating(control)  # mostly before it posts where it stops
            return
        if control.rank == 0:
            control.fail(StoreError("first"))
        for number in itertools.count(1):
            if not control.may_start(number):
                break
            time.sleep(0.01)
        control.agree("rounds")

    outcomes = together(world(4), run)
    assert told([error for error in outcomes if error]) == {(StoreError, "first", 0)}


@pytest.mark.usefixtures("quickly_lost")
def test_a_slow_starter_is_waited_for(world):
    def run(control):
        control.agree("begin")

    controls = world(3)
    enter = controls[2].open
    controls[2].open = lambda: (time.sleep(QUICKLY + 0.5), enter())
    assert together(controls, run) == [None] * 3


def test_a_rank_that_never_comes_is_named(world, monkeypatch):
    monkeypatch.setattr(watch, "UNSEEN_FOR", QUICKLY)
    outcomes = together(world(3)[:2], lambda control: control.agree("begin"))
    assert told(outcomes) == {(LostRankError, str(outcomes[0]), 2)}
    assert "rank 2 did not come to the load" in str(outcomes[0])


def test_a_fault_in_the_watch_itself_ends_the_job(world):
    def run(control):
        control.may_start(0)
        control.agree("begin")
        if control.rank == 1:
            control._read_beat = lambda _: 1 / 0
        while control.may_start(1):
            time.sleep(0.01)
        control.agree("rounds")

    outcomes = together(world(3), run)
    assert told(outcomes) == {(InternalError, str(outcomes[0]), 1)}
    assert "ZeroDivisionError" in str(outcomes[0])


HOST = """
import sys, time
from torch.distributed import HashStore, TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("quickly_lost")
@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_store_that_is_silent_or_gone_ends_every_rank(world, end):
    """A host that loses its power sends no word: what is stopped is as silent."""
    host = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        controls = world(4, port=int(host.stdout.readline()))
        all_here = threading.Barrier(4)

        def run(control):
            control.may_start(0)
            control.agree("begin")
            all_here.wait(60)
            if control.rank == 0:
                os.kill(host.pid, end)
                while psutil.Process(host.pid).status() not in {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}:
                    time.sleep(0.001)
            all_here.wait(60)
            begun = time.monotonic()
            try:
                if control.rank == 1:
                    while control.may_start(1):
                        time.sleep(0.01)
                if control.rank == 2:
                    raise control.fail(CatalogError("what it cannot tell any more"))
                control.agree("end")
            finally:
                control.waited = time.monotonic() - begun

        outcomes = together(controls, run)
        assert {type(error) for error in outcomes} == {LostRankError}
        assert all("the store that ranks talk through is gone" in str(error) for error in outcomes)
        assert max(control.waited for control in controls) < SOON
    finally:
        host.kill()
        host.communicate()


def test_ranks_leave_together_but_do_not_wait_for_ever(world):
    leaving, through = threading.Event(), threading.Event()

    def two(control):
        if control.rank == 1:
            leaving.wait(60)
            time.sleep(0.3)
            assert not through.is_set()
        else:
            leaving.set()
        control.leave(60)
        through.set()

    begun = time.monotonic()
    assert together(world(2), two) == [None, None]
    together(world(3)[:1], lambda control: control.leave(0.2))
    assert time.monotonic() - begun < SOON


def test_nothing_is_left_behind(world):
    before = set(threading.enumerate())
    for _ in range(30):
        together(world(2), lambda control: (control.put("much", b"x" * 1000), control.agree("end")))
    deadline = time.monotonic() + SOON
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == set()


def test_who_comes_after_the_end_does_not_wait(world):
    """A reader that a failed load left behind, say, in a reply that went on."""
    (control,) = world(1)
    with pytest.raises(StoreError), control:
        raise StoreError("first")
    assert control.fail(StoreError("late")).message == "first"


def test_a_process_alone_needs_no_store(monkeypatch):
    monkeypatch.setattr(watch, "SETTLE", 90.0)
    with Control(None, 0, 1) as control:
        with control.phase("one"):
            assert control.broadcast("word", b"x") == b"x"
        assert control.may_start(0)
        assert [each.done for each in control.progress()] in ([], [0])
    begun = time.monotonic()
    with pytest.raises(LoaderError), Control(None, 0, 1) as control, control.phase("one"):
        raise CatalogError("wrong")
    assert time.monotonic() - begun < SOON
