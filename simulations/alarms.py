"""One task wakes all tasks that wait for a time. With a deadline for each, large simulations took twice as long."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import count

import trio


class Alarms:
    """Rounds times up to whole ticks of `tick_s` seconds (0: exact), so that all times in a tick share one deadline."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self._tick_s = tick_s
        self._waiting: list[tuple[float, int, trio.lowlevel.Task]] = []
        self._numbers = count()
        self._gone: set[int] = set()
        self._earlier = trio.Event()

    async def until(self, when: float) -> None:
        """Return at `when`, or at the next tick."""
        if self._tick_s:
            when = math.ceil(when / self._tick_s) * self._tick_s
        if when <= trio.current_time():
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        number = next(self._numbers)
        if not self._waiting or when < self._waiting[0][0]:
            self._earlier.set()
        heappush(self._waiting, (when, number, trio.lowlevel.current_task()))

        def abort(raise_cancel: object) -> trio.lowlevel.Abort:
            self._gone.add(number)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def run(self) -> None:
        """Must run while any task waits."""
        while True:
            self._earlier = trio.Event()
            with trio.move_on_at(self._waiting[0][0] if self._waiting else math.inf):
                await self._earlier.wait()
            now = trio.current_time()
            while self._waiting and self._waiting[0][0] <= now:
                _, number, task = heappop(self._waiting)
                if number in self._gone:
                    self._gone.remove(number)
                else:
                    trio.lowlevel.reschedule(task)
