import threading

import pytest

from loader.ground.recording import Recorder


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_spans_seconds_are_its_own_and_those_within_it_are_theirs():
    clock = Clock()
    recorder = Recorder(clock)
    for _ in range(2):
        with recorder.span("write"):
            clock.now += 3
            with recorder.span("convert"):
                clock.now += 4
                with recorder.span("write"):
                    clock.now += 1
            clock.now += 2
    assert recorder.seconds == {"write": 12, "convert": 8}


def test_threads_do_not_take_each_others_time():
    clock = Clock()
    recorder = Recorder(clock)

    def work():
        with recorder.span("inside"):
            clock.now += 5

    with recorder.span("outside"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert recorder.seconds == {"outside": 5, "inside": 5}


def test_no_event_is_kept_unless_it_is_asked_for():
    recorder = Recorder(Clock())
    with recorder.span("read"):
        pass
    assert (recorder.events(), recorder.kept_bytes, recorder.left_out) == ([], 0, {})


def test_the_longest_events_are_kept_in_the_order_they_began_and_the_rest_is_counted():
    clock = Clock()
    recorder = Recorder(clock)
    recorder.keep(3)
    for seconds in (1, 5, 2, 4, 2, 3):
        with recorder.span("even" if seconds % 2 == 0 else "odd", seconds=seconds) as span:
            clock.now += seconds
            span.facts["more"] = 1
    kept = recorder.events()
    assert [(each.seconds, each.begun) for each in kept] == [(5, 1), (4, 8), (3, 14)]
    assert recorder.left_out == {"odd": 1, "even": 2}
    assert recorder.seconds == {"odd": 9, "even": 8}
    assert kept[0][2:] == ("odd", "MainThread", {"seconds": 5, "more": 1})


def test_a_span_that_fails_says_so_and_is_counted():
    clock = Clock()
    recorder = Recorder(clock)
    recorder.keep(1)

    def fail():
        with recorder.span("read"):
            clock.now += 2
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert recorder.seconds == {"read": 2}
    assert recorder.events()[0].facts == {"error": "LookupError"}
