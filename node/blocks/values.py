"""Values that the parts of blocks/ share: addresses of blocks, a block once it is obtained, and the ways to obtain it.

The fetcher asks a list of `BlockSource`s in order. A new way to blocks (a delta, a hub) is one more source.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import trio

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
from protocol.ids import BlockId, Buffer, Digest, ObjectRef, PeerId, Piece, Shard
from protocol.placement import Placement
from protocol.records import Record
from protocol.shard_proofs import ShardProof
from protocol.stripes import StripeId, stripe_number

SILENCE_S = 1.5
"""Longest silence of a peer that was asked for a block or a shard. A peer that works sends `Waiting` three times in
this time, so that delays on a busy machine do no harm."""
SMALL_SILENCE_S = 1.0
"""The same for questions that a peer answers from memory."""
LOOK_EVERY_S = 1.0
"""Interval at which a read checks whether a peer takes too long, or was found to have a bad link meanwhile."""
MOST_STORING = 16
"""Pieces that wait for the disk before new reads do."""

Group = tuple[Digest, int, bool, bool]


@dataclass(frozen=True, slots=True)
class BlockAddress:
    """A block, and the place of its object at the upstream."""

    locator: Locator
    ref: ObjectRef
    index: int

    @property
    def block(self) -> BlockId:
        return BlockId(self.ref.digest, self.index)

    @property
    def length(self) -> int:
        return self.ref.block_length(self.index)


class Stretch(NamedTuple):
    """Blocks of one stripe in ascending order, and the place of their object at the upstream."""

    locator: Locator
    ref: ObjectRef
    indices: tuple[int, ...]
    reader: str = ""
    """Peer id of the member that reads the blocks with its client's grant; "" if the upstream asks for no grant, or
    `locator` has one."""
    background: bool = False
    """No client waits for the blocks. Only their home reads them from the upstream, while no client needs the
    connection."""
    kept_for: Askers = READ_HERE
    """The members on whose behalf this node obtains the blocks."""

    @property
    def stripe(self) -> StripeId:
        return StripeId(self.ref.digest, stripe_number(self.indices[0], self.ref.block_count))

    @property
    def length(self) -> int:
        """Bytes of the longest block."""
        return self.ref.block_length(self.indices[0])

    @property
    def group(self) -> Group:
        """Reads of a block in the same group share one result. Reads with a grant and background reads are kept apart.
        It includes the object's size: the same digest with another size names another object."""
        return self.ref.digest, self.ref.size, bool(self.locator.grant or self.reader), self.background

    def block(self, index: int) -> BlockId:
        return BlockId(self.ref.digest, index)

    def piece(self, index: int, shard: Shard | None = None) -> Piece:
        return Piece(self.block(index), shard)

    def only(self, indices: Iterable[int]) -> Stretch:
        return self._replace(indices=tuple(indices))

    def __str__(self) -> str:
        return f"{self.ref.digest} #{self.indices[0]}-{self.indices[-1]}"


class Obtained(NamedTuple):
    """A block, and how it was obtained. `peers` sent it or its shards; the fetcher sets `seconds`."""

    held: Held
    source: Source
    peers: tuple[PeerId, ...] = ()
    retries: int = 0
    seconds: float = 0.0
    way: str = ""
    """As `Choice.text` of protocol/ways.py."""


@dataclass(frozen=True, slots=True)
class Miss:
    """A failed attempt. Once a later source returns the block, `compare` is called with it, to find the peers that sent
    wrong shards, and `retries` are added to the block's."""

    retries: int
    compare: Callable[[Obtained], Awaitable[None]]


class Taker(Protocol):
    """Receives what the sources of a stretch obtain. `urgent`: a client waits for these very blocks.

    - `got`: the block was offered to the tiers, and unless they had it, it matches a record of a trusted signer.
    - `missed`: an attempt to obtain the block failed.
    - `warmed`: the block is known to be in the site, before its last bytes arrive, so that the read window
      (protocol/window.py) lets other blocks begin. `got` says so too.
    """

    urgent: bool

    def got(self, index: int, obtained: Obtained) -> None: ...

    def missed(self, index: int, miss: Miss) -> None: ...

    def warmed(self, index: int) -> None: ...


class BlockSource(Protocol):
    """One way to obtain blocks. The fetcher asks its sources in order for the blocks that are left.

    `find` returns once the source has given all that it has of the stretch to the taker. It raises ShoalError if no
    further source shall be asked.
    """

    async def find(self, stretch: Stretch, taker: Taker) -> None: ...


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


class Storing:
    """Pieces that wait for the disk, in tasks. New reads wait while there are MOST_STORING of them, so that a disk that
    stalls stops reads instead of filling the memory."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery, self._count = nursery, 0
        self._fewer = trio.lowlevel.ParkingLot()

    def start(self, store: Callable[[], Awaitable[None]]) -> None:
        self._count += 1
        self._nursery.start_soon(self._run, store)

    async def _run(self, store: Callable[[], Awaitable[None]]) -> None:
        try:
            await store()
        finally:
            self._count -= 1
            self._fewer.unpark_all()

    async def room(self) -> None:
        """Wait until a read may begin."""
        while self._count >= MOST_STORING:
            await self._fewer.park()


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
    nursery: trio.Nursery
    """For tasks that outlive a request."""
    storing: Storing

    def check_size(self, ref: ObjectRef) -> None:
        """Raises UnavailableError if the object is too large, or is known to have another size: sizes are claims."""
        if ref.size > self.max_object:
            raise UnavailableError(f"{ref.digest}: {ref.size} bytes are more than max_object")
        if self.facts.contradicts(ref):
            raise UnavailableError(f"{ref.digest} has {self.facts.size(ref.digest)} bytes, not {ref.size}")

    def is_trusted(self, piece: Piece, held: Held) -> bool:
        """Whether this node trusts the signer of a held piece, and of a shard also its maker: other members may not
        know an unknown one either."""
        if not self.trust.accepts(held.record.signer):
            return False
        return piece.shard is None or (held.proof is not None and self.trust.accepts(held.proof.maker))

    async def trusted(self, piece: Piece, size: int, kept_for: Askers) -> tuple[Held, Tier] | None:
        """A held piece that `is_trusted`, read on behalf of `kept_for`."""
        held = await self.tiers.get(piece, size, kept_for=kept_for)
        return held if held is not None and self.is_trusted(piece, held[0]) else None

    def keep(
        self, piece: Piece, data: Buffer, record: Record, proof: ShardProof | None = None, *, kept_for: Askers
    ) -> None:
        """Offer a piece to the tiers, now if they have room, else in a task of its own. A held piece is replaced: it
        is of an object of another size, or its signer or maker is not trusted."""
        if self.tiers.holds(piece):
            self.storing.start(partial(self.tiers.replace, piece, data, record, proof, kept_for=kept_for))
        elif not self.tiers.put_nowait(piece, data, record, proof, kept_for=kept_for):
            self.storing.start(partial(self.tiers.put, piece, data, record, proof, kept_for=kept_for))
