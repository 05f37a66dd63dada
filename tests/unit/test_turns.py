"""The instrument that finds long turns of the loop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from tests.support.turns import LongTurn, Turns, read, to_file


def _spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


RUNS = 30
"""Most runs until a sample falls into a step: on a busy machine the thread that samples may come too late."""


def _long_steps(file: Path) -> list[LongTurn]:
    """The long steps of a run with one, which is in a task `busy`."""

    async def calm() -> None:
        for _ in range(10):
            await trio.lowlevel.checkpoint()

    async def busy() -> None:
        await trio.lowlevel.checkpoint()
        _spin(0.2)
        await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calm)
            nursery.start_soon(busy)

    trio.run(main, instruments=[Turns(to_file(file))])
    return [turn for turn in read(file) if turn.kind == "step"]


def test_a_long_step_is_reported_with_its_task_and_its_stack(tmp_path: Path) -> None:
    stacks = list[tuple[str, ...]]()
    for number in range(RUNS):
        steps = _long_steps(tmp_path / f"turns-{number}")
        assert [step.task.rpartition(".")[2] for step in steps] == ["busy"]
        assert steps[0].cpu_s >= 0.2
        stacks.append(steps[0].stack)
        if any("_spin" in frame for frame in steps[0].stack):
            return
    pytest.fail(f"no sample of {RUNS} shows what the step did: {stacks}")


def test_many_short_steps_in_one_turn_are_reported_as_a_turn() -> None:
    found = list[LongTurn]()

    async def short() -> None:
        await trio.lowlevel.checkpoint()
        _spin(0.01)

    async def main() -> None:
        trio.lowlevel.add_instrument(Turns(found.append, 0.1))
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(short)

    trio.run(main)
    assert {turn.kind for turn in found} == {"turn"}
    assert found[0].task.endswith("short")


def test_waiting_is_no_long_turn() -> None:
    found = list[LongTurn]()

    async def main() -> None:
        await trio.sleep(0.3)
        await trio.to_thread.run_sync(time.sleep, 0.1)

    trio.run(main, instruments=[Turns(found.append)])
    assert found == []
