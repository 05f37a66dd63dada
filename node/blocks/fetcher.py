"""Reads blocks for clients of this node. It asks the sources of a stretch in order (`blocks` in node/assembly.py): the
tiers of this node, the keepers for k shards, and this node as home, which can ask the upstream.

Concurrent reads of one block share one result. The window limits how many blocks clients have under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import trio

from cache.tiered import Tiers
from node.blocks.values import BlockSource, Group, Miss, Obtained, Stretch, Taker
from node.runtime.fair_places import Demand
from node.runtime.shared_work import Flow, Order, SharedWork
from node.telemetry.sources import Source
from protocol.errors import UnavailableError
from protocol.window import ReadWindow


class HeldBlocks:
    """The first `BlockSource`: the tiers of this node."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    async def find(self, stretch: Stretch, taker: Taker) -> None:
        for index in stretch.indices:
            piece = stretch.piece(index)
            held = await self._tiers.get(piece, stretch.ref.size)
            self._tiers.claim(piece)
            if held is not None:
                taker.got(index, Obtained(held[0], Source(held[1])))


class Hungry(Protocol):
    """Somebody who would begin further reads, if the window had room."""

    def begin_more(self) -> None: ...


class Fetcher:
    def __init__(self, sources: Sequence[BlockSource], nursery: trio.Nursery) -> None:
        self._sources, self._nursery = sources, nursery
        self._reads: SharedWork[Group, Obtained] = SharedWork(nursery)
        self._hungry: dict[Hungry, None] = {}
        self._idle = trio.lowlevel.ParkingLot()
        self.window = ReadWindow()

    async def idle(self) -> None:
        """Returns when no client reads."""
        while self.window.busy:
            await self._idle.park()

    def begin(
        self,
        stretch: Stretch,
        urgent: bool,
        came: Callable[[int, Obtained], None],
        lost: Callable[[int, Exception], None] | None = None,
        *,
        demand: Demand | None = None,
    ) -> Order[Group, Obtained]:
        """Start reading blocks, or join the reads of them that are under way, as SharedWork.order."""
        now, group = trio.current_time(), stretch.group
        for index in stretch.indices:
            if (group, index) not in self._reads:
                self.window.began((group, index), now)
        work = partial(self._read, stretch, urgent)
        return self._reads.order(group, stretch.indices, work, came, lost=lost, demand=demand)

    def wait_for_room(self, reader: Hungry) -> None:
        """Have the reader try again once the window may have room."""
        self._hungry[reader] = None

    def forget(self, reader: Hungry) -> None:
        self._hungry.pop(reader, None)

    def turned(self) -> None:
        """The window, or the room for clients, has changed."""
        hungry, self._hungry = self._hungry, {}
        for reader in hungry:
            reader.begin_more()
        if not self.window.busy:
            self._idle.unpark_all()

    def ended(self, group: Group, index: int) -> None:
        self.window.ended((group, index), trio.current_time())

    async def _read(self, stretch: Stretch, urgent: bool, flow: Flow[Group, Obtained]) -> None:
        stretch = stretch.only(flow.left)
        taking = _Taking(self, self._nursery, flow, urgent)
        try:
            for source in self._sources:
                if not flow.left:
                    return
                await source.find(stretch.only(flow.left), taking)
            if flow.left:
                raise UnavailableError(f"no source has {stretch.only(flow.left)}")
        finally:
            if flow.left:
                for index in flow.left:
                    self.ended(flow.group, index)
                self.turned()


class _Taking:
    """The `Taker` of one read."""

    def __init__(
        self,
        fetcher: Fetcher,
        nursery: trio.Nursery,
        flow: Flow[Group, Obtained],
        urgent: bool,
    ) -> None:
        self._fetcher, self._nursery, self._flow = fetcher, nursery, flow
        self.urgent = urgent
        self._began = trio.current_time()
        self._misses: dict[int, list[Miss]] = {}

    def got(self, index: int, obtained: Obtained) -> None:
        if index not in self._flow.orders:
            return
        now, misses = trio.current_time(), self._misses.get(index, ())
        for miss in misses:
            self._nursery.start_soon(miss.compare, obtained)
        self._fetcher.window.warmed((self._flow.group, index), now)
        self._fetcher.ended(self._flow.group, index)
        retries = obtained.retries + sum(miss.retries for miss in misses)
        self._flow.deliver(index, obtained._replace(retries=retries, seconds=now - self._began))
        self._fetcher.turned()

    def missed(self, index: int, miss: Miss) -> None:
        self._misses.setdefault(index, []).append(miss)

    def warmed(self, index: int) -> None:
        if self._fetcher.window.warmed((self._flow.group, index), trio.current_time()):
            self._fetcher.turned()
