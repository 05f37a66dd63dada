"""How long homes take to get blocks from the origin, and when one takes so long that another had better act for it.

A slow uplink makes all homes slow, and a second read of a block makes it slower still. So what counts is what others do
meanwhile: of homes that were asked together, and none of which has brought anything yet, none is to blame.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.ids import PeerId
from protocol.placement import SMALL_BLOCK

LEAST_S, FACTOR, FADE = 12.5, 3.0, 0.95
"""A home may read a block for some times as long as the slowest of late, which a slow uplink makes long and which fades
with each block, and for so long at least: on a crowded uplink TCP may starve a healthy connection for seconds. Who
takes longer still has a bad link of its own; a client waits for 25 s."""
CELL_S = 2.0
"""So much longer a keeper waits for each cell between it and the home: who is slow is found out by who asks it."""


class HomeTimes:
    """Of one node; `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._slowest_s = 0.0
        self._waits: Counter[PeerId] = Counter()
        self._came_asked_at = -math.inf
        """When that block was asked for which was asked for last of those that came."""

    @contextmanager
    def waiting(self, home: PeerId) -> Iterator[None]:
        """Meanwhile a block is waited for that the home may have to read."""
        self._waits[home] += 1
        try:
            yield
        finally:
            self._waits[home] -= 1
            if not self._waits[home]:
                del self._waits[home]

    def came(self, length: int, asked_at: float, now: float) -> None:
        """A block of this many bytes that had to be read; a small one tells nothing of the uplink.

        The longest of late counts: the first of a crowd may be there in a fifth of the time that the others need. What
        is far beyond counts for little, so that one bad home does not make all look slow.
        """
        if length <= SMALL_BLOCK:
            return
        self._came_asked_at = max(self._came_asked_at, asked_at)
        took_s = now - asked_at
        usual = self._slowest_s or took_s
        self._slowest_s = max(min(took_s, 2 * usual), FADE * usual)

    def too_long(self, home: PeerId, asked_at: float, cells: int, now: float) -> bool:
        """Whether a home that has `cells` between it and this node takes too long for a block: longer than it may, and
        than others, or where no other is waited for."""
        if now - asked_at <= max(LEAST_S, FACTOR * self._slowest_s) + CELL_S * cells:
            return False
        return asked_at <= self._came_asked_at or self._waits.keys() <= {home}
