"""Reads ahead for one client: the next blocks that it will take, in its order, are under way or already in memory.

A late block delays the client but not the reads behind it. Later blocks are read and kept in memory as far as the
window (protocol/window.py) and the room for all clients (node/blocks/room.py) allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import trio

from node.blocks.fetcher import Fetcher
from node.blocks.room import Room
from node.blocks.values import BlockAddress, Obtained, Work
from node.runtime.fair_places import Client, current_demand
from node.runtime.single_flight import Ticket


@dataclass(slots=True)
class _Reading:
    """`holder`: the client to whom its place counts. `first`: the place is of a first block."""

    address: BlockAddress
    ticket: Ticket[Work, Obtained]
    holder: Client
    first: bool
    cold: bool = True


class ReadAhead:
    """The reads of one client. `close` must be called when the client's read ends in any way."""

    def __init__(self, fetcher: Fetcher, room: Room, blocks: Iterator[BlockAddress], *, urgent: bool) -> None:
        self.client = current_demand().first
        self._fetcher, self._room, self._urgent, self._blocks = fetcher, room, urgent, blocks
        self._shed: deque[BlockAddress] = deque()
        """Blocks that were read, and are read again because they left the room."""
        self._following = next(blocks, None)
        self._readings: deque[_Reading] = deque()
        self._warm = 0

    async def first(self) -> Obtained:
        """The next block for the client. Raises the error of its read."""
        await self._first_ended()
        obtained = await self._readings[0].ticket.wait()
        self._room.takes(self)
        return obtained

    async def ended_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._first_ended()
            return True
        return False

    async def _first_ended(self) -> None:
        self._room.took(self)
        if not self._readings and self._following is not None:
            self._begin(self._following, await self._room.take_first(self), first=True)
        while True:
            while self._following is not None and self._may_begin():
                self._begin(self._following, self.client, first=False)
            if self._readings[0].ticket.ended:
                return
            await self._fetcher.turned.park()

    def taken(self) -> None:
        """The client has the first block: free its place."""
        self._end(self._readings.popleft())

    def close(self) -> None:
        while self._readings:
            self.taken()
        self._room.left(self)
        self._fetcher.turned.unpark_all()

    def surplus(self) -> int:
        behind = islice(reversed(self._readings), max(0, len(self._readings) - 1))
        return sum(1 for _ in takewhile(lambda reading: reading.ticket.ended, behind))

    def shed(self) -> None:
        for _ in range(self.surplus()):
            reading = self._readings.pop()
            if self._following is not None:
                self._shed.appendleft(self._following)
            self._following = reading.address
            self._end(reading)

    def _begin(self, address: BlockAddress, holder: Client, *, first: bool) -> None:
        self._readings.append(_Reading(address, self._fetcher.begin(address, self._urgent), holder, first))
        self._following = self._shed.popleft() if self._shed else next(self._blocks, None)

    def _end(self, reading: _Reading) -> None:
        reading.ticket.release()
        self._room.give(reading.holder, first=reading.first)

    def _may_begin(self) -> bool:
        for reading in self._readings:
            if reading.cold and not self._fetcher.window.is_cold(reading.address.key):
                reading.cold = False
                self._warm += 1
        under_way = sum(not reading.ticket.ended for reading in self._readings)
        cold, warm, room = sum(reading.cold for reading in self._readings), self._warm, self._room
        wanted = room.has_room(self, len(self._readings), under_way=under_way, cold=cold, warm=warm)
        return wanted and room.take_more(self)
