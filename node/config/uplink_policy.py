"""What the configuration allows of the uplink to an upstream: node/registry/uplink.py keeps to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from node.runtime.time_windows import TimeWindow


@dataclass(frozen=True, slots=True)
class UplinkPolicy:
    """For the site: bytes a second and a day, 0 for no limit. `refuse`: no foreground body once the day's are spent.

    In `hours` neither limit holds and nothing is counted; where there are any, background reads are made only then.
    """

    rate: int = 0
    daily: int = 0
    hours: tuple[TimeWindow, ...] = ()
    refuse: bool = True

    @property
    def limited(self) -> bool:
        return bool(self.rate or self.daily)

    def free(self, when: datetime) -> bool:
        return any(not hours.opens_in(when) for hours in self.hours)
