"""Throttling of background reads: at a rate, within hours of the day, and after the reads of clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

import trio

from node.config.quantities import Window, local_time

GIVE_WAY_S = 10.0
"""Longest wait for clients before each block: a client that reads without end does not stop all other work."""
CLOCK_S = 30.0
"""Time between two looks at the wall clock, which may be set."""


class Pace:
    """The pace of a reader, in bytes a second (0: no limit). `idle` returns once no client of this node reads."""

    def __init__(
        self,
        rate: int,
        hours: Window | None,
        idle: Callable[[], Awaitable[None]],
        clock: Callable[[], datetime] = local_time,
    ) -> None:
        self._rate, self._hours, self._idle, self._clock = rate, hours, idle, clock
        self._next_at = trio.current_time()
        self.waits_for = ""

    async def wait(self, count: int) -> None:
        """Wait until the next `count` bytes may be requested."""
        self.waits_for = "clients that read now"
        with trio.move_on_after(GIVE_WAY_S):
            await self._idle()
        self.waits_for = "its rate"
        await trio.sleep_until(self._next_at)
        self.waits_for = "its hours of the day"
        while self._hours is not None and (seconds := self._hours.opens_in(self._clock())):  # noqa: ASYNC110 - setting a clock wakes no task
            await trio.sleep(min(seconds, CLOCK_S))
        self.waits_for = ""
        if self._rate:
            self._next_at = max(self._next_at, trio.current_time()) + count / self._rate
