"""Values that the parts of blocks/ share: a block's address, the block once it is obtained, and the ways to obtain it.

The fetcher asks a list of `BlockSource`s in order. A new way to a block (a delta, a hub) is one more source.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from cache.store import READ_HERE, Askers, Held
from cache.tiered import Tier, Tiers
from node.blocks.object_facts import ObjectFacts
from node.blocks.trust import Trust
from node.exchange.contract import Exchange
from node.membership.membership import View
from node.oci.references import Locator
from node.telemetry.sources import Source
from protocol.errors import UnavailableError
from protocol.health import Health
from protocol.ids import BlockId, ObjectRef, PeerId, Piece, Shard
from protocol.placement import Placement

SILENCE_S = 1.5
"""Longest silence of a peer that was asked for a block or a shard. A peer that works sends `Waiting` three times in
this time, so that delays on a busy machine do no harm."""
SMALL_SILENCE_S = 1.0
"""The same for questions that a peer answers from memory."""
LOOK_EVERY_S = 1.0
"""Interval at which a read checks whether a peer takes too long, or was found to have a bad link meanwhile."""

Work = tuple[BlockId, int, bool, bool]


@dataclass(frozen=True, slots=True)
class BlockAddress:
    """A block, and the place of its object at the upstream."""

    locator: Locator
    ref: ObjectRef
    index: int
    reader: str = ""
    """Peer id of the member that reads the block with its client's grant; "" if the upstream asks for no grant, or
    `locator` has one."""
    background: bool = False
    """No client waits for the block. Only its home reads it from the upstream, while no client needs the connection."""
    kept_for: Askers = READ_HERE
    """The members on whose behalf this node obtains the block."""

    @property
    def block(self) -> BlockId:
        return BlockId(self.ref.digest, self.index)

    @property
    def key(self) -> tuple[BlockId, int]:
        """It includes the object's size: the same digest with another size names another object."""
        return self.block, self.ref.size

    @property
    def work(self) -> Work:
        """Reads with the same value share one result. Reads with a grant and background reads are kept apart."""
        return self.block, self.ref.size, bool(self.locator.grant or self.reader), self.background

    @property
    def length(self) -> int:
        return self.ref.block_length(self.index)


@dataclass(frozen=True, slots=True)
class Obtained:
    """A block, and how it was obtained. `peers` sent it or its shards; the fetcher sets `seconds`."""

    held: Held
    source: Source
    peers: tuple[PeerId, ...] = ()
    retries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Miss:
    """A failed attempt. Once a later source returns the block, the fetcher calls `compare` with it, to find the peers
    that sent wrong shards, and adds `retries` to the block's."""

    retries: int
    compare: Callable[[Obtained], Awaitable[None]]


class BlockSource(Protocol):
    """One way to obtain a block. The fetcher asks its sources in order, once for each block.

    - `find` returns the block. It returns None if this source does not have it, and a Miss if an attempt failed: then
      the next source is asked. It raises ShoalError if no further source shall be asked.
    - `urgent`: a client waits for this very block.
    - `warmed` must be called when the block is known to be in the site, before its last bytes arrive, so that the read
      window (protocol/window.py) lets the next block begin. A source that answers at once need not call it.
    - A block from other members or the upstream was offered to the tiers, and matches a record of a trusted signer.
    """

    async def find(self, address: BlockAddress, urgent: bool, warmed: Callable[[], None]) -> Obtained | Miss | None: ...


def is_copy(shard: Shard) -> bool:
    """Whether the shard's bytes are the block itself."""
    return shard.k == 1 and (shard.index == 0 or shard.m == 1)


class CurrentPlacement:
    """The placement for the current view. It is computed again after a view change."""

    def __init__(self, view: View, k: int, m: int) -> None:
        self._view, self._code = view, (k, m)
        self._version, self._placement = view.version, Placement(view.site, k, m)

    def __call__(self) -> Placement:
        if self._version != self._view.version:
            self._version, self._placement = self._view.version, Placement(self._view.site, *self._code)
        return self._placement


@dataclass(frozen=True, slots=True)
class Site:
    """The site as this node sees it, and what this node holds: shared by all parts of blocks/."""

    own: PeerId
    view: View
    placement: Callable[[], Placement]
    exchange: Exchange
    health: Health
    trust: Trust
    tiers: Tiers
    facts: ObjectFacts
    max_object: int
    """Bytes of the largest object that is read or kept."""

    def check_size(self, ref: ObjectRef) -> None:
        """Raises UnavailableError if the object is too large, or is known to have another size: sizes are claims."""
        if ref.size > self.max_object:
            raise UnavailableError(f"{ref.digest}: {ref.size} bytes are more than max_object")
        if self.facts.contradicts(ref):
            raise UnavailableError(f"{ref.digest} has {self.facts.size(ref.digest)} bytes, not {ref.size}")

    async def trusted(self, piece: Piece, size: int, kept_for: Askers) -> tuple[Held, Tier] | None:
        """A held piece, if this node trusts its signer, and of a shard also its maker: other members may not know an
        unknown one either. It is read on behalf of `kept_for`."""
        held = await self.tiers.get(piece, size, kept_for=kept_for)
        if held is None or not self.trust.accepts(held[0].record.signer):
            return None
        proof = held[0].proof
        return held if piece.shard is None or (proof is not None and self.trust.accepts(proof.maker)) else None
