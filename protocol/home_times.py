"""How long homes take to read blocks from the upstream, and when another member should act for a slow home.

A slow uplink makes all homes slow, and a second read of a block makes it slower still. So a home is compared with the
others: if no home that was asked at about the same time has delivered yet, the uplink is slow and no home is. A home
also says whether bytes come on at it. That may be a lie, so it makes its time longer, but not endless.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.ids import PeerId
from protocol.placement import SMALL_BLOCK

LEAST_S, FACTOR, FADE = 12.5, 3.0, 0.95
"""A home that is the only one awaited may take FACTOR times as long as the slowest recent read (whose time fades with
each block), and at least LEAST_S: on a crowded uplink TCP may starve a healthy connection for seconds, and a short
outage is waited out (`BODY` in node/registry/retry.py). A client waits for 25 s."""
OVERTAKEN_S, COMING_FACTOR = 8.0, 2 * FACTOR
"""The same for a home that others have overtaken, while bytes come on at it by its own account, or at no home. A slow
link of its own is no reason to give it up; to be far slower than the others is, as is to say only that bytes come."""
NOTHING_S = 4.0
"""The same, with FACTOR, for a home that others have overtaken, and that gets nothing while others do: it has no uplink
of its own, or only says that it works."""
FRESH_S = 2.0
"""Bytes come on at a home if it said so within this time: four messages `Waiting`."""
CELL_S = 2.0
"""A keeper waits this much longer for each cell between it and the home: the asker of a slow node notices it first."""


class HomeTimes:
    """The homes as one node sees them; `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._slowest_s = 0.0
        self._waits: Counter[PeerId] = Counter()
        self._overtook_from = -math.inf
        """The latest `since` of all blocks that arrived: a home that is awaited since then or earlier was overtaken."""
        self._coming_at: dict[PeerId, float] = {}
        """By home that is awaited: when it last said that bytes come on."""

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
                self._coming_at.pop(home, None)

    def coming(self, home: PeerId, now: float) -> None:
        """`home` says that bytes of a block come on from the upstream, or such a block arrived from it."""
        if home in self._waits:
            self._coming_at[home] = now

    def came(self, length: int, since: float, now: float) -> None:
        """A block of `length` bytes arrived that a home had to read. `since`: when the home was asked, or when the
        block before it arrived, if it was asked for several. A small block shows nothing about the uplink. The longest
        recent time counts: the first of many reads may end in a fifth of the time of the others. A time far beyond the
        usual is capped, so that one bad home does not make the uplink look slow."""
        if length <= SMALL_BLOCK:
            return
        self._overtook_from = max(self._overtook_from, since)
        took_s = now - since
        usual = self._slowest_s or took_s
        self._slowest_s = max(min(took_s, 2 * usual), FADE * usual)

    def too_long(self, home: PeerId, since: float, cells: int, now: float) -> bool:
        """Whether `home`, `cells` cells away and awaited as `since` says in `came`, takes longer than allowed, and
        longer than the other homes, if any."""
        waited_s = now - since - CELL_S * cells
        if since <= self._overtook_from:
            fresh = {other for other, at in self._coming_at.items() if now - at <= FRESH_S}
            if fresh and home not in fresh:
                return waited_s > max(NOTHING_S, FACTOR * self._slowest_s)
            return waited_s > max(OVERTAKEN_S, COMING_FACTOR * self._slowest_s)
        return waited_s > max(LEAST_S, FACTOR * self._slowest_s) and self._waits.keys() <= {home}
