"""What the configuration allows of the uplink to an upstream: node/uplink.py keeps to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Hours:
    """Minutes of the local day, `start` included and `end` not; over midnight where it ends before it starts."""

    start: int
    end: int

    def __contains__(self, when: datetime) -> bool:
        minute = when.hour * 60 + when.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


@dataclass(frozen=True, slots=True)
class UplinkPolicy:
    """For the site: bytes a second and a day, 0 for no limit. `refuse`: no foreground body once the day's are spent.

    In `hours` neither limit holds and nothing is counted; where there are any, background reads are made only then.
    """

    rate: int = 0
    daily: int = 0
    hours: tuple[Hours, ...] = ()
    refuse: bool = True

    @property
    def limited(self) -> bool:
        return bool(self.rate or self.daily)

    def free(self, when: datetime) -> bool:
        return any(when in hours for hours in self.hours)
