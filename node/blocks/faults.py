"""Who made a shard wrong: the keeper that sent it, or one of those through whose hands it came from the home? No shard
is signed.

One event does not tell. Two do where a single member had a hand in both: so no single liar can have an honest member
shut out.
"""

from __future__ import annotations

import trio
from cachetools import TTLCache

from protocol.ids import PeerId

REMEMBERED_S = 3600.0
MAX_EVENTS = 256


class Blame:
    def __init__(self) -> None:
        self._events: TTLCache[frozenset[PeerId], None] = TTLCache(MAX_EVENTS, REMEMBERED_S, timer=trio.current_time)

    def wrong(self, makers: frozenset[PeerId]) -> PeerId | None:
        """A wrong shard was made by one of `makers`. Who lies, where that is certain now."""
        self._events[makers] = None
        common = (makers & others for others in self._events)
        return next((liar for few in common if len(few) == 1 for liar in few), None)
