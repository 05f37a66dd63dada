"""Quarantine: a peer that misbehaved is out of the view for a time, for a reason that operators see.

`Swim` keeps when each exclusion ends, because an excluded peer is neither probed nor believed; the reasons are here.
A revocation, in contrast, is for good, needs no reason, and makes `Swim` forget the peer.
"""

from __future__ import annotations

import logging

import trio

from protocol.ids import PeerId
from protocol.swim import Swim

log = logging.getLogger(__name__)

QUARANTINE_S = 3600.0
"""Long enough that a peer with bad memory or worse does not waste every pull, short enough to try it again."""


class Quarantine:
    def __init__(self, swim: Swim, seconds: float) -> None:
        self._swim = swim
        self._seconds = seconds
        self._reasons: dict[PeerId, str] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._swim.excluded

    def begin(self, peer: PeerId, reason: str, seconds: float | None) -> None:
        if peer in self and self.reason(peer) == reason:
            return
        seconds = self._seconds if seconds is None else seconds
        log.info("quarantined", extra={"peer": peer, "reason": reason, "seconds": seconds})
        self._swim.exclude(peer, trio.current_time() + seconds)
        self._reasons[peer] = reason

    def reason(self, peer: PeerId) -> str:
        """Empty for a peer that is not in quarantine."""
        return self._reasons.get(peer, "")

    def rows(self) -> tuple[tuple[PeerId, str, float], ...]:
        """Each peer in quarantine, the reason, and the seconds that are left."""
        now = trio.current_time()
        return tuple((peer, self._reasons[peer], until - now) for peer, until in self._swim.excluded.items())

    def forget_ended(self) -> None:
        self._reasons = {peer: reason for peer, reason in self._reasons.items() if peer in self}
