from loader.store.patience import KNOWN, LATELY, LEAST, SHARE, TIMES, Patience

TIMEOUT, SIZE = 30.0, 1000


def known(*took: float) -> Patience:
    patience = Patience(TIMEOUT)
    for seconds in took:
        patience.took(seconds, SIZE)
    return patience


def test_nothing_is_late_while_nothing_is_known():
    assert known(*[0.1] * (KNOWN - 1)).seconds(0) == TIMEOUT
    assert known(*[0.1] * KNOWN).seconds(0) < TIMEOUT


def test_late_is_some_times_what_a_slow_read_took():
    slow = [0.5] * 10
    assert known(*[0.1] * 50, *slow).seconds(0) == TIMES * 0.5
    assert known(*[0.2] * 60, 25.0).seconds(0) == TIMES * 0.2, "one that stalled is not what reads take"
    assert known(*[0.001] * 60).seconds(0) == LEAST
    assert known(*[20.0] * 60).seconds(0) == TIMEOUT


def test_a_bucket_that_slows_down_is_followed():
    patience = known(*[0.2] * LATELY)
    haste = patience.seconds(0)
    for _ in range(LATELY // 8):
        patience.late(haste, 0)
    assert patience.seconds(0) == TIMES * haste


def test_no_more_than_its_share_is_asked_for_twice():
    patience = known(*[0.1] * 100)
    budget = int(SHARE * 100 * SIZE)
    assert patience.seconds(budget) < TIMEOUT
    assert patience.seconds(budget + 1) == TIMEOUT
    patience.late(0.4, budget)
    assert patience.seconds(1) == TIMEOUT
    patience.took(0.1, SIZE)
    assert patience.seconds(int(SHARE * SIZE)) < TIMEOUT
