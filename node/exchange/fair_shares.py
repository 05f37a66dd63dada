"""A resource that peers share such that none of them can take all of it.

A peer may hold at most as much as is free at that moment. A single peer that takes all it can leaves half of the total;
n peers that do so at once leave 1/(n + 1). If they come one after another, each leaves half of the units free then.

Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches" (1998), with alpha = 1.
"""

from __future__ import annotations

import trio

from protocol.ids import PeerId


class Shares:
    """`total` units of the resource: bytes, requests."""

    def __init__(self, total: int) -> None:
        self.free = total
        self._taken: dict[PeerId, int] = {}
        self._waiting = trio.lowlevel.ParkingLot()

    def take(self, peer: PeerId, amount: int) -> bool:
        """Take `amount` more for the peer, unless it would then hold too much. Returns whether it was taken."""
        if not amount:
            return True
        taken = self._taken.get(peer, 0) + amount
        if taken > self.free:
            return False
        self.free -= amount
        self._taken[peer] = taken
        return True

    async def wait(self, peer: PeerId, amount: int) -> None:
        """Take `amount` as soon as the peer may have it. No checkpoint if that is at once."""
        while not self.take(peer, amount):
            await self._waiting.park()

    def give(self, peer: PeerId, amount: int) -> None:
        if not amount:
            return
        self.free += amount
        left = self._taken[peer] - amount
        if left:
            self._taken[peer] = left
        else:
            del self._taken[peer]
        if self._waiting:
            self._waiting.unpark_all()
