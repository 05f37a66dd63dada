"""Whose turn it is to send a body: a few connections at a time, and the others after them.

On a slow link bodies that are all sent at once all come late, and so many TCP connections find no room in the link's
queue and starve each other. One after another the first ones are there, and are passed on, while the last ones wait.
"""

from __future__ import annotations

import trio

from protocol.ids import PeerId

MOST = 6
"""Enough to keep the link busy while one of them has a slow receiver or has lost a packet."""
OF_ONE = 3
"""Of these, of one peer, for each lane. One that takes nothing on any of its connections does not stop the others."""
TURN_S = 1.0
"""A receiver that takes longer goes on without a turn: it holds up the others no more than this."""


class Turns:
    """Of all connections of a node. A connection is named by what its writer is parked in."""

    def __init__(self) -> None:
        self._since: dict[trio.lowlevel.ParkingLot, float] = {}
        self._queue: dict[trio.lowlevel.ParkingLot, PeerId] = {}
        self._peers: dict[trio.lowlevel.ParkingLot, PeerId] = {}
        """Whose the turns are."""
        self._contended = trio.Event()

    @property
    def contended(self) -> bool:
        return bool(self._queue)

    def take(self, who: trio.lowlevel.ParkingLot, peer: PeerId) -> bool:
        """Whether it is the turn of `who`; where not, it is unparked when that has come."""
        if who in self._since:
            return True
        if len(self._since) < MOST and self._may(peer):
            self._begin(who, peer)
            return True
        self._queue[who] = peer
        self._contended.set()
        return False

    def _may(self, peer: PeerId) -> bool:
        return sum(one == peer for one in self._peers.values()) < OF_ONE

    def _begin(self, who: trio.lowlevel.ParkingLot, peer: PeerId) -> None:
        self._since[who], self._peers[who] = trio.current_time(), peer

    def give(self, who: trio.lowlevel.ParkingLot) -> None:
        """The turn ended, or was over before."""
        if self._since.pop(who, None) is None:
            return
        del self._peers[who]
        following = next((one for one, peer in self._queue.items() if self._may(peer)), None)
        if following is not None:
            self._begin(following, self._queue.pop(following))
            following.unpark()

    def leave(self, who: trio.lowlevel.ParkingLot) -> None:
        self._queue.pop(who, None)
        self.give(who)

    async def run(self) -> None:
        """Ends the turns that take too long."""
        while True:
            await self._contended.wait()
            while self._queue:
                before = trio.current_time() - TURN_S
                for who in [who for who, since in self._since.items() if since < before]:
                    self.give(who)
                await trio.sleep(TURN_S / 4)
            self._contended = trio.Event()
