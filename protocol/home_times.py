"""How long homes take to read blocks from the upstream, and when another member should act for a slow home.

A slow uplink makes all homes slow, and a second read of a block makes it slower still. So a home is compared with the
others: if no home that was asked at about the same time has delivered yet, the uplink is slow and no home is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.ids import PeerId
from protocol.placement import SMALL_BLOCK

LEAST_S, FACTOR, FADE = 12.5, 3.0, 0.95
"""A home may take FACTOR times as long as the slowest recent read (whose time fades with each block), and at least
LEAST_S: on a crowded uplink TCP may starve a healthy connection for seconds. A home that takes longer has a bad link of
its own. A client waits for 25 s."""
CELL_S = 2.0
"""A keeper waits this much longer for each cell between it and the home: the asker of a slow node notices it first."""


class HomeTimes:
    """The homes as one node sees them; `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._slowest_s = 0.0
        self._waits: Counter[PeerId] = Counter()
        self._came_asked_at = -math.inf
        """The latest request time of all blocks that arrived."""

    @contextmanager
    def waiting(self, home: PeerId) -> Iterator[None]:
        """Within the context, this node waits for a block that `home` may have to read."""
        self._waits[home] += 1
        try:
            yield
        finally:
            self._waits[home] -= 1
            if not self._waits[home]:
                del self._waits[home]

    def came(self, length: int, asked_at: float, now: float) -> None:
        """A block of `length` bytes arrived that a home had to read. A small block shows nothing about the uplink. The
        longest recent time counts: the first of many reads may end in a fifth of the time of the others. A time far
        beyond the usual is capped, so that one bad home does not make the uplink look slow."""
        if length <= SMALL_BLOCK:
            return
        self._came_asked_at = max(self._came_asked_at, asked_at)
        took_s = now - asked_at
        usual = self._slowest_s or took_s
        self._slowest_s = max(min(took_s, 2 * usual), FADE * usual)

    def too_long(self, home: PeerId, asked_at: float, cells: int, now: float) -> bool:
        """Whether `home`, `cells` cells away, takes longer than allowed, and longer than the other homes, if any."""
        if now - asked_at <= max(LEAST_S, FACTOR * self._slowest_s) + CELL_S * cells:
            return False
        return asked_at <= self._came_asked_at or self._waits.keys() <= {home}
