"""Reads ahead for one client: the next blocks that it will take, in its order, are under way or already in memory.

A late block delays the client but not the reads behind it. Later blocks are read and kept in memory as far as the
window (protocol/window.py) and the room for all clients allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from node.blocks.fetcher import Fetcher
from node.blocks.values import BlockAddress, Obtained, Work
from node.runtime.single_flight import Ticket
from protocol.window import MOST

HELD = 2 * MOST
"""Blocks of all clients, under way or in memory: twice the window, so that a late block does not stop the others."""
FIRST_BLOCKS = 8
"""Further blocks, for clients that have none, so that clients that pause do not stop others. A client without a place
waits. A block under way takes its size twice while it is decoded: its buffer, and its shards."""


class Room:
    """Bounds the blocks in memory for all clients of a node."""

    def __init__(self) -> None:
        self._free = trio.Semaphore(HELD + FIRST_BLOCKS)

    async def take_first(self) -> None:
        await self._free.acquire()

    def take_more(self) -> bool:
        if self._free.value <= FIRST_BLOCKS:
            return False
        self._free.acquire_nowait()
        return True

    def give(self) -> None:
        self._free.release()


@dataclass(slots=True)
class _Reading:
    address: BlockAddress
    ticket: Ticket[Work, Obtained]
    cold: bool = True


class ReadAhead:
    """The reads of one client. `close` must be called when the client's read ends in any way."""

    def __init__(self, fetcher: Fetcher, room: Room, blocks: Iterator[BlockAddress], *, urgent: bool) -> None:
        self._fetcher, self._room, self._urgent, self._blocks = fetcher, room, urgent, blocks
        self._following = next(blocks, None)
        self._readings: deque[_Reading] = deque()
        self._warm = 0
        fetcher.window.entered()

    async def first(self) -> Obtained:
        """The next block for the client. Raises the error of its read."""
        await self._first_ended()
        return await self._readings[0].ticket.wait()

    async def ended_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._first_ended()
            return True
        return False

    async def _first_ended(self) -> None:
        if not self._readings and self._following is not None:
            await self._room.take_first()
            self._begin(self._following)
        while True:
            while self._following is not None and self._may_begin():
                self._begin(self._following)
            if self._readings[0].ticket.ended:
                return
            await self._fetcher.turned.park()

    def taken(self) -> None:
        """The client has the first block: free its place."""
        self._readings.popleft().ticket.release()
        self._room.give()

    def close(self) -> None:
        while self._readings:
            self.taken()
        self._fetcher.window.left()
        self._fetcher.turned.unpark_all()

    def _begin(self, address: BlockAddress) -> None:
        self._readings.append(_Reading(address, self._fetcher.begin(address, self._urgent)))
        self._following = next(self._blocks, None)

    def _may_begin(self) -> bool:
        window = self._fetcher.window
        for reading in self._readings:
            if reading.cold and not window.is_cold(reading.address.key):
                reading.cold = False
                self._warm += 1
        under_way = sum(not reading.ticket.ended for reading in self._readings)
        cold = sum(reading.cold for reading in self._readings)
        fair = len(self._readings) < HELD // MOST * window.share
        return fair and window.has_room(under_way, cold, self._warm) and self._room.take_more()
