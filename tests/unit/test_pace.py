"""The pace of background reads, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

import pytest
import trio
import trio.testing

from node.config.quantities import Window
from node.images.prefetch import GIVE_WAY_S, Pace

HOUR = 3600
MIB = 1 << 20


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


async def idle() -> None:
    await trio.lowlevel.checkpoint()


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
        assert trio.current_time() - began == pytest.approx(1.0), "an unused rate is not saved up"

    play(scenario)


def test_clients_go_first_but_not_forever() -> None:
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


def test_hours_follow_the_wall_clock_which_may_be_set() -> None:
    async def scenario() -> None:
        wall = [datetime(2026, 3, 4, 20)]
        began = trio.current_time()

        def clock() -> datetime:
            return wall[0] + timedelta(seconds=trio.current_time() - began)

        pace = Pace(0, Window("22:00-06:00"), idle, clock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pace.wait, MIB)
            await trio.sleep(HOUR)
            assert pace.waits_for == "its hours of the day"
            wall[0] += timedelta(hours=1)
        assert trio.current_time() - began < HOUR + 60

    play(scenario)
