"""Daily time windows, by the local clock, such as the hours in which prefetching may run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from protocol.errors import BadInputError

_DAY_S = 24 * 3600
_HOURS = re.compile(r"(\d{1,2}):([0-5]\d)\s*-\s*(\d{1,2}):([0-5]\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """From `start` up to `stop`, in seconds after midnight; it spans midnight where `stop` is before `start`."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`22:00-06:00`, at most `00:00-24:00`. Raises BadInputError."""
        match = _HOURS.fullmatch(text.strip())
        start, stop = (int(match[i]) * 3600 + int(match[i + 1]) * 60 for i in (1, 3)) if match else (0, 0)
        if start == stop or start >= _DAY_S or stop > _DAY_S:
            raise BadInputError(f'"{text[:40]}": not hours of the day; write for example "22:00-06:00"')
        return cls(start, stop)

    def opens_in(self, when: datetime) -> int:
        """Seconds until the window begins; 0 within it."""
        second = when.hour * 3600 + when.minute * 60 + when.second
        inside = (second - self.start) % _DAY_S < ((self.stop - self.start) % _DAY_S or _DAY_S)
        return 0 if inside else (self.start - second) % _DAY_S


def local_time() -> datetime:
    return datetime.now().astimezone()
