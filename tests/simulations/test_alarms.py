"""Tasks that wait for a time: each wakes at its time or at the next tick, and a cancelled task is not woken."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from simulations.alarms import Alarms


async def times(alarms: Alarms, waits: list[float]) -> list[float]:
    """The times at which tasks that wait for these seconds were woken."""
    began, woken = trio.current_time(), [math.nan] * len(waits)

    async def wait(number: int) -> None:
        await alarms.until(began + waits[number])
        woken[number] = trio.current_time() - began

    async with trio.open_nursery() as running:
        running.start_soon(alarms.run)
        async with trio.open_nursery() as waiting:
            for number in range(len(waits)):
                waiting.start_soon(wait, number)
        running.cancel_scope.cancel()
    return woken


@given(st.lists(st.floats(-1, 100), max_size=20))
def test_each_task_wakes_at_its_time(waits: list[float]) -> None:
    async def main() -> None:
        assert await times(Alarms(), waits) == pytest.approx([max(0.0, wait) for wait in waits])

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@given(st.lists(st.integers(1, 10_000).map(lambda n: n / 100), max_size=20))
def test_tasks_of_one_tick_wake_together_and_none_before_its_time(waits: list[float]) -> None:
    async def main() -> None:
        woken = await times(Alarms(0.5), waits)
        assert woken == pytest.approx([math.ceil(wait * 2) / 2 for wait in waits])

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_cancelled_task_leaves_the_others_waiting() -> None:
    async def main() -> None:
        alarms = Alarms()
        async with trio.open_nursery() as running:
            running.start_soon(alarms.run)
            with trio.move_on_after(1) as scope:
                await alarms.until(trio.current_time() + 5)
            assert scope.cancelled_caught
            before = trio.current_time()
            await alarms.until(before + 10)
            assert trio.current_time() == pytest.approx(before + 10)
            running.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
