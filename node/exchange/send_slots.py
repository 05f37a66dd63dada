"""Send slots: only a few connections of a node send a body at a time, the others queue for a slot.

On a slow link, bodies that are all sent at once all arrive late, and that many TCP connections overflow the link's
queue and starve each other. Sent in turn, the first bodies arrive, and are passed on, while the last ones still wait.
"""

from __future__ import annotations

import trio

from protocol.ids import PeerId

SLOTS = 6
"""Enough to keep the link busy while one connection has a slow receiver or has lost a packet."""
SLOTS_PER_PEER = 3
"""One for each lane. Even a peer that accepts no byte on any connection leaves slots to the other peers."""
SLOT_S = 1.0
"""A connection that sends a body for longer loses the slot but may finish, so it holds up the others no longer."""


class SendSlots:
    """The slots of all connections of a node. A connection's key is the ParkingLot in which its writer waits."""

    def __init__(self) -> None:
        self._holders: dict[trio.lowlevel.ParkingLot, tuple[float, PeerId]] = {}
        """The connections that have a slot: since when, and with which peer."""
        self._queue: dict[trio.lowlevel.ParkingLot, PeerId] = {}
        self._contended = trio.Event()

    @property
    def contended(self) -> bool:
        return bool(self._queue)

    def take(self, connection: trio.lowlevel.ParkingLot, peer: PeerId) -> bool:
        """Whether the connection has a slot. If not, it is queued, and unparked once it has one."""
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
