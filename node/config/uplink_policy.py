"""The limits that the configuration sets on the uplink to an upstream. node/registry/uplink.py enforces them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from node.runtime.time_windows import TimeWindow


@dataclass(frozen=True, slots=True)
class UplinkPolicy:
    """Limits of the whole site: `rate` in bytes a second, `daily` in bytes a day, 0 for no limit.

    `refuse`: once the day's bytes are used up, foreground bodies are refused too. During `hours` neither limit holds
    and no bytes are counted; if there are any hours, background reads are made only then.
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
