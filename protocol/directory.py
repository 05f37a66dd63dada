"""Which members hold a part of an object, as they announced. Soft state: entries expire, and holders announce again.

A member's announcements are bounded, so that it cannot push out those of others. Beyond the bound, and for an object
with too many holders, the oldest announcement goes.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush, heapreplace
from itertools import count

from protocol.ids import Digest, PeerId

TTL_S = 120.0
"""Four times the interval of announcements: three in a row may be lost before a holder is forgotten."""
MAX_ANNOUNCED = 8192
"""Objects that a member announces, and announcements of one member that a directory keeps."""
MAX_ANNOUNCEMENTS = 65536
"""Of all members together: at most 9 MiB. A directory of five members that hold 8192 equal objects has 24,576."""
MAX_HOLDERS = 16
"""Enough to find a block although several holders evicted it; more would only cost memory."""
EXPIRED_AT_ONCE = 2
"""Expired announcements that each new one removes: the table shrinks, and no announcement takes long."""

_KEY_DIGITS = 15
"""Hexadecimal digits of a digest that are kept. If a member announces a digest with the same end as another, it is
asked in vain for the other, which it could as well announce."""


def _key_of(digest: Digest) -> int:
    return int(digest.hex[-_KEY_DIGITS:], 16)


class Directory:
    """The announcements of each member, in the order of their time, and the holders of each object."""

    def __init__(self) -> None:
        self._until: dict[PeerId, dict[int, float]] = {}
        self._holders: dict[int, PeerId | tuple[PeerId, ...]] = {}
        """The latest holder is last. Most objects have one, which is not in a tuple."""
        self._oldest: list[tuple[float, int, PeerId]] = []
        """A heap with an entry for each member of `_ordered`: its oldest announcement ends then, or later."""
        self._ordered: dict[PeerId, PeerId] = {}
        self._entered, self._count = count(), 0

    def __len__(self) -> int:
        """The announcements that are kept, expired or not."""
        return self._count

    def announce(self, digest: Digest, peer: PeerId, now: float) -> None:
        key = _key_of(digest)
        if key in self._until.get(peer, ()):
            self._drop(key, peer)
        until = now + TTL_S
        objects = self._until.setdefault(peer, {})
        if peer not in self._ordered:
            self._ordered[peer] = peer
            heappush(self._oldest, (until, next(self._entered), peer))
        peer = self._ordered[peer]  # in memory once for all announcements
        objects[key] = until
        self._holders[key] = holders = (*self._holders_of(key), peer)
        self._count += 1
        if len(holders) == 1:
            self._holders[key] = peer
        if len(objects) > MAX_ANNOUNCED:
            self._drop(next(iter(objects)), peer)
        if len(holders) > MAX_HOLDERS:
            self._drop(key, holders[0])
        if self._count > MAX_ANNOUNCEMENTS:
            self._drop_oldest()
        for _ in range(EXPIRED_AT_ONCE):
            if self._oldest and self._oldest[0][0] <= now:
                self._drop_oldest(now)

    def _drop_oldest(self, ended_at: float = math.inf) -> None:
        """Forget the oldest announcement, if it ends by then."""
        while self._oldest:
            until, _, peer = self._oldest[0]
            objects = self._until.get(peer, {})
            key = next(iter(objects), None)
            if key is None:
                heappop(self._oldest)
                del self._ordered[peer]
            elif objects[key] != until:
                heapreplace(self._oldest, (objects[key], next(self._entered), peer))
            else:
                if until <= ended_at:
                    self._drop(key, peer)
                return

    def _drop(self, key: int, peer: PeerId) -> None:
        del self._until[peer][key]
        self._count -= 1
        if not self._until[peer]:
            del self._until[peer]
        left = tuple(other for other in self._holders_of(key) if other != peer)
        if left:
            self._holders[key] = left if len(left) > 1 else left[0]
        else:
            del self._holders[key]

    def _holders_of(self, key: int) -> tuple[PeerId, ...]:
        holders = self._holders.get(key, ())
        return holders if isinstance(holders, tuple) else (holders,)

    def holders(self, digest: Digest, now: float) -> tuple[PeerId, ...]:
        """The members whose announcement has not expired, the latest first."""
        key = _key_of(digest)
        return tuple(peer for peer in reversed(self._holders_of(key)) if self._until[peer][key] > now)
