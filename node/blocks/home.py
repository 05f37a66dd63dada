"""The home of a block: the one member that reads it from the upstream, once, however many members want it.

Rendezvous hashing ranks the homes of each block, as hashing assigns each object a home node in Squirrel (Iyer,
Rowstron, Druschel, PODC 2002). Any member can act as home: if those of a higher rank fail, or for its own client. A
home obtains the block from members that hold it, else from the upstream, and in that case signs its record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import trio

from cache.store import Askers, Held
from node.blocks.grants import Grants
from node.blocks.holders import Holders
from node.blocks.values import BlockAddress, Obtained, Site, Work
from node.identity.identity import Identity
from node.oci.references import Locator
from node.registry.batching import BatchedReads
from node.runtime.single_flight import SingleFlight
from node.telemetry.sources import Source
from protocol.errors import DeniedError, NotFoundError, UnavailableError
from protocol.home_times import HomeTimes
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, Piece
from protocol.records import Record, make_record

BACKGROUND_S = 60.0
"""Deadline for a background read, which also waits until clients are served. After it, the asker has to retry later."""


class Home:
    """`is_open`: whether everybody may read what an upstream gives to this node without a client's grant. `times`: how
    long homes take to read blocks from the upstream, this node among them."""

    def __init__(
        self,
        site: Site,
        holders: Holders,
        grants: Grants,
        *,
        origin: BatchedReads,
        is_open: Callable[[str], bool],
        identity: Identity,
        nursery: trio.Nursery,
    ) -> None:
        self._site, self._holders, self._grants = site, holders, grants
        self._origin, self._is_open = origin, is_open
        self._identity, self.times = identity, HomeTimes()
        self._reads: SingleFlight[Work, Obtained] = SingleFlight(nursery)

    async def find(self, address: BlockAddress, urgent: bool, warmed: Callable[[], None]) -> Obtained:
        """The last `BlockSource` of the fetcher: the node acts as home for its own client."""
        obtained = await self.block(address)
        self._site.tiers.claim(Piece(address.block))  # it may have joined a read on behalf of a member
        warmed()
        return obtained

    async def block(self, address: BlockAddress) -> Obtained:
        """The whole block, which is then also in the tiers if they have room. Concurrent calls share one read."""
        self._site.check_size(address.ref)
        held = await self._site.trusted(Piece(address.block), address.ref.size, address.kept_for)
        if held is not None:
            return Obtained(held[0], Source(held[1]))
        return await self._reads.do(address.work, lambda: self._obtain(address))

    async def _obtain(self, address: BlockAddress) -> Obtained:
        obtained = await self._holders.find(address)
        if obtained is None:
            began = trio.current_time()
            locator = self._grants.as_own_client(address).locator  # a client with a grant may have arrived meanwhile
            if address.background:
                data = await self._in_background(locator, address)
            else:
                data = await self._origin.read(locator, address.ref, address.index)
                self.times.came(address.length, began, trio.current_time())
            obtained = Obtained(self._signed(address, data), Source.ORIGIN)
            self._note_origin(locator, address.ref.digest)
        held = obtained.held
        await self._site.tiers.replace(Piece(address.block), held.data, held.record, kept_for=address.kept_for)
        return obtained

    def _note_origin(self, locator: Locator, digest: Digest) -> None:
        """Note how the upstream gave the object, before any tier or member has a part of it."""
        if locator.grant is None and self._is_open(locator.upstream):
            self._site.facts.given_to_all(digest)
        else:
            self._site.facts.granted(digest, locator)

    async def _in_background(self, locator: Locator, address: BlockAddress) -> bytearray:
        with trio.move_on_after(BACKGROUND_S):
            return await self._origin.read(locator, address.ref, address.index, background=True)
        raise UnavailableError(f"{locator.upstream}: the reads of clients go first")

    def _signed(self, address: BlockAddress, data: Buffer) -> Held:
        signer, sha = self._identity, sha256(data).digest()
        return Held(data, make_record(address.ref, address.index, sha, signer=signer.peer_id, sign=signer.sign))

    async def reread(self, address: BlockAddress) -> Held:
        """The block as the upstream itself sends it now, with this node's record. No mirror or held copy is used."""
        return self._signed(address, await self._origin.read_certain(address.locator, address.ref, address.index))

    async def verified(self, address: BlockAddress) -> Buffer:
        """The block from the upstream itself, certainly right: the whole object is read and compared with its digest.
        Raises CorruptObjectError."""
        return await self._origin.read_verified(address.locator, address.ref, address.index)

    async def deceived(self, address: BlockAddress, claim: Record) -> bool:
        """Whether a mirror of the upstream sends the bytes of the false `claim`, so that its signer may be honest."""
        try:  # without a grant: mirrors are not asked with one
            data = await self._origin.read(replace(address.locator, grant=None), address.ref, address.index)
        except (DeniedError, NotFoundError):
            return False
        return claim.matches(data)

    async def admit(self, locator: Locator, ref: ObjectRef, body: bytes, *, kept_for: Askers) -> None:
        """Store an object that was read from the upstream as a whole. The caller has checked its digest."""
        self._note_origin(locator, ref.digest)
        self._site.facts.verified(ref)
        for index in range(ref.block_count):
            address, start = BlockAddress(locator, ref, index), index * BLOCK_SIZE
            held = self._signed(address, body[start : start + address.length])
            await self._site.tiers.put(Piece(address.block), held.data, held.record, kept_for=kept_for)
