"""Send slots: only a few connections of a node send a body at a time, the others queue for a slot.

On a slow link, bodies that are all sent at once all arrive late, and so many TCP connections find no room in the link's
queue and starve each other. One after another, the first bodies arrive, and are passed on, while the last ones wait.
"""

from __future__ import annotations

import trio

from protocol.ids import PeerId

SLOTS = 6
"""Enough to keep the link busy while one of them has a slow receiver or has lost a packet."""
SLOTS_PER_PEER = 3
"""One for each lane. A peer that takes nothing on any of its connections leaves slots to the others."""
SLOT_S = 1.0
"""A receiver that takes longer loses the slot but may finish: it holds up the others no longer than this."""


class SendSlots:
    """The slots of all connections of a node. A connection is named by the lot that its writer is parked in."""

    def __init__(self) -> None:
        self._holders: dict[trio.lowlevel.ParkingLot, tuple[float, PeerId]] = {}
        """The connections that have a slot: since when, and with which peer."""
        self._queue: dict[trio.lowlevel.ParkingLot, PeerId] = {}
        self._contended = trio.Event()

    @property
    def contended(self) -> bool:
        return bool(self._queue)

    def take(self, connection: trio.lowlevel.ParkingLot, peer: PeerId) -> bool:
        """Whether the connection has a slot; if not, it is queued, and unparked once it has."""
        if connection in self._holders:
            return True
        if len(self._holders) < SLOTS and self._may(peer):
            self._holders[connection] = trio.current_time(), peer
            return True
        self._queue[connection] = peer
        self._contended.set()
        return False

    def _may(self, peer: PeerId) -> bool:
        return sum(holder == peer for _, holder in self._holders.values()) < SLOTS_PER_PEER

    def give(self, connection: trio.lowlevel.ParkingLot) -> None:
        """Give the slot back, if the connection still has it."""
        if self._holders.pop(connection, None) is None:
            return
        following = next((queued for queued, peer in self._queue.items() if self._may(peer)), None)
        if following is not None:
            self._holders[following] = trio.current_time(), self._queue.pop(following)
            following.unpark()

    def leave(self, connection: trio.lowlevel.ParkingLot) -> None:
        self._queue.pop(connection, None)
        self.give(connection)

    async def run(self) -> None:
        """Take away slots that are held for longer than SLOT_S while others queue."""
        while True:
            await self._contended.wait()
            while self._queue:
                before = trio.current_time() - SLOT_S
                for connection in [holder for holder, (since, _) in self._holders.items() if since < before]:
                    self.give(connection)
                await trio.sleep(SLOT_S / 4)
            self._contended = trio.Event()
