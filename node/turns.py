"""Whose turn it is to send a body: a few connections at a time, and the others after them.

On a slow link bodies that are all sent at once all come late, and so many TCP connections find no room in the link's
queue and starve each other. One after another the first ones are there, and are passed on, while the last ones wait.
"""

from __future__ import annotations

import trio

MOST = 6
"""Enough to keep the link busy while one of them has a slow receiver or has lost a packet."""
TURN_S = 1.0
"""A receiver that takes longer goes on without a turn: it holds up the others no more than this."""


class Turns:
    """Of all connections of a node. A connection is named by what its writer is parked in."""

    def __init__(self) -> None:
        self._since: dict[trio.lowlevel.ParkingLot, float] = {}
        self._queue: dict[trio.lowlevel.ParkingLot, None] = {}
        self._contended = trio.Event()

    @property
    def contended(self) -> bool:
        return bool(self._queue)

    def take(self, who: trio.lowlevel.ParkingLot) -> bool:
        """Whether it is the turn of `who`; where not, it is unparked when that has come."""
        if who in self._since:
            return True
        if len(self._since) < MOST:
            self._since[who] = trio.current_time()
            return True
        self._queue[who] = None
        self._contended.set()
        return False

    def give(self, who: trio.lowlevel.ParkingLot) -> None:
        """The turn ended, or was over before."""
        if self._since.pop(who, None) is not None and self._queue:
            following = next(iter(self._queue))
            del self._queue[following]
            self._since[following] = trio.current_time()
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
