"""Verification of whole objects against their digests, and the repair of those that are wrong.

A block is accepted if it matches a record that a member signed. Once all blocks of an object are held, the digest shows
whether these records are true. If they are not, each block is compared with the registry's own, false blocks are
replaced, and the members that signed them are quarantined (docs/SECURITY.md, S-05).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from zlib import crc32

import trio
from cachetools import LRUCache, TTLCache

from cache.store import READ_HERE
from node.blocks.fetcher import Fetcher
from node.blocks.held_objects import hash_held, holds_all
from node.blocks.home import Home
from node.blocks.trust import Suspicion
from node.blocks.values import BlockAddress, Site
from node.oci.references import Locator
from protocol.errors import CorruptObjectError, ShoalError
from protocol.ids import Buffer, Digest, ObjectRef, PeerId, Piece
from protocol.records import Record

log = logging.getLogger(__name__)

MAX_CHECKS = 64
"""Objects that were read in parts and wait for a check. Others are checked after a later read of a part of them."""
MAX_LATELY = 4096
"""Objects for which the time of the last check is remembered."""
MAX_DIFFERING = 16
"""Objects of which a block differed from the registry's, and that are not right yet."""
CHECK_AGAIN_S = 3600.0
"""Shortest time between two checks of an object: blocks that arrived since may be false, but a check reads all."""
REPAIRS = 3
"""Attempts to make an object right: while one runs, the judge may drop what the one before it has read."""
CHECKPOINT_EVERY = 1024
"""Blocks that are looked for in one turn of the loop, 5 ms."""
CHECK_PAUSE_S = 1.0
"""Longest wait before each block of a background check while clients read."""


