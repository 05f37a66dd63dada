"""Another member acts for a home soon if only this home is slow, but not while all homes are slow."""

from __future__ import annotations

from contextlib import ExitStack

from protocol.home_times import CELL_S, COMING_FACTOR, FACTOR, FRESH_S, LEAST_S, NOTHING_S, OVERTAKEN_S, HomeTimes
from protocol.ids import BLOCK_SIZE, PeerId

ONE, TWO = PeerId("one"), PeerId("two")


def waiting(times: HomeTimes, *homes: PeerId) -> ExitStack:
    stack = ExitStack()
    for home in homes:
        stack.enter_context(times.waiting(home))
    return stack


def test_the_only_awaited_home_has_a_deadline_that_grows_with_the_cells_between() -> None:
    times = HomeTimes()
    with waiting(times, ONE, ONE):
        assert not times.too_long(ONE, 0.0, 0, LEAST_S)
        assert times.too_long(ONE, 0.0, 0, LEAST_S + 0.1)
        assert not times.too_long(ONE, 0.0, 2, LEAST_S + 2 * CELL_S)
        assert times.too_long(ONE, 0.0, 2, LEAST_S + 2 * CELL_S + 0.1)


def test_no_home_is_too_slow_while_no_home_delivers() -> None:
    times = HomeTimes()
    with waiting(times, ONE, TWO):
        assert not times.too_long(ONE, 0.0, 0, 1000.0)
        times.came(1000, 1.0, 2.0)  # a small block
        assert not times.too_long(ONE, 0.0, 0, 1000.0)
    assert times.too_long(ONE, 0.0, 0, 1000.0), "TWO has delivered its block, or is dead"


def test_a_home_that_others_overtake_has_less_time_if_only_they_get_bytes() -> None:
    times = HomeTimes()
    with waiting(times, ONE, TWO):
        times.came(BLOCK_SIZE, 1.0, 1.5)
        assert not times.too_long(ONE, 0.0, 0, OVERTAKEN_S), "nobody gets bytes: the uplink is cut"
        assert times.too_long(ONE, 0.0, 0, OVERTAKEN_S + 0.1)
        times.coming(TWO, NOTHING_S)
        assert not times.too_long(ONE, 0.0, 0, NOTHING_S)
        assert times.too_long(ONE, 0.0, 0, NOTHING_S + 0.1)
        assert not times.too_long(ONE, 0.0, 1, NOTHING_S + CELL_S)
        assert not times.too_long(ONE, 0.0, 0, NOTHING_S + FRESH_S + 0.1), "TWO gets nothing any more either"
        times.coming(ONE, NOTHING_S)
        assert not times.too_long(ONE, 0.0, 0, NOTHING_S + 0.1)
        times.coming(ONE, OVERTAKEN_S)
        assert times.too_long(ONE, 0.0, 0, OVERTAKEN_S + 0.1), "it only says so"
        assert not times.too_long(ONE, 2.0, 0, 1000.0), "it was asked later than the block that arrived"


def test_a_home_whose_bytes_come_on_has_more_time_on_a_slow_uplink() -> None:
    times = HomeTimes()
    with waiting(times, ONE, TWO):
        times.came(BLOCK_SIZE, 1.0, 11.0)
        for at in (FACTOR * 10.0, COMING_FACTOR * 10.0):
            times.coming(TWO, at)
        assert times.too_long(ONE, 0.0, 0, FACTOR * 10.0 + 0.1)
        times.coming(ONE, COMING_FACTOR * 10.0)
        assert not times.too_long(ONE, 0.0, 0, COMING_FACTOR * 10.0)
        assert times.too_long(ONE, 0.0, 0, COMING_FACTOR * 10.0 + 0.1), "it is far slower than the other"


def test_a_home_that_is_not_awaited_has_no_say() -> None:
    times = HomeTimes()
    with waiting(times, ONE):
        times.came(BLOCK_SIZE, 1.0, 1.5)
        times.coming(TWO, NOTHING_S)
        assert not times.too_long(ONE, 0.0, 0, NOTHING_S + 0.1)
