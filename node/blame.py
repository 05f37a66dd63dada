"""Who made a shard wrong: the keeper that sent it, or the home that it has it from? No shard is signed.

One event does not tell. A keeper whose shards are wrong for two homes is the liar, and so is a home whose shards are
wrong at two keepers: so no single liar can have an honest member shut out.
"""

from __future__ import annotations

import trio
from cachetools import TTLCache

from protocol.ids import PeerId
from protocol.members import MAX_MEMBERS

REMEMBERED_S = 3600.0


class Blame:
    def __init__(self) -> None:
        self._homes: TTLCache[PeerId, frozenset[PeerId]] = _table()
        """By keeper: for whose blocks it sent wrong shards."""
        self._keepers: TTLCache[PeerId, frozenset[PeerId]] = _table()

    def wrong(self, keeper: PeerId, home: PeerId) -> PeerId | None:
        """A wrong shard came from `keeper`. Who lies, where that is certain now."""
        if keeper == home:
            return keeper
        homes = self._homes[keeper] = self._homes.get(keeper, frozenset()) | {home}
        keepers = self._keepers[home] = self._keepers.get(home, frozenset()) | {keeper}
        return keeper if len(homes) > 1 else home if len(keepers) > 1 else None


def _table() -> TTLCache[PeerId, frozenset[PeerId]]:
    return TTLCache(MAX_MEMBERS, REMEMBERED_S, timer=trio.current_time)