class ObjectVerifier:
    """`finished` is called with each object that is held and right."""

    def __init__(self, site: Site, home: Home, fetcher: Fetcher, finished: Callable[[ObjectRef], None]) -> None:
        self._site, self._home, self._fetcher, self._finished = site, home, fetcher, finished
        self._check_later, self._to_check = trio.open_memory_channel[tuple[Locator, ObjectRef]](MAX_CHECKS)
        self._lately: TTLCache[Digest, None] = TTLCache(MAX_LATELY, CHECK_AGAIN_S, timer=trio.current_time)
        self._differing: LRUCache[ObjectRef, dict[PeerId, Record]] = LRUCache(MAX_DIFFERING)
        """By signer, a record that differs from the registry's block. This proves it false once the object is right."""

    def read_in_part(self, locator: Locator, ref: ObjectRef) -> None:
        """Queue a background check of an object if all of it is held: parts of it were sent to a client unchecked."""
        if holds_all(self._site.tiers, ref) and ref.digest not in self._lately:
            try:
                self._check_later.send_nowait((locator, ref))
                self._lately[ref.digest] = None
            except trio.WouldBlock:
                log.debug("too many objects wait to be checked: %s is not", ref.digest)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Check the queued objects one after the other, until cancelled."""
        task_status.started()
        async for locator, ref in self._to_check:
            hashed = await hash_held(self._site.tiers, ref, self._pause)
            try:
                if hashed is not None:
                    await self.check(locator, ref, hashed[0])
            except ShoalError as error:
                log.warning("%s, of which clients have read parts: %s", ref.digest, error)

    async def _pause(self) -> None:
        with trio.move_on_after(CHECK_PAUSE_S):
            await self._fetcher.idle()

    async def check(self, locator: Locator, ref: ObjectRef, computed: str, given: int = 0) -> Buffer | None:
        """Accept or repair an object whose blocks were all read and hash to `computed` (hexadecimal). A client has
        received the first `given` blocks. If only others were false, they are replaced, and the last block is returned.
        Raises CorruptObjectError."""
        last = None
        if computed != ref.digest.hex:
            log.error("%s has wrong bytes: reading it again from the registry", ref.digest)
            for _ in range(REPAIRS if given == 0 else 1):
                if (last := await self._repair(locator, ref, given)) is not None:
                    break
            else:
                for claim in self._differing.get(ref, {}).values():
                    self._site.trust.suspect(Suspicion(claim, str(locator)))
                raise CorruptObjectError(f"{ref.digest}: its blocks do not make the object; false blocks are dropped")
        self._site.facts.verified(ref)
        self._site.tiers.seal(ref)
        self._finished(ref)
        await self._accuse(locator, ref)
        return last

    async def _accuse(self, locator: Locator, ref: ObjectRef) -> None:
        """The object is right, so the records that differ from its blocks are certainly false."""
        for claim in self._differing.pop(ref, {}).values():
            held = await self._site.tiers.get(Piece(ref.block(claim.index)), ref.size)
            if held is not None and held[0].record.sha256 != claim.sha256:
                self._site.trust.suspect(Suspicion(claim, str(locator), proven=True))

    async def _repair(self, locator: Locator, ref: ObjectRef, given: int) -> Buffer | None:
        """Compare blocks with the registry's and replace the false ones, until all of them make the object. The signer
        of a false block is quarantined, and the other blocks that it signed are compared next. Returns the last block
        if all blocks make the object now. If one of the first `given` blocks was false, the read fails in any case:
        then the liar's blocks are dropped. One that is not held any more counts as false: the judge drops blocks of a
        liar at any time."""
        claims: dict[int, Record] = {}
        for index in range(ref.block_count):
            if index % CHECKPOINT_EVERY == 0:
                await trio.lowlevel.checkpoint()  # a block that no tier holds costs no checkpoint
            if (block := await self._site.tiers.get(Piece(ref.block(index)), ref.size)) is not None:
                claims[index] = block[0].record
        # All nodes of a site read a false object at about the same time. They begin at different blocks, so that one
        # node soon compares a false one.
        begin = crc32(self._site.own.encode()) % ref.block_count
        left = sorted(claims, key=lambda index: (index - begin) % ref.block_count)
        first_false = next((index for index in range(given) if index not in claims), ref.block_count)
        if len(claims) < ref.block_count and first_false >= given and (last := await self._completed(locator, ref)):
            return last
        while left:
            index = next((number for number in left if self._is_doubtful(claims[number])), left[0])
            left.remove(index)
            is_false = await self._compare(BlockAddress(locator, ref, index), claims[index])
            first_false = min(first_false, index if is_false else ref.block_count)
            if not self._is_doubtful(claims[index]):
                continue
            if first_false < given:
                signed = await self._site.tiers.signed_by(claims[index].signer, ref.digest)
                for piece, record in signed.items():
                    if record.object == ref:
                        await self._site.tiers.discard(piece)
                return None
            if not any(self._is_doubtful(claims[number]) for number in left) and (last := await self._if_right(ref)):
                return last
        return await self._completed(locator, ref) if first_false >= given else None

    def _is_doubtful(self, record: Record) -> bool:
        return not self._site.trust.accepts(record.signer)

    async def _compare(self, address: BlockAddress, claim: Record) -> bool:
        """Whether a claim is false. If so, replace the block by the registry's and quarantine the claim's signer."""
        ref, piece = address.ref, Piece(address.block)
        try:
            truth = await self._home.reread(address)
            is_false = claim.sha256 != truth.record.sha256
            deceived = is_false and await self._home.deceived(address, claim)
        except ShoalError as error:
            log.warning("%s #%d cannot be compared, and is dropped: %s", ref.digest, address.index, error)
            await self._site.tiers.discard(piece)
            return False
        if is_false or not self._site.tiers.holds(piece):
            await self._site.tiers.discard(piece)
            await self._site.tiers.put(piece, truth.data, truth.record, kept_for=READ_HERE)
        if deceived:
            log.error("%s #%d: a mirror of %s sends wrong bytes", ref.digest, address.index, address.locator.upstream)
        elif is_false and claim.signer != self._site.own:
            self._site.view.quarantine(claim.signer, f"signed a false record of {ref.digest} #{address.index}")
            self._differing.setdefault(ref, {})[claim.signer] = claim
        return is_false

    async def _completed(self, locator: Locator, ref: ObjectRef) -> Buffer | None:
        """As `_if_right`, after the missing blocks were read from the registry."""
        for index in range(ref.block_count):
            if index % CHECKPOINT_EVERY == 0:
                await trio.lowlevel.checkpoint()
            piece = Piece(ref.block(index))
            if self._site.tiers.holds(piece):
                continue
            try:
                truth = await self._home.reread(BlockAddress(locator, ref, index))
            except ShoalError as error:
                log.warning("%s #%d was dropped and cannot be read again: %s", ref.digest, index, error)
                return None
            await self._site.tiers.put(piece, truth.data, truth.record, kept_for=READ_HERE)
        return await self._if_right(ref)

    async def _if_right(self, ref: ObjectRef) -> Buffer | None:
        """The last block, if all blocks are held and make the object."""
        hashed = await hash_held(self._site.tiers, ref)
        return hashed[1] if hashed is not None and hashed[0] == ref.digest.hex else None
