"""Which members hold a part of an object, as they announced. Soft state: entries expire, and holders announce again.

A member's announcements are bounded, so that it cannot push out those of others. Beyond the bound, and for an object
with too many holders, the oldest announcement goes.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from protocol.ids import Digest, PeerId

TTL_S = 120.0
"""Four times the interval of announcements: three in a row may be lost before a holder is forgotten."""
MAX_ANNOUNCED = 8192
"""Objects that a member announces, and announcements of one member that a directory keeps."""
MAX_ANNOUNCEMENTS = 65536
"""Of all members together: about 25 MiB. A directory of five members that hold 8192 equal objects has 24,576."""
MAX_HOLDERS = 16
"""Enough to find a block although several holders evicted it; more would only cost memory."""
EXPIRED_AT_ONCE = 2
"""Expired announcements that each new one removes: the table shrinks, and no announcement takes long."""

_Announcement = tuple[Digest, PeerId]


class Directory:
    """The announcements in order of their time, of all members, of each member, and for each object."""

    def __init__(self) -> None:
        self._until: OrderedDict[_Announcement, float] = OrderedDict()
        self._by_member: dict[PeerId, OrderedDict[Digest, None]] = {}
        self._holders: dict[Digest, OrderedDict[PeerId, None]] = {}

    def __len__(self) -> int:
        """The announcements that are kept, expired or not."""
        return len(self._until)

    def announce(self, digest: Digest, peer: PeerId, now: float) -> None:
        if (digest, peer) in self._until:
            self._drop(digest, peer)
        self._until[digest, peer] = now + TTL_S
        objects = self._by_member.setdefault(peer, OrderedDict())
        holders = self._holders.setdefault(digest, OrderedDict())
        objects[digest] = holders[peer] = None
        if len(objects) > MAX_ANNOUNCED:
            self._drop(next(iter(objects)), peer)
        if len(holders) > MAX_HOLDERS:
            self._drop(digest, next(iter(holders)))
        if len(self._until) > MAX_ANNOUNCEMENTS:
            self._drop(*next(iter(self._until)))
        for oldest, until in list(islice(self._until.items(), EXPIRED_AT_ONCE)):
            if until <= now:
                self._drop(*oldest)

    def _drop(self, digest: Digest, peer: PeerId) -> None:
        del self._until[digest, peer], self._by_member[peer][digest], self._holders[digest][peer]
        if not self._by_member[peer]:
            del self._by_member[peer]
        if not self._holders[digest]:
            del self._holders[digest]

    def holders(self, digest: Digest, now: float) -> tuple[PeerId, ...]:
        """The members whose announcement has not expired, the latest first."""
        return tuple(peer for peer in reversed(self._holders.get(digest, {})) if self._until[digest, peer] > now)
