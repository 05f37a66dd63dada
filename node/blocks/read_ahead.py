"""Reads ahead for one client: the next blocks that it will take, in its order, are under way or already in memory.

Blocks of one stripe begin together. A late block delays the client but not the reads behind it. Later blocks are read
and kept in memory as far as the window (protocol/window.py) and the room for all clients (node/blocks/room.py) allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import trio

from node.blocks.fetcher import Fetcher
from node.blocks.room import Room
from node.blocks.values import Group, Obtained, Stretch
from node.oci.references import Locator
from node.runtime.fair_places import Client, current_demand
from node.runtime.shared_work import Order
from protocol.ids import ObjectRef
from protocol.stripes import stripe_number


@dataclass(slots=True, eq=False)
class _Reading:
    """`holder`: the client to whom its place counts. `first`: the place is of a first block."""

    index: int
    holder: Client
    first: bool
    order: Order[Group, Obtained] | None = None
    obtained: Obtained | None = None
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        return self.obtained is not None or self.error is not None


class ReadAhead:
    """The reads of one client, of the blocks `indices` in this order. `close` must be called when the client's read
    ends in any way."""

    def __init__(
        self, fetcher: Fetcher, room: Room, locator: Locator, ref: ObjectRef, indices: Iterable[int], *, urgent: bool
    ) -> None:
        self._demand = current_demand()
        self.client = self._demand.first
        self._fetcher, self._room, self._urgent = fetcher, room, urgent
        self._object = Stretch(locator, ref, ())
        self._group = self._object.group
        self._stretches = _in_stripes(indices, ref.block_count)
        self._next: deque[list[int]] = deque()
        """Blocks of one stripe each that begin next: the rest of a stripe, and blocks that left the room."""
        self._readings: deque[_Reading] = deque()
        self._under_way, self._warm = 0, 0
        self._cold: set[tuple[Group, int]] = set()
        self._wake = trio.lowlevel.ParkingLot()
        self._advance()

    def _advance(self) -> None:
        """Have the blocks that begin next in `_next`, if any are left."""
        while self._next and not self._next[0]:
            self._next.popleft()
        if not self._next and (following := next(self._stretches, None)) is not None:
            self._next.append(following)

    async def first(self) -> Obtained:
        """The next block for the client. Raises the error of its read."""
        await self._first_ended()
        reading = self._readings[0]
        if reading.obtained is None:
            error = reading.error
            assert error is not None
            # Several clients share the error: the same object raised in several tasks would chain their tracebacks.
            raise type(error)(*error.args) from error
        self._room.takes(self)
        return reading.obtained

    async def ended_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._first_ended()
            return True
        return False

    async def _first_ended(self) -> None:
        self._room.took(self)
        if not self._readings and self._next:
            first = await self._room.take_first(self)
            count = self._places(len(self._next[0]) - 1)
            self._begin([first] + [self.client] * count)
        self.begin_more()
        while not self._readings[0].ended:
            await self._wake.park()

    def taken(self) -> None:
        """The client has the first block: free its place."""
        self._end(self._readings.popleft())

    def close(self) -> None:
        self._fetcher.forget(self)
        self._next.clear()
        self._stretches = iter(())
        while self._readings:
            self.taken()
        self._room.left(self)
        self._fetcher.turned()

    def surplus(self) -> int:
        behind = islice(reversed(self._readings), max(0, len(self._readings) - 1))
        return sum(1 for _ in takewhile(lambda reading: reading.ended, behind))

    def shed(self) -> None:
        for _ in range(self.surplus()):
            reading = self._readings.pop()
            if self._next and self._next[0][0] == reading.index + 1:
                self._next[0].insert(0, reading.index)
            else:
                self._next.appendleft([reading.index])
            self._end(reading)

    def begin_more(self) -> None:
        """Begin the next stretches for which there is room."""
        while self._readings and self._next:
            wanted = len(self._next[0])
            if not self._may_begin():
                self._fetcher.wait_for_room(self)
                return
            places = self._places(wanted)
            if not places:
                self._fetcher.wait_for_room(self)
                return
            self._begin([self.client] * places)

    def _places(self, wanted: int) -> int:
        """Take up to `wanted` places; returns their number."""
        return sum(1 for _ in takewhile(lambda _: self._room.take_more(self), range(wanted)))

    def _begin(self, holders: list[Client]) -> None:
        """Begin the next blocks, one for each place."""
        indices = [self._next[0].pop(0) for _ in holders]
        is_first = not self._readings
        by_index = {
            index: _Reading(index, holder, first=is_first and number == 0)
            for number, (index, holder) in enumerate(zip(indices, holders, strict=True))
        }
        self._readings.extend(by_index.values())
        self._under_way += len(indices)
        self._cold.update((self._group, index) for index in indices)
        self._advance()

        def came(index: int, obtained: Obtained) -> None:
            by_index[index].obtained = obtained
            self._ended(by_index[index])

        def lost(index: int, error: Exception) -> None:
            by_index[index].error = error
            self._ended(by_index[index])
            self.begin_more()

        stretch = self._object.only(indices)
        order = self._fetcher.begin(stretch, self._urgent, came, lost, demand=self._demand)
        for reading in by_index.values():
            reading.order = order

    def _ended(self, reading: _Reading) -> None:
        self._under_way -= 1
        if self._readings and reading is self._readings[0]:
            self._wake.unpark_all()

    def _end(self, reading: _Reading) -> None:
        if reading.order is not None and not reading.ended:
            reading.order.drop(reading.index)
            self._under_way -= 1
        reading.order = reading.obtained = None  # the order refers to the reading: else the block stays until a gc run
        self._room.give(reading.holder, first=reading.first)

    def _may_begin(self) -> bool:
        before, self._cold = len(self._cold), self._fetcher.window.cold_among(self._cold)
        cold = len(self._cold)
        self._warm += before - cold
        return self._room.has_room(self, len(self._readings), under_way=self._under_way, cold=cold, warm=self._warm)


def _in_stripes(indices: Iterable[int], block_count: int) -> Iterator[list[int]]:
    """Cut the indices, in their order, into ascending lists of blocks of one stripe."""
    stretch: list[int] = []
    for index in indices:
        if stretch and (
            index <= stretch[-1] or stripe_number(index, block_count) != stripe_number(stretch[0], block_count)
        ):
            yield stretch
            stretch = []
        stretch.append(index)
    if stretch:
        yield stretch
