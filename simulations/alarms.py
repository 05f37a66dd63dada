"""Tasks that wait for a time, woken together: deadlines of their own would take half of a large simulation's time."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import count

import trio


class Alarms:
    """Times are rounded up to whole ticks of `tick_s` seconds, 0 for none: what is due in one tick is one deadline."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self._tick_s = tick_s
        self._waiting: list[tuple[float, int, trio.lowlevel.Task]] = []
        self._numbers = count()
        self._gone: set[int] = set()
        self._earlier = trio.Event()

    async def until(self, when: float) -> None:
        """Returns at `when`, or the tick that begins then or next."""
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
        """To be running while anybody waits."""
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
