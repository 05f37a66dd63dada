"""The node's answers to its clients: names from the resolver, bytes block by block with read-ahead.

An object of at most CHECKED_FIRST bytes is fetched whole and verified before its first byte is sent. The last block of
a larger object that is read whole waits for the digest. Larger objects that are read in part are checked later
(node/content/verification.py).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

import trio

from cache.store import Held
from node.blocks.fetcher import Fetcher
from node.blocks.grants import Grants
from node.blocks.held_objects import has_record, held_body, open_checked
from node.blocks.read_ahead import ReadAhead
from node.blocks.room import Room
from node.blocks.values import Obtained, Site
from node.content.known_names import type_of
from node.content.resolver import Accept, Resolver
from node.content.verification import ObjectVerifier
from node.oci.manifests import MAX_MANIFEST, Resolved
from node.oci.references import Locator
from node.runtime.hashing import Hashing, inline
from node.telemetry.metrics import Metrics
from node.telemetry.provenance import Provenance, Read
from node.telemetry.sources import Source
from protocol.errors import CorruptObjectError, UnavailableError
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef

log = logging.getLogger(__name__)

HEAD_WAIT_S = 20.0
"""Longest wait before an answer begins without its first block: clients wait little longer for the head of an answer,
but much longer for the next byte of a body."""
CHECKED_FIRST = 4 << 20
"""Largest object in bytes that is verified before its first byte is sent; tests/benchmarks/check_first.py measures the
cost."""
CHECK_S = 60.0
"""Longest time to verify a small object first. Then it is sent like a large one: clients wait some minutes for the next
byte."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A client's read of the byte ranges `spans` of an object, in this order."""

    locator: Locator
    ref: ObjectRef
    spans: tuple[tuple[int, int], ...]

    @property
    def whole(self) -> bool:
        return self.spans == ((0, self.ref.size),)


