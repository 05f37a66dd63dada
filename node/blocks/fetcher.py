"""Reads blocks for clients of this node. It asks the sources of a block in order (`blocks` in node/assembly.py): the
tiers of this node, the keepers for k shards, and this node as home, which can ask the upstream.

Concurrent reads of one block share one result. The window limits how many blocks clients have under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import trio

from cache.tiered import Tiers
from node.blocks.values import BlockAddress, BlockSource, Miss, Obtained, Work
from node.runtime.single_flight import SingleFlight, Ticket
from node.telemetry.sources import Source
from protocol.errors import UnavailableError
from protocol.ids import Piece
from protocol.window import ReadWindow


class HeldBlocks:
    """The first `BlockSource`: the tiers of this node."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    async def find(self, address: BlockAddress, urgent: bool, warmed: Callable[[], None]) -> Obtained | None:
        held = await self._tiers.get(Piece(address.block), address.ref.size)
        self._tiers.claim(Piece(address.block))
        return Obtained(held[0], Source(held[1])) if held is not None else None


class Fetcher:
    def __init__(self, sources: Sequence[BlockSource], nursery: trio.Nursery) -> None:
        self._sources = sources
        self._reads: SingleFlight[Work, Obtained] = SingleFlight(nursery)
        self.window = ReadWindow()
        self.turned = trio.lowlevel.ParkingLot()
        """Wakes tasks when the read of a block ends, a block reaches the site, or the read of a client ends."""

    async def idle(self) -> None:
        """Returns when no client reads."""
        while self.window.busy:
            await self.turned.park()

    def begin(self, address: BlockAddress, urgent: bool) -> Ticket[Work, Obtained]:
        """Start reading a block, or join the read of it that is under way. The ticket's `wait` raises ShoalError."""
        if address.work not in self._reads:
            self.window.began(address.key, trio.current_time())
        return self._reads.join(address.work, lambda: self._read(address, urgent))

    async def _read(self, address: BlockAddress, urgent: bool) -> Obtained:
        began, misses = trio.current_time(), list[Miss]()
        warmed = partial(self._warmed, address)
        try:
            for source in self._sources:
                obtained = await source.find(address, urgent, warmed)
                if isinstance(obtained, Miss):
                    misses.append(obtained)
                elif obtained is not None:
                    for miss in misses:
                        await miss.compare(obtained)
                    retries = obtained.retries + sum(miss.retries for miss in misses)
                    return replace(obtained, retries=retries, seconds=trio.current_time() - began)
            raise UnavailableError(f"no source has {address.block}")
        finally:
            self.window.ended(address.key, trio.current_time())
            self.turned.unpark_all()

    def _warmed(self, address: BlockAddress) -> None:
        if self.window.warmed(address.key, trio.current_time()):
            self.turned.unpark_all()
