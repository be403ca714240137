"""The multi-rank harness itself: what it promises to the tests that stand on it."""

import os
import signal
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankDiedError, RankFailure, run_ranks

NAMES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MINE"]


def _sum_of_ranks(offset):
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return total


def test_each_rank_returns_its_value():
    assert run_ranks(3, _sum_of_ranks, 10) == [torch.tensor([33])] * 3


def _environment():
    return [os.environ.get(name) for name in NAMES]


def test_the_environment_is_torchruns(monkeypatch):
    monkeypatch.setenv("MINE", "http://host/{rank}")
    environments = run_ranks(4, _environment, nodes=2, init=False)
    assert environments == [
        ["0", "0", "4", "2", "0", "http://host/0"],
        ["1", "1", "4", "2", "0", "http://host/1"],
        ["2", "0", "4", "2", "1", "http://host/2"],
        ["3", "1", "4", "2", "1", "http://host/3"],
    ]


def _initialise():
    dist.init_process_group("gloo")
    dist.barrier()  # else the first to be done is gone before the other has connected
    size = dist.get_world_size()
    dist.destroy_process_group()
    return size


def test_a_rank_may_make_its_own_group():
    assert run_ranks(2, _initialise, init=False) == [2, 2]


def _threads():
    return threading.active_count(), psutil.Process().parent().num_threads()


def test_the_fork_server_has_a_single_thread():
    """A second one would be missing in its children, with its locks held."""
    assert run_ranks(1, _threads, init=False) == [(1, 1)]


def _large(size):
    return torch.full((size,), 7, dtype=torch.uint8)


def test_a_large_value_comes_back():
    (value,) = run_ranks(1, _large, 50_000_000, init=False)
    assert value.sum() == 7 * 50_000_000


def _raise_on(rank):
    if dist.get_rank() == rank:
        raise KeyError("the cause")
    dist.barrier()


def test_a_raise_is_told_with_every_ranks_traceback():
    begin = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 1: Traceback.*_raise_on.*KeyError: 'the cause'") as failure:
        run_ranks(2, _raise_on, 1)
    assert isinstance(failure.value.outcomes[1].error, KeyError)
    assert failure.value.outcomes[0].error is not None
    assert time.monotonic() - begin < 50


def test_outcomes_are_returned_beside_each_other():
    first, second = run_ranks(2, _value_or_error, init=False, outcomes=True)
    assert (first.value, first.error, first.output) == ("well", None, "said\n")
    assert isinstance(second.error, SystemExit)
    assert second.error.code == 3


def _value_or_error():
    if os.environ["RANK"] == "1":
        raise SystemExit(3)
    print("said")
    return "well"


def _be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_told():
    (outcome,) = run_ranks(1, _be_killed, outcomes=True)
    assert isinstance(outcome.error, RankDiedError)
    assert "SIGKILL" in outcome.report


def _hang_in_gloo():
    if dist.get_rank() == 0:
        dist.recv(torch.empty(1), src=1)
    threading.Event().wait()


def test_a_hang_is_ended_with_stacks():
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, _hang_in_gloo, timeout=15)  # in which both come so far
    for outcome in failure.value.outcomes:
        assert "_hang_in_gloo" in outcome.output
        assert "did not end" in outcome.report


def _leave_a_thread():
    threading.Thread(target=threading.Event().wait).start()


def test_a_process_that_does_not_end_is_a_hang():
    (outcome,) = run_ranks(1, _leave_a_thread, timeout=15, outcomes=True)
    assert "though its function had returned" in outcome.report


class _UnpicklableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def _raise_unpicklable():
    raise _UnpicklableError(1, 2)


def test_an_error_that_does_not_pickle_is_told_all_the_same():
    (outcome,) = run_ranks(1, _raise_unpicklable, init=False, outcomes=True)
    assert str(outcome.error) == "_UnpicklableError: 1 and 2"
