"""When background reading may go on, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from node.pace import GIVE_WAY_S, Pace, Window
from protocol.errors import BadInputError

HOUR = 3600
MIB = 1 << 20


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


async def idle() -> None:
    await trio.lowlevel.checkpoint()


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 86399))
def test_a_window_is_open_from_its_start_to_its_stop(start: int, stop: int, second: int) -> None:
    text = "-".join(f"{minute // 60:02d}:{minute % 60:02d}" for minute in (start, stop))
    if start == stop:
        with pytest.raises(BadInputError):
            Window.parse(text)
        return
    window = Window.parse(text)
    wait = window.opens_in(second)
    assert window.opens_in((second + wait) % 86400) == 0
    assert (second + wait) % 86400 == start * 60 or wait == 0
    if start < stop:
        assert (wait == 0) == (start * 60 <= second < stop * 60)


@pytest.mark.parametrize("text", ["", "22-06", "24:00-06:00", "22:00-06:60", "22:00", "2:00-06:00", "22:00-06:00x"])
def test_other_texts_are_no_window(text: str) -> None:
    with pytest.raises(BadInputError, match="22:00-06:00"):
        Window.parse(text)


def test_a_rate_spreads_bytes_over_time() -> None:
    async def scenario() -> None:
        pace = Pace(2 * MIB, None, idle)
        began = trio.current_time()
        for _ in range(10):
            await pace.wait(MIB)
        assert trio.current_time() - began == pytest.approx(4.5)
        await trio.sleep(100)
        began = trio.current_time()
        for _ in range(3):
            await pace.wait(MIB)
        assert trio.current_time() - began == pytest.approx(1.0), "what was not used is not made up for"

    play(scenario)


def test_clients_go_first_but_not_for_ever() -> None:
    async def scenario() -> None:
        quiet = trio.Event()
        pace = Pace(0, None, quiet.wait)
        began = trio.current_time()
        await pace.wait(MIB)
        assert trio.current_time() - began == pytest.approx(GIVE_WAY_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pace.wait, MIB)
            await trio.testing.wait_all_tasks_blocked()
            assert pace.waits_for == "clients that read now"
            quiet.set()
        assert trio.current_time() - began == pytest.approx(GIVE_WAY_S)
        assert pace.waits_for == ""

    play(scenario)


def test_a_window_is_waited_for_by_the_clock_on_the_wall_which_may_be_set() -> None:
    async def scenario() -> None:
        wall = [20 * HOUR]
        began = trio.current_time()
        pace = Pace(0, Window.parse("22:00-06:00"), idle, lambda: int(wall[0] + trio.current_time() - began))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pace.wait, MIB)
            await trio.sleep(HOUR)
            assert pace.waits_for == "its hours of the day"
            wall[0] += HOUR
        assert trio.current_time() - began < HOUR + 60

    play(scenario)
