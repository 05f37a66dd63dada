"""The blocks in memory for all clients of a node, and the clients that lose theirs to others.

A read of a client waits for the place of its first block (node/runtime/fair_places.py says whose turn it is), and takes
places for further blocks as they are free. A client that takes its block in time has a part of the window. One that
does not within SLOW_S is slow: it loses that part, its blocks beyond the first leave when another client has use for
their places, and if a read waits for its first place, a slow client makes way: its connection ends. It may continue
with a Range request.
"""

from __future__ import annotations

from typing import Protocol

import trio

from node.runtime.fair_places import Client, FairPlaces
from protocol.window import MOST, ReadWindow

HELD = 2 * MOST
"""Blocks of all clients, under way or in memory: twice the window, so that a late block does not stop the others."""
FIRST_BLOCKS = 8
"""Further blocks, for clients that have none, so that clients that pause do not stop others. A block under way takes
its size twice while it is decoded: its buffer, and its shards."""
MOST_FIRST = HELD + FIRST_BLOCKS - MOST
"""First blocks at a time: any number of slow clients leaves the quick ones a whole window."""
MOST_FIRST_EACH = MOST_FIRST - FIRST_BLOCKS
"""First blocks of the clients of one address: a client of another address needs not wait until they are slow."""
SLOW_S = 1.0
"""Longest time in which a client takes a block before it is slow: 4 Mbit/s, far below any link on which others wait."""


class Reader(Protocol):
    """A read of one client, as the room sees it."""

    client: Client

    def surplus(self) -> int:
        """The number of last blocks, without the first, that are in memory and not under way."""

    def shed(self) -> None:
        """Give the places of this surplus. Its blocks are read again later."""


class Room:
    """`window` shares the blocks under way among the clients that are not slow."""

    def __init__(self, window: ReadWindow) -> None:
        self._window = window
        self._places = FairPlaces(HELD + FIRST_BLOCKS, most_queued=MOST_FIRST, most_each=MOST_FIRST_EACH)
        self._active: set[Reader] = set()
        """Readers that share the window: their clients took their last block in time."""
        self._taking: dict[Reader, float] = {}
        """Readers whose client has a block, and since when; the longest first."""
        self._slow: dict[Reader, None] = {}
        self._cut: set[Reader] = set()
        self._waiting = 0
        """Reads that wait for their first place."""

    def left(self, reader: Reader) -> None:
        """The read ended. It has given all its places."""
        self._taking.pop(reader, None)
        self._slow.pop(reader, None)
        self._cut.discard(reader)
        self._pause(reader)

    def takes(self, reader: Reader) -> None:
        """The reader's client has a block now."""
        self._taking[reader] = trio.current_time()

    def took(self, reader: Reader) -> None:
        """The reader's client wants the next block."""
        self._find_slow()
        self._slow.pop(reader, None)
        if self._taking.pop(reader, None) is not None and reader not in self._active:
            self._resume(reader)

    def _resume(self, reader: Reader) -> None:
        self._active.add(reader)
        self._window.entered(reader.client.address)

    def _pause(self, reader: Reader) -> None:
        if reader in self._active:
            self._active.remove(reader)
            self._window.left(reader.client.address)

    async def take_first(self, reader: Reader) -> Client:
        """Wait for a place; returns the client to whom it counts. If need be, slow clients make way."""
        was_active = reader in self._active
        self._pause(reader)
        self._waiting += 1
        try:
            with self._places.asking() as wish:
                while not wish.granted.is_set():
                    self._make_way(reader)
                    began = next(iter(self._taking.values()), trio.current_time())
                    with trio.move_on_at(began + SLOW_S):  # before then no client becomes slow
                        await wish.granted.wait()
                await trio.lowlevel.checkpoint()
        finally:
            self._waiting -= 1
        if was_active:
            self._resume(reader)
        assert wish.client is not None
        return wish.client

    def take_more(self, reader: Reader) -> bool:
        """Take a place for a further block of a client, unless its address has its part already. Clients that have
        not yet taken a block in time leave a whole window to those that did."""
        address = reader.client.address
        if self._places.by_address[address] * max(1, self._window.addresses) >= HELD + FIRST_BLOCKS:
            return False
        entitled = reader in self._active or self._places.holders == 1
        leaving = FIRST_BLOCKS if entitled else FIRST_BLOCKS + MOST
        if self._places.free <= leaving:
            self._find_slow()
            slowest = max(self._slow, key=lambda slow: slow.surplus(), default=None)
            if slowest is None:
                return False
            slowest.shed()
        return self._places.take_now(reader.client, leaving=leaving)

    def give(self, client: Client, *, first: bool) -> None:
        """`first`: the place is from `take_first`."""
        self._places.give(client, queued=first)

    def has_room(self, reader: Reader, blocks: int, *, under_way: int, cold: int, warm: int) -> bool:
        """Whether a reader that has `blocks`, under way or in memory, may ask for another stripe in its part of the
        window. The others are as in `ReadWindow.has_room`."""
        self._find_slow()
        address, joins = reader.client.address, reader not in self._active
        fair = blocks < HELD // MOST * self._window.share(address, joins=joins)
        return fair and self._window.has_room(address, under_way=under_way, cold=cold, warm=warm, joins=joins)

    def _find_slow(self) -> None:
        if not self._taking:
            return
        now = trio.current_time()
        for reader, since in list(self._taking.items()):
            if since + SLOW_S > now:
                return
            del self._taking[reader]
            self._slow[reader] = None
            self._pause(reader)

    def _make_way(self, reader: Reader) -> None:
        """Let a slow client of the address with the most places make way, if that has as many as the reader's."""
        self._find_slow()
        count = self._places.by_address
        slow = sorted(self._slow.keys() - self._cut, key=lambda slow: -count[slow.client.address])
        for victim in slow:
            if len(self._cut) >= self._waiting or count[victim.client.address] < count[reader.client.address]:
                return
            if victim.client.cut():
                self._cut.add(victim)
