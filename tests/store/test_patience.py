import math

from loader.store.patience import KNOWN, LATELY, LEAST, SHARE, SLOW, TIMES, Patience

SIZE = 1000


def known(*took: float) -> Patience:
    patience = Patience()
    for seconds in took:
        patience.took(seconds, SIZE)
    return patience


def test_nothing_is_late_while_nothing_is_known():
    patience = known(*[0.1] * (KNOWN - 1))
    patience.expect(1 << 30)
    assert patience.seconds() == math.inf
    assert not patience.late(1e6, 1)
    patience.took(0.1, SIZE)
    assert patience.late(LEAST + 0.1, 1), "one that waits since before is judged by what is known now"


def test_late_is_some_times_what_a_slow_read_took():
    slow = [0.5] * 10
    assert known(*[0.1] * 50, *slow).seconds() == TIMES * 0.5
    assert known(*[0.3] * 60, 25.0).seconds() == TIMES * 0.3, "one that stalled is not what reads take"
    assert known(*[0.001] * 60).seconds() == LEAST


def test_a_bucket_that_slows_down_is_followed():
    patience = known(*[0.2] * LATELY)
    silent = patience.seconds() + 0.1
    assert not patience.late(patience.seconds(), 0)
    for _ in range(LATELY - int(SLOW * LATELY)):
        assert patience.late(silent, 0)
    assert patience.seconds() == TIMES * silent


def test_no_more_than_its_share_is_asked_for_twice():
    patience = known(*[0.1] * 100)
    budget = int(SHARE * 100 * SIZE)
    assert not patience.late(9, budget + 1)
    assert patience.late(9, budget)
    assert not patience.late(9, 1)
    patience.took(0.1, SIZE)
    assert patience.late(9, int(SHARE * SIZE))
    assert not patience.late(9, 1)
    patience.expect(200 * SIZE)
    assert patience.late(9, int(SHARE * 99 * SIZE)), "what is still to be read counts as well"
    assert not patience.late(9, 1)
