"""The home of a stripe: the one member that reads its blocks from the upstream, once, however many members want them.

Each stripe has a home (protocol/placement.py), as hashing assigns each object a home node in Squirrel (Iyer, Rowstron,
Druschel, PODC 2002). Any member can act as home: if those of a lower rank fail, or for its own client. A home obtains
blocks from members that hold them, else from the upstream, and in that case signs their records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import groupby

import trio

from cache.store import Askers, Held
from node.blocks.grants import Grants
from node.blocks.holders import Holders
from node.blocks.values import BlockAddress, Group, Obtained, Site, Stretch, Taker
from node.identity.identity import Identity
from node.oci.references import Locator
from node.registry.batching import BatchedReads
from node.registry.contract import RegistryNews
from node.runtime.shared_work import Flow, SharedWork
from node.telemetry.sources import Source
from protocol.errors import DeniedError, NotFoundError, UnavailableError
from protocol.home_times import HomeTimes
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, Piece
from protocol.records import Record, make_record

BACKGROUND_S = 60.0
"""Deadline for a background read, which also waits until clients are served. After it, the asker has to retry later."""


class Home:
    """`times`: how long homes take to read blocks from the upstream, this node among them."""

    def __init__(
        self,
        site: Site,
        holders: Holders,
        grants: Grants,
        *,
        origin: BatchedReads,
        news: RegistryNews,
        identity: Identity,
    ) -> None:
        self._site, self._holders, self._grants = site, holders, grants
        self._origin, self._news = origin, news
        self._identity, self.times = identity, HomeTimes()
        self._reads: SharedWork[Group, Obtained] = SharedWork(site.nursery)

    async def find(self, stretch: Stretch, taker: Taker) -> None:
        """The last `BlockSource` of the fetcher: the node acts as home for its own client."""
        await self.blocks(stretch, partial(self._claimed, stretch, taker.got))

    async def straight(self, stretch: Stretch, got: Callable[[int, Obtained], None]) -> None:
        """Read blocks from the upstream for this node's own client, and ask no member for them first. Raises the first
        error."""
        self._site.check_size(stretch.ref)
        work = partial(self._obtain, stretch, straight=True)
        await self._reads.obtain(stretch.group, stretch.indices, work, partial(self._claimed, stretch, got))

    def _claimed(self, stretch: Stretch, got: Callable[[int, Obtained], None], index: int, obtained: Obtained) -> None:
        self._site.tiers.claim(stretch.piece(index))  # it may have joined a read on behalf of a member
        got(index, obtained)

    async def blocks(
        self, stretch: Stretch, got: Callable[[int, Obtained], None], progress: Callable[[], None] = lambda: None
    ) -> None:
        """Obtain whole blocks, which are then also in the tiers if they have room. Concurrent calls share the work.
        `progress` is called when bytes come on. Raises the first error."""
        self._site.check_size(stretch.ref)
        missing = []
        for index in stretch.indices:
            held = await self._site.trusted(stretch.piece(index), stretch.ref.size, stretch.kept_for)
            if held is not None:
                got(index, Obtained(held[0], Source(held[1])))
            else:
                missing.append(index)
        if missing:
            await self._reads.obtain(stretch.group, missing, partial(self._obtain, stretch), got, progress=progress)

    async def _obtain(self, stretch: Stretch, flow: Flow[Group, Obtained], *, straight: bool = False) -> None:
        def got(index: int, obtained: Obtained) -> None:
            held = obtained.held
            self._site.keep(stretch.piece(index), held.data, held.record, kept_for=stretch.kept_for)
            flow.deliver(index, obtained)

        await self._site.storing.room()
        if not straight:
            await self._holders.find(stretch.only(flow.left), got)
        for run in _runs(flow.left):
            await self._from_upstream(stretch.only(run), got, flow.progress)

    async def _from_upstream(
        self, stretch: Stretch, got: Callable[[int, Obtained], None], progress: Callable[[], None]
    ) -> None:
        since = trio.current_time()
        locator = self._grants.as_own_client(stretch).locator  # a client with a grant may have arrived meanwhile

        def came(index: int, data: bytearray) -> None:
            nonlocal since
            self._note_origin(locator, stretch.ref.digest)
            if not stretch.background:
                before, since = since, trio.current_time()
                self.times.came(len(data), before, since)
            got(index, Obtained(self._signed(BlockAddress(locator, stretch.ref, index), data), Source.ORIGIN))

        read = partial(self._origin.stretch, locator, stretch.ref, stretch.indices[0], len(stretch.indices), came)
        if not stretch.background:
            await read(coming=progress)
            return
        with trio.move_on_after(BACKGROUND_S):
            await read(coming=progress, background=True)
            return
        raise UnavailableError(f"{locator.upstream}: the reads of clients go first")

    def _note_origin(self, locator: Locator, digest: Digest) -> None:
        """Note how the upstream gave the object, before any tier or member has a part of it."""
        if locator.grant is None and self._news.is_open(locator.upstream):
            self._site.facts.given_to_all(digest)
        else:
            self._site.facts.granted(digest, locator)

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


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Cut ascending indices into runs without a gap."""
    for _, run in groupby(enumerate(indices), lambda numbered: numbered[1] - numbered[0]):
        yield tuple(index for _, index in run)