@dataclass(slots=True, kw_only=True, eq=False)
class SiteLibrary:
    """Implements `Library` (node/content/contract.py) over the site and the registry."""

    site: Site
    resolver: Resolver
    grants: Grants
    fetcher: Fetcher
    verifier: ObjectVerifier
    ledger: Provenance
    metrics: Metrics
    hashing: Hashing = inline
    _room: Room = field(init=False)

    def __post_init__(self) -> None:
        self._room = Room(self.fetcher.window)

    async def resolve(self, locator: Locator, reference: str, accept: Accept | None = None) -> Resolved:
        """`accept`: as for `Resolver.resolve`."""
        resolved = self._true(await self.resolver.resolve(locator, reference, accept))
        if locator.kind == "blobs":
            return resolved
        if resolved.ref.size > MAX_MANIFEST:  # only a claim can be: the registry's own manifests are smaller
            self.resolver.known.doubt(locator, resolved.ref)
            resolved = self._true(await self.resolver.resolve(locator, reference, accept))
            if resolved.ref.size > MAX_MANIFEST:
                raise UnavailableError(f"{resolved.ref.digest}: a manifest of {resolved.ref.size} bytes, by a claim")
        names = self.resolver.known
        if (typed := names.typed(resolved)) is not None:
            return typed
        # The media type is a claim, and clients act on it before they have the bytes: compare it with these.
        try:
            body = await self._manifest(_Request(locator, resolved.ref, ((0, resolved.ref.size),)))
        except UnavailableError as error:
            log.debug("the media type of %s is not checked: %s", resolved.ref.digest, error)
        else:
            names.check_type(resolved, body)
        # If the bytes cannot be read, the answer is in doubt now, and the registry is asked.
        return names.typed(resolved) or await self.resolver.resolve(locator, reference, accept)

    def _true(self, resolved: Resolved) -> Resolved:
        """With the verified size, if there is one: the sizes in manifests and members' answers are claims."""
        ref = self.site.facts.true(resolved.ref)
        if ref != resolved.ref:
            log.info("%s has %d bytes; %d were claimed", ref.digest, ref.size, resolved.ref.size)
        return replace(resolved, ref=ref)

    async def sized(self, locator: Locator, resolved: Resolved) -> Resolved:
        digest, names = resolved.ref.digest, self.resolver.known
        if self.site.facts.size(digest) is not None:
            return self._true(resolved)
        if not names.is_by_registry(locator, resolved.ref):
            resolved = replace(await self.resolver.ask_registry(locator, str(digest)), media_type=resolved.media_type)
            if not names.is_by_registry(locator, resolved.ref) and not await has_record(self.site.tiers, resolved.ref):
                raise UnavailableError(f"{digest}: its size is only claimed, and the registry is out of reach")
        return resolved

    async def _manifest(self, request: _Request) -> bytes:
        """A manifest's verified bytes. Raises as `read`."""
        ref = request.ref
        with self._granted(request.locator, ref):
            async with aclosing(self._verify_first(request, {})) as waits:
                async for _ in waits:
                    raise UnavailableError("it takes too long")
            return await self._held_manifest(ref)

    async def _held_manifest(self, ref: ObjectRef) -> bytes:
        body = await held_body(self.site.tiers, ref)
        if body is None:
            raise UnavailableError("no tier holds its bytes")
        if hashlib.new(ref.digest.algorithm, body).hexdigest() != ref.digest.hex:
            raise CorruptObjectError(f"{ref.digest} has other bytes than when it was verified")
        return body

    def _is_unread(self, locator: Locator, ref: ObjectRef) -> bool:
        """Whether it is a manifest whose bytes could not be read when its name was resolved."""
        is_manifest = locator.kind == "manifests" and ref.size <= MAX_MANIFEST
        return is_manifest and not self.resolver.known.has_read(ref)

    def _granted(self, locator: Locator, ref: ObjectRef) -> AbstractContextManager[None]:
        return self.grants.granted(locator, ref.digest) if locator.grant else nullcontext()

    async def read(
        self, locator: Locator, ref: ObjectRef, start: int, stop: int, *more: tuple[int, int]
    ) -> AsyncGenerator[Buffer, None]:
        if stop <= start:
            return
        self.site.check_size(ref)
        request = _Request(locator, ref, ((start, stop), *more))
        verified: dict[int, Obtained] = {}
        is_unread = self._is_unread(locator, ref)
        with self._granted(locator, ref):
            if is_unread or (ref.size <= CHECKED_FIRST and not (request.whole and ref.block_count == 1)):
                async with aclosing(self._verify_first(request, verified)) as waits:
                    async for _ in waits:
                        yield b""
            if is_unread:
                type_of(ref, await self._held_manifest(ref))
            async with aclosing(self._send(request, verified)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    del chunk
        if not request.whole and ref.size > CHECKED_FIRST:
            self.verifier.read_in_part(locator, ref)

    async def _verify_first(self, request: _Request, verified: dict[int, Obtained]) -> AsyncGenerator[None, None]:
        """Fetch a small object whole and verify its digest before a byte is sent. Block provenance goes into
        `verified`; the bytes stay in the tiers. Yields when a client would wait too long for the head of an answer or
        for its next byte. Raises CorruptObjectError. `verified` stays empty if verification takes longer than CHECK_S,
        if false blocks were just replaced, or if a block cannot be obtained and the request is for a part."""
        ref = request.ref
        hasher = self.hashing(ref.digest.algorithm)
        fetched: dict[int, Obtained] = {}
        began = yielded_at = trio.current_time()
        with closing(self._ahead(request, range(ref.block_count), urgent=ref.block_count == 1)) as ahead:
            for index in range(ref.block_count):
                if not await ahead.ended_within(max(0.0, yielded_at + HEAD_WAIT_S - trio.current_time())):
                    yield
                    yielded_at = trio.current_time()
                    if yielded_at > began + CHECK_S:
                        return
                try:
                    obtained = await ahead.first()
                except UnavailableError:
                    if request.whole:
                        self.resolver.known.doubt(request.locator, ref)
                        raise
                    return
                await hasher.update(obtained.held.data)
                fetched[index] = obtained._replace(held=Held(b"", obtained.held.record))
                ahead.taken()
        if await self.verifier.check(request.locator, ref, await hasher.hexdigest()) is None:
            verified.update(fetched)

    async def _send(self, request: _Request, verified: Mapping[int, Obtained]) -> AsyncGenerator[Buffer, None]:
        """The bytes of the spans. A block that was `verified` must still have the same hash."""
        locator, ref, whole = request.locator, request.ref, request.whole
        hasher = self.hashing(ref.digest.algorithm) if whole and not verified else None
        parts: list[bytes] = []
        last = ref.block_count - 1
        extent = max(stop for _, stop in request.spans) - min(start for start, _ in request.spans)
        indices = (index for index, _ in _by_block(request.spans))
        with closing(self._ahead(request, indices, urgent=extent <= BLOCK_SIZE)) as ahead:
            if not await ahead.ended_within(HEAD_WAIT_S):
                yield b""
            for index, wanted in _by_block(request.spans):
                try:
                    obtained = await ahead.first()
                except UnavailableError:
                    self.resolver.known.doubt(locator, ref)
                    raise
                data, first = obtained.held.data, verified.get(index, obtained)
                if first is not obtained and first.held.record.sha256 != obtained.held.record.sha256:
                    raise CorruptObjectError(f"{ref.digest} #{index} has other bytes than when it was verified")
                self._note(ref.digest, index, first, sum(part.stop - part.start for part in wanted))
                if hasher is not None:
                    await hasher.update(data)
                    if index == last:
                        data = await self.verifier.check(locator, ref, await hasher.hexdigest(), given=last) or data
                if whole and locator.kind == "manifests" and ref.size <= MAX_MANIFEST:
                    parts.append(bytes(data))
                    if index == last:
                        self.resolver.known.learn(locator, b"".join(parts))
                for part in wanted:
                    yield memoryview(data)[part]
                del data, obtained, first  # they keep the block in memory: drop them before the next wait
                ahead.taken()

    def _ahead(self, request: _Request, indices: Iterable[int], *, urgent: bool) -> ReadAhead:
        return ReadAhead(self.fetcher, self._room, request.locator, request.ref, indices, urgent=urgent)

    def holds_sealed(self, locator: Locator, ref: ObjectRef) -> bool:
        if self._is_unread(locator, ref):
            return False
        opened = open_checked(self.site.tiers, ref)
        if opened is not None:
            opened[0].close()
        return opened is not None

    def sealed(self, ref: ObjectRef, start: int, stop: int) -> BinaryIO | None:
        opened = open_checked(self.site.tiers, ref)
        if opened is None:
            return None
        file, tier = opened
        read = Read(Source(tier), seconds=0.0, retries=0, peers=(), at=time.time())
        blocks = range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
        self.ledger.note_run(ref.digest, blocks, read, stop - start)
        return file

    def _note(self, digest: Digest, index: int, obtained: Obtained, served: int) -> None:
        self.metrics.read(obtained.source, obtained.seconds)
        for _ in range(obtained.retries):
            self.metrics.retried(obtained.source)
        read = Read(
            obtained.source, obtained.seconds, obtained.retries, obtained.peers, at=time.time(), way=obtained.way
        )
        self.ledger.note(digest, index, read, served)


def _by_block(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, list[slice]]]:
    """The blocks that the spans touch, in their order, each with its wanted slices."""
    parts = (
        (index, slice(max(0, start - index * BLOCK_SIZE), min(BLOCK_SIZE, stop - index * BLOCK_SIZE)))
        for start, stop in spans
        for index in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
    )
    for index, group in groupby(parts, itemgetter(0)):
        yield index, [part for _, part in group]
