"""The places for ranges: given in order, more of them while that pays, fewer where the server asks for that."""

from __future__ import annotations

import heapq
import itertools
import threading

import pytest

from loader.store import flow
from loader.store.flow import CALM, MOST, Flow, most_places


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(flow, "time", Clock())
    return flow.time


def read_all(places: Flow, clock: Clock, ranges: int, seconds) -> list[int]:
    """Simulate `ranges` that are all there from the start; one takes `seconds(how many are under way)`. The number of
    places after each."""
    ends: list[tuple[float, int]] = []
    history, number = [], itertools.count()
    places._waiting.append(threading.Event())  # there is always more to read,
    places._admit = lambda: None  # and nobody to be let in
    left = ranges
    while ends or left:
        while left and len(ends) < places.places:
            heapq.heappush(ends, (clock.now + seconds(len(ends) + 1), next(number)))
            left -= 1
        clock.now, _ = heapq.heappop(ends)
        places.arrived(1000)
        history.append(places.places)
    return history


@pytest.mark.parametrize("first", [1, 4, 16])
def test_more_at_once_where_each_waits_for_its_first_byte(clock, first):
    assert read_all(Flow(first, MOST), clock, 3000, lambda _: 0.05)[-1] == MOST


@pytest.mark.parametrize("first", [1, 4, 16])
def test_no_more_than_fill_the_link(clock, first):
    """A range is 50 ms of waiting and 5 ms of the link: 11 at once fill it."""
    history = read_all(Flow(first, MOST), clock, 3000, lambda busy: max(0.055, 0.005 * busy))
    assert 8 <= history[-1] <= 16
    assert max(history) <= 32, "and no more than twice as many are tried"


def test_there_may_be_as_many_as_a_budget_bears():
    assert [most_places(16, mib << 20) for mib in (8, 64, 512, 4096)] == [18, 36, MOST, MOST]
    assert most_places(100, 8 << 20) == 100, "who asks for more gets it"


def test_where_there_is_nothing_more_to_read_nothing_is_tried(clock):
    places = Flow(4, MOST)
    for _ in range(100):
        with places.place():
            clock.now += 0.05
        places.arrived(1000)
    assert places.places == 4


def test_more_than_there_is_room_for_are_given_back(clock):
    """Of a full link: four ranges at once fill it, and memory has room for seven."""
    places = Flow(4, MOST)
    history = [places.places for _ in range(40) if not _read_side_by_side(places, clock, 7)]
    assert max(history) == 8
    assert history[-1] == 4


def _read_side_by_side(places: Flow, clock: Clock, room: int) -> None:
    """As many as there are places and room for, each of which has its part of a link that four fill."""
    count = min(places.places, room)
    clock.now += 0.1 * count
    for _ in range(count):
        places.arrived(1000)


def test_what_headers_brought_is_no_measure_for_ranges(clock):
    places = Flow(4, MOST)
    for _ in range(10):
        clock.now += 0.01
        places.arrived(10)
    assert places.places == 8
    places.begin()
    assert places.places == 4
    read_all(places, clock, 100, lambda busy: 0.01 * busy)
    assert places.places == 4, "more were tried, and brought nothing"


def test_a_server_that_asks_for_fewer_has_half_and_one_more_in_a_while(clock):
    places = Flow(16, MOST)
    places.throttled()
    clock.now += 0.2
    places.throttled()
    assert places.places == 8, "what was asked at the same time is one question"
    clock.now += 2
    places.throttled()
    assert places.places == 4
    clock.now += CALM - 1
    places.arrived(1000)
    assert places.places == 4
    clock.now += 2
    places.arrived(1000)
    places.arrived(1000)
    assert places.places == 5
    clock.now += CALM + 1
    places.arrived(1000)
    assert places.places == 6
    for _ in range(9):
        clock.now += 2
        places.throttled()
    assert places.places == 1


def test_places_are_given_in_the_order_in_which_they_are_asked_for():
    places, order = Flow(1, MOST), []

    def read(number):
        with places.place():
            order.append(number)

    with places.place():
        threads = [threading.Thread(target=read, args=(number,)) for number in range(20)]
        for number, thread in enumerate(threads):
            thread.start()
            while len(places._waiting) <= number:
                pass
        late = threading.Thread(target=read, args=(20,))
    late.start()
    for thread in (*threads, late):
        thread.join()
    assert order[:19] == list(range(19))
    assert sorted(order) == list(range(21))
