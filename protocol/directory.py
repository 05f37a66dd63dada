"""Which members hold a part of an object, as they announced. Soft state: entries expire, and holders announce again."""

from __future__ import annotations

from collections import OrderedDict

from protocol.ids import Digest, PeerId

TTL_S = 120.0
"""Four times the interval of announcements: three in a row may be lost before a holder is forgotten."""
MAX_OBJECTS = 65536
MAX_HOLDERS = 16
"""Enough to find a block although several holders evicted it; more would only cost memory."""


class Directory:
    def __init__(self) -> None:
        self._holders: OrderedDict[Digest, OrderedDict[PeerId, float]] = OrderedDict()

    def announce(self, digest: Digest, peer: PeerId, now: float) -> None:
        holders = self._holders.setdefault(digest, OrderedDict())
        holders[peer] = now + TTL_S
        holders.move_to_end(peer)
        self._holders.move_to_end(digest)
        if len(holders) > MAX_HOLDERS:
            holders.popitem(last=False)
        if len(self._holders) > MAX_OBJECTS:
            self._holders.popitem(last=False)

    def holders(self, digest: Digest, now: float) -> tuple[PeerId, ...]:
        """The members whose announcement has not expired, the latest first."""
        holders = self._holders.get(digest)
        return tuple(peer for peer, until in reversed(holders.items()) if until > now) if holders else ()
