"""A block's address, and what the parts of blocks/ share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cache.store import Held
from cache.tiered import Tiers
from node.blocks.trust import Trust
from node.exchange.contract import Exchange
from node.membership.view import View
from node.oci.references import Locator
from node.telemetry.sources import Source
from protocol.health import Health
from protocol.ids import BlockId, ObjectRef, PeerId, Shard
from protocol.placement import Placement

SILENCE_S = 1.5
"""A keeper that lives says `Waiting` three times in this time, also on a machine that is short of processor time."""


SMALL_SILENCE_S = 1.0
"""For questions that are answered from memory."""


LOOK_EVERY_S = 1.0
"""How often those who wait for a peer look whether it has taken too long, or turned out to have a bad link."""


Work = tuple[BlockId, int, bool, bool]


@dataclass(frozen=True, slots=True)
class BlockAddress:
    """A block, and where the origin has its object."""

    locator: Locator
    ref: ObjectRef
    index: int
    reader: str = ""
    """The member that reads it with a client's grant, where this node has none and the registry asks who reads."""
    background: bool = False
    """Nobody waits for it: only its home reads it from the origin, when that is not wanted for anything else."""

    @property
    def block(self) -> BlockId:
        return BlockId(self.ref.digest, self.index)

    @property
    def key(self) -> tuple[BlockId, int]:
        """A digest that somebody gives another size to is another object."""
        return self.block, self.ref.size

    @property
    def work(self) -> Work:
        """What is done once for all who want it: with a client's grant, or in the background, it is another thing."""
        return self.block, self.ref.size, bool(self.locator.grant or self.reader), self.background

    @property
    def length(self) -> int:
        return self.ref.block_length(self.index)


@dataclass(frozen=True, slots=True)
class Obtained:
    """A block, where it came from, and what that took: `seconds` where it was read for a client."""

    held: Held
    source: Source
    peers: tuple[PeerId, ...] = ()
    retries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Site:
    """What seeder and fetcher share of the node."""

    own: PeerId
    view: View
    placement: Callable[[], Placement]
    exchange: Exchange
    health: Health
    trust: Trust
    tiers: Tiers


def is_copy(shard: Shard) -> bool:
    """Whether the shard's bytes are the block itself."""
    return shard.k == 1 and (shard.index == 0 or shard.m == 1)


class CurrentPlacement:
    """The placement for the view as it is now, made anew when the view has changed."""

    def __init__(self, view: View, k: int, m: int) -> None:
        self._view, self._k, self._m = view, k, m
        self._version = -1
        self._placement = Placement(view.site, k, m)

    def __call__(self) -> Placement:
        if self._version != self._view.version:
            self._version = self._view.version
            self._placement = Placement(self._view.site, self._k, self._m)
        return self._placement
