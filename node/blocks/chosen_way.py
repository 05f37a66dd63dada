"""The way through the site, or straight to the registry where that is faster and the configuration prefers it.

protocol/ways.py decides, from what both ways gave lately. Blocks from the registry are signed, held and served to other
members like those that a home reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from node.blocks.home import Home
from node.blocks.values import BlockSource, Miss, Obtained, Stretch, Taker
from node.registry.contract import RegistryNews
from protocol.errors import ShoalError
from protocol.ways import ALWAYS_SITE, Way

log = logging.getLogger(__name__)


class ChosenWay:
    """A `BlockSource` in the place of `site`, which obtains blocks from other members."""

    def __init__(self, site: BlockSource, home: Home, news: RegistryNews, nodes: Callable[[], int]) -> None:
        """`nodes` returns the number of nodes of the site."""
        self._site, self._home, self._news, self._nodes = site, home, news, nodes

    async def find(self, stretch: Stretch, taker: Taker) -> None:
        upstream = stretch.locator.upstream
        choice = ALWAYS_SITE
        if not stretch.background:
            choice = self._news.choose(upstream, _size(stretch), self._nodes())
        if choice == ALWAYS_SITE:
            await self._site.find(stretch, taker)
            return
        marking = _Marking(taker, stretch, choice.text)
        if choice.way is Way.REGISTRY:
            try:
                await self._home.straight(stretch, marking.got)
            except ShoalError as error:
                log.debug("%s goes through the site: %s", stretch, error)
        if marking.left:
            left, gauge = stretch.only(marking.left), self._news.ways(upstream).site
            reading = gauge.begin(_size(left), trio.current_time())
            marking.count = lambda count: reading.came(count, trio.current_time())
            try:
                await self._site.find(left, marking)
            finally:
                reading.ended(trio.current_time())


class _Marking:
    """A `Taker` that marks blocks with their way, and counts their bytes."""

    def __init__(self, taker: Taker, stretch: Stretch, way: str) -> None:
        self._taker, self._stretch, self._way = taker, stretch, way
        self.urgent = taker.urgent
        self.left = dict.fromkeys(stretch.indices)
        self.count: Callable[[int], None] = lambda _: None

    def got(self, index: int, obtained: Obtained) -> None:
        self.left.pop(index, None)
        self.count(self._stretch.ref.block_length(index))
        self._taker.got(index, obtained._replace(way=self._way))

    def missed(self, index: int, miss: Miss) -> None:
        self._taker.missed(index, miss)

    def warmed(self, index: int) -> None:
        self._taker.warmed(index)


def _size(stretch: Stretch) -> int:
    return sum(map(stretch.ref.block_length, stretch.indices))
