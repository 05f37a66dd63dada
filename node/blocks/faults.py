"""Finds the member that makes wrong shards. Shards are not signed: the keeper that sent a wrong shard may have made it,
or any member that passed it on between the block's home and that keeper.

One wrong shard does not show which of these members lies. Two do where exactly one member had both in its hands. So a
single liar cannot have an honest member quarantined.
"""

from __future__ import annotations

import trio
from cachetools import TTLCache

from protocol.ids import PeerId

REMEMBERED_S = 3600.0
MAX_EVENTS = 256


class Faults:
    def __init__(self) -> None:
        self._events: TTLCache[frozenset[PeerId], None] = TTLCache(MAX_EVENTS, REMEMBERED_S, timer=trio.current_time)

    def wrong(self, makers: frozenset[PeerId]) -> PeerId | None:
        """Note that one of `makers` made a wrong shard. Returns the liar where that is certain now."""
        self._events[makers] = None
        common = (makers & others for others in self._events)
        return next((liar for few in common if len(few) == 1 for liar in few), None)
