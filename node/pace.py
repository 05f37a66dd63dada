"""When background reading may go on: at a rate, within hours of the day, and after what clients want."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from protocol.errors import BadInputError

GIVE_WAY_S = 10.0
"""So long a block is put off while clients read: a client that never ends does not stop all other work."""
CLOCK_S = 30.0
"""Between looks at the wall clock, which may be set."""
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", re.ASCII)
_DAY_S = 86400


@dataclass(frozen=True, slots=True)
class Window:
    """Hours of each day, in seconds from local midnight; past midnight where `stop` is before `start`."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """`22:00-06:00`."""
        match = _WINDOW.fullmatch(text.strip())
        if not match:
            raise BadInputError(f'not hours of the day: "{text[:40]}"; write for example "22:00-06:00"')
        start, stop = (int(match[i]) * 3600 + int(match[i + 1]) * 60 for i in (1, 3))
        if start == stop:
            raise BadInputError(f'"{text}" begins when it ends: leave it out for any time')
        return cls(start, stop)

    def opens_in(self, second: int) -> int:
        """Seconds until it is open, at so many seconds after midnight; 0 while it is."""
        inside = (second - self.start) % _DAY_S < (self.stop - self.start) % _DAY_S
        return 0 if inside else (self.start - second) % _DAY_S


def second_of_day() -> int:
    now = time.localtime()
    return now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec


class Pace:
    """Of one reader. `idle` returns once no client of this node reads."""

    def __init__(
        self,
        rate: int,
        window: Window | None,
        idle: Callable[[], Awaitable[None]],
        clock: Callable[[], int] = second_of_day,
    ) -> None:
        self._rate, self._window, self._idle, self._clock = rate, window, idle, clock
        self._next_at = trio.current_time()
        self.waits_for = ""

    async def wait(self, count: int) -> None:
        """Until the next `count` bytes may be asked for."""
        self.waits_for = "clients that read now"
        with trio.move_on_after(GIVE_WAY_S):
            await self._idle()
        self.waits_for = "its rate"
        await trio.sleep_until(self._next_at)
        self.waits_for = "its hours of the day"
        while self._window is not None and (seconds := self._window.opens_in(self._clock())):  # noqa: ASYNC110 - a clock that is set tells nobody
            await trio.sleep(min(seconds, CLOCK_S))
        self.waits_for = ""
        if self._rate:
            self._next_at = max(self._next_at, trio.current_time()) + count / self._rate
