"""Reads whole blocks from their home while the processor of this node is what is scarce.

Shards from several keepers use thin links better, but cost twice the processor time. A processor that is scarce beside
links that are thin does not count: there whole blocks take longer and save nothing. If the home is far slower than
others, the next member acts for it, as for a keeper that wants its shard (node/blocks/keeper.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from node.blocks.keeper import Keeper, Sent
from node.blocks.values import BlockSource, Obtained, Site, Stretch, Taker
from node.telemetry.sources import Source
from protocol.errors import ShoalError
from protocol.ids import Shard
from protocol.placement import HOME_HOPS

log = logging.getLogger(__name__)

WHOLE = Shard(1, 1, 0)


class WholeReads:
    """A `BlockSource` in the place of `coded`, which it asks for what it does not obtain. In a site of several cells it
    leaves all to it: a home cannot serve all members of such a site."""

    def __init__(self, site: Site, keeper: Keeper, coded: BlockSource, is_busy: Callable[[], bool]) -> None:
        self._site, self._keeper, self._coded, self._is_busy = site, keeper, coded, is_busy

    async def find(self, stretch: Stretch, taker: Taker) -> None:
        route = self._site.placement().route(self._site.own, stretch.stripe, stretch.length)
        left = dict.fromkeys(stretch.indices)

        def got(index: int, sent: Sent) -> None:
            left.pop(index, None)
            held, peer = sent
            taker.got(index, Obtained(held, Source.PEER, (peer,) if peer != self._site.own else ()))

        if route.home != self._site.own and not route.depth and not stretch.background and self._is_busy():
            try:
                await self._keeper.own(stretch, WHOLE, HOME_HOPS, got)
            except ShoalError as error:
                log.debug("whole blocks of %s: %s", stretch, error)
        if left:
            await self._coded.find(stretch.only(left), taker)
