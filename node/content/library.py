"""The node's answer to its clients: names by node/content/resolver.py, bytes block by block, with read-ahead."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, closing, nullcontext
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO
from zlib import crc32

import trio
from cachetools import TTLCache

from cache.store import Buffer, Held
from node.blocks.fetcher import Fetcher
from node.blocks.grants import Grants
from node.blocks.home import Home
from node.blocks.read_ahead import ReadAhead, Room
from node.blocks.trust import Suspicion
from node.blocks.values import BlockAddress, Obtained, Site
from node.content.resolver import Names
from node.oci.manifests import MAX_MANIFEST, Resolved
from node.oci.references import Locator
from node.telemetry.metrics import Metrics
from node.telemetry.provenance import Ledger, Read
from node.telemetry.sources import Source
from protocol.errors import CorruptObjectError, ShoalError, UnavailableError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId, Piece
from protocol.records import Record

log = logging.getLogger(__name__)

HEAD_WAIT_S = 20.0
"""A client waits little longer for the head of an answer, but much longer for the next byte of a body: while the first
block is still on its way then, the answer begins without it."""
CHECKED_FIRST = 4 << 20
"""Bytes of an object of which nothing is given before all of it is right; tests/benchmarks/check_first.py measures
what that costs. Of a larger object a client gets its last block only then."""
CHECK_S = 60.0
"""Where a small object takes longer it is given like a large one: clients wait some minutes for the next byte."""

MAX_LATELY = 4096
MAX_CHECKS = 64
"""Objects that were given in parts and wait to be checked; those beyond are when a part of them is read again."""
CHECK_AGAIN_S = 3600.0
"""Each is checked at most once in this time: what came since may be false, but a look reads all of it."""
CHECK_PAUSE_S = 1.0
"""A block of such an object waits for so long while clients read."""

Finished = Callable[[ObjectRef], None]


class SiteLibrary:
    """Implements node/content/contract.py's Library over the site and the registry."""

    def __init__(
        self, site: Site, names: Names, home: Home, grants: Grants, fetcher: Fetcher, ledger: Ledger, metrics: Metrics,
        finished: Finished,
    ) -> None:  # fmt: skip
        self._site, self._names, self._home, self._grants, self._fetcher = site, names, home, grants, fetcher
        self._ledger, self._metrics, self._finished = ledger, metrics, finished
        self._room = Room()
        self._check_later, self._to_check = trio.open_memory_channel[tuple[Locator, ObjectRef]](MAX_CHECKS)
        self._lately: TTLCache[Digest, None] = TTLCache(MAX_LATELY, CHECK_AGAIN_S, timer=trio.current_time)

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        found = await self._names.resolve(locator, reference)
        if locator.kind == "blobs" or found.ref.size > MAX_MANIFEST:
            return found
        if (typed := self._names.typed(found)) is not None:
            return typed
        # A member may have told it: clients go by the type before they have the bytes.
        try:
            body = await self._manifest(locator, found.ref)
        except UnavailableError as error:
            log.debug("%s is not looked at: %s", found.ref.digest, error)
        else:
            self._names.look_at(locator, reference, found, body)
        # What cannot be read or told by its bytes is doubted by now, and the registry itself asked.
        return self._names.typed(found) or await self._names.resolve(locator, reference)

    async def _manifest(self, locator: Locator, ref: ObjectRef) -> bytes:
        """Checked. Raises as `read`."""
        parts = []
        with self._grants.granted(locator, ref.digest) if locator.grant else nullcontext():
            async with aclosing(self._look_over(locator, ref, {}, whole=True)) as waits:
                async for _ in waits:
                    raise UnavailableError("it takes too long")
        for index in range(ref.block_count):
            found = await self._site.tiers.get(Piece(ref.block(index)), ref.size)
            if found is None:
                raise UnavailableError("no tier keeps it")
            parts.append(found[0].data)
        body = b"".join(parts)
        if hashlib.new(ref.digest.algorithm, body).hexdigest() != ref.digest.hex:
            raise CorruptObjectError(f"{ref.digest} came again with other bytes")
        return body

    async def read(
        self, locator: Locator, ref: ObjectRef, start: int, stop: int, *more: tuple[int, int]
    ) -> AsyncGenerator[Buffer, None]:
        if stop <= start:
            return
        spans = ((start, stop), *more)
        whole = spans == ((0, ref.size),)
        seen: dict[int, Obtained] = {}
        with self._grants.granted(locator, ref.digest) if locator.grant else nullcontext():
            if ref.size <= CHECKED_FIRST and not (whole and ref.block_count == 1):
                async with aclosing(self._look_over(locator, ref, seen, whole=whole)) as waits:
                    async for _ in waits:
                        yield b""
            async with aclosing(self._give(locator, ref, spans, seen, whole=whole)) as chunks:
                async for chunk in chunks:
                    yield chunk
        if not whole and ref.size > CHECKED_FIRST:
            self._given_in_part(locator, ref)

    # What was given in parts, each by its record alone

    def _given_in_part(self, locator: Locator, ref: ObjectRef) -> None:
        held = self._site.tiers.holdings(ref.digest).blocks
        if held == (1 << ref.block_count) - 1 and ref.digest not in self._lately:
            try:
                self._check_later.send_nowait((locator, ref))
                self._lately[ref.digest] = None
            except trio.WouldBlock:
                log.debug("too many objects wait to be checked: %s is not", ref.digest)

    async def check_parts(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Checks what was given in parts, once all of it is held, one by one. Runs until it is cancelled."""
        task_status.started()
        async for locator, ref in self._to_check:
            found = await self._hash_held(ref)
            try:
                if found is not None:
                    await self.check(locator, ref, found)
            except ShoalError as error:
                log.warning("%s, of which parts were given: %s", ref.digest, error)

    async def _hash_held(self, ref: ObjectRef) -> str | None:
        """In hexadecimal; None where not all of it is held any more."""
        hasher = hashlib.new(ref.digest.algorithm)
        for index in range(ref.block_count):
            with trio.move_on_after(CHECK_PAUSE_S):
                await self._fetcher.idle()
            found = await self._site.tiers.get(Piece(ref.block(index)), ref.size, to_memory=False)
            if found is None:
                return None
            hasher.update(found[0].data)
        return hasher.hexdigest()

    # How it is given

    async def _look_over(
        self, locator: Locator, ref: ObjectRef, seen: dict[int, Obtained], *, whole: bool
    ) -> AsyncGenerator[None, None]:
        """Have a small object come, and note in `seen` how each block did, without its bytes, if they are right: those
        are in the tiers then. Yields where a client would wait too long for the head of an answer or its next byte.

        Raises CorruptObjectError. Nothing is noted where it takes too long, was put right just now, or where what is
        not `whole` wanted has blocks that nobody can give.
        """
        hasher = hashlib.new(ref.digest.algorithm)
        came: dict[int, Obtained] = {}
        began = told = trio.current_time()
        with closing(self._ahead(locator, ref, range(ref.block_count), urgent=ref.block_count == 1)) as ahead:
            for index in range(ref.block_count):
                if not await ahead.ended_within(max(0.0, told + HEAD_WAIT_S - trio.current_time())):
                    yield
                    told = trio.current_time()
                    if told > began + CHECK_S:
                        return
                try:
                    obtained = await ahead.first()
                except UnavailableError:
                    if whole:
                        self._names.doubt(locator, ref)
                        raise
                    return
                hasher.update(obtained.held.data)
                came[index] = replace(obtained, held=Held(b"", obtained.held.record))
                ahead.taken()
        if await self.check(locator, ref, hasher.hexdigest()) is None:
            seen.update(came)

    async def _give(
        self, locator: Locator, ref: ObjectRef, spans: Sequence[tuple[int, int]], seen: Mapping[int, Obtained], *,
        whole: bool,
    ) -> AsyncGenerator[Buffer, None]:  # fmt: skip
        """The bytes of the spans; of blocks that were `seen` to be right exactly those."""
        hasher = hashlib.new(ref.digest.algorithm) if whole and not seen else None
        parts: list[bytes] = []
        last = ref.block_count - 1
        extent = max(stop for _, stop in spans) - min(start for start, _ in spans)
        indices = (index for index, _ in _by_block(spans))
        with closing(self._ahead(locator, ref, indices, urgent=extent <= BLOCK_SIZE)) as ahead:
            if not await ahead.ended_within(HEAD_WAIT_S):
                yield b""
            for index, wanted in _by_block(spans):
                try:
                    obtained = await ahead.first()
                except UnavailableError:
                    self._names.doubt(locator, ref)
                    raise
                data, first = obtained.held.data, seen.get(index, obtained)
                if first is not obtained and first.held.record.sha256 != obtained.held.record.sha256:
                    raise CorruptObjectError(f"{ref.digest} #{index} was right, and came again with other bytes")
                self._note(BlockAddress(locator, ref, index), first, sum(part.stop - part.start for part in wanted))
                if hasher is not None:
                    hasher.update(data)
                    if index == last:
                        data = await self.check(locator, ref, hasher.hexdigest(), given=last) or data
                if whole and locator.kind == "manifests" and ref.size <= MAX_MANIFEST:
                    parts.append(bytes(data))
                    if index == last:
                        self._names.learn(locator, b"".join(parts))
                for part in wanted:
                    yield memoryview(data)[part]
                del data, obtained, first
                ahead.taken()

    def _ahead(self, locator: Locator, ref: ObjectRef, indices: Iterable[int], *, urgent: bool) -> ReadAhead:
        blocks = (BlockAddress(locator, ref, index) for index in indices)
        return ReadAhead(self._fetcher, self._room, blocks, urgent=urgent)

    def sealed(self, digest: Digest, start: int, stop: int) -> AbstractContextManager[BinaryIO] | None:
        found = self._site.tiers.open_sealed(digest)
        if found is None:
            return None
        file, tier = found
        self._note_range(digest, start, stop, Read(Source(tier), 0.0, 0, (), time.time()))
        return file

    def _note(self, address: BlockAddress, obtained: Obtained, served: int) -> None:
        self._metrics.read(obtained.source, obtained.seconds)
        for _ in range(obtained.retries):
            self._metrics.retried(obtained.source)
        read = Read(obtained.source, obtained.seconds, obtained.retries, obtained.peers, time.time())
        self._ledger.note(address.ref.digest, address.index, read, served)

    def _note_range(self, digest: Digest, start: int, stop: int, read: Read) -> None:
        for index, (part,) in _by_block([(start, stop)]):
            self._ledger.note(digest, index, read, part.stop - part.start)

    async def check(self, locator: Locator, ref: ObjectRef, found: str, given: int = 0) -> Buffer | None:
        """All blocks were read and hash to `found`: are these the bytes that the digest names? A client has got the
        first `given` of them. Where they were not, and only others of them were wrong, these are right now and the last
        block is returned. Raises CorruptObjectError."""
        last = None
        if found != ref.digest.hex:
            log.error("%s came with wrong bytes: reading it again from the registry", ref.digest)
            last = await self._repair(locator, ref, given)
            if last is None:
                raise CorruptObjectError(f"{ref.digest}: its blocks did not make the object; they were dropped")
        self._site.tiers.seal(ref)
        self._finished(ref)
        return last

    async def _repair(self, locator: Locator, ref: ObjectRef, given: int) -> Buffer | None:
        """Compare blocks with the registry's and replace those that are false, until all make the object; who signed
        one is quarantined, and what else it signed is compared next.

        Returns the last block where none of the first `given` was false, and all of them make the object now. Where one
        of a liar was among them the read breaks off whatever the others are: the liar's are dropped.
        """
        claims = await self._claims(ref)
        # The nodes of a site, which find out together, begin at different blocks: one of them meets a false one soon.
        begin = crc32(self._site.own.encode()) % ref.block_count
        left = sorted(claims, key=lambda index: (index - begin) % ref.block_count)
        first_false = ref.block_count
        while left:
            index = next((one for one in left if self._is_doubtful(claims[one])), left[0])
            left.remove(index)
            is_false = await self._compare(BlockAddress(locator, ref, index), claims[index])
            first_false = min(first_false, index if is_false else ref.block_count)
            if not self._is_doubtful(claims[index]):
                continue
            if first_false < given:
                await self._drop(claims[index].signer, ref)
                return None
            if not any(self._is_doubtful(claims[one]) for one in left) and (last := await self._if_right(ref)):
                return last
        return await self._if_right(ref) if first_false >= given else None

    async def _claims(self, ref: ObjectRef) -> dict[int, Record]:
        """The records of the blocks that are here."""
        claims: dict[int, Record] = {}
        for index in range(ref.block_count):
            found = await self._site.tiers.get(Piece(ref.block(index)), ref.size)
            if found is not None:
                claims[index] = found[0].record
        return claims

    def _is_doubtful(self, record: Record) -> bool:
        return not self._site.trust.accepts(record.signer)

    async def _compare(self, address: BlockAddress, claim: Record) -> bool:
        """Whether the block that was here by this claim was false. It is the registry's now, and who signed a false
        claim is in quarantine."""
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
            await self._site.tiers.put(piece, truth.data, truth.record)
        if deceived:
            log.error("%s #%d: a mirror of %s gives wrong bytes", ref.digest, address.index, address.locator.upstream)
        elif is_false and claim.signer != self._site.own:
            self._site.view.quarantine(claim.signer, f"signed a false record of {ref.digest} #{address.index}")
            self._site.trust.suspect(Suspicion(claim, str(address.locator), compared=True))
        return is_false

    async def _drop(self, liar: PeerId, ref: ObjectRef) -> None:
        """What is here of an object by a liar's word."""
        for piece, record in self._site.tiers.signed_by(liar).items():
            if record.object == ref:
                await self._site.tiers.discard(piece)

    async def _if_right(self, ref: ObjectRef) -> Buffer | None:
        """The last block, where all are held and make the object."""
        hasher = hashlib.new(ref.digest.algorithm)
        data: Buffer = b""
        for index in range(ref.block_count):
            found = await self._site.tiers.get(Piece(ref.block(index)), ref.size)
            if found is None:
                return None
            data = found[0].data
            hasher.update(data)
        return data if hasher.hexdigest() == ref.digest.hex else None


def _by_block(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, list[slice]]]:
    """The blocks that the spans touch, in their order, each with what of it they want."""
    parts = (
        (index, slice(max(0, start - index * BLOCK_SIZE), min(BLOCK_SIZE, stop - index * BLOCK_SIZE)))
        for start, stop in spans
        for index in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
    )
    for index, group in groupby(parts, itemgetter(0)):
        yield index, [part for _, part in group]
