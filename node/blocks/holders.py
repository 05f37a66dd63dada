"""Obtains blocks from the members that hold them or their shards, and answers members that ask what this node holds.

Candidates are the members that the object's directories name, and the stripe's keepers. Each reports its holdings in
bitmaps. Any k shards of one code make a block, even if they were placed in earlier views. If all this fails, the
member whose client has a grant reads the blocks from the upstream.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import TypeVar

import trio
from cachetools import TTLCache

from cache.store import Held, Holdings
from node.blocks.questions import Part, Questions
from node.blocks.values import SMALL_SILENCE_S, Obtained, Site, Stretch
from node.exchange.contract import Answer, Lane
from node.telemetry.sources import Source
from protocol import messages
from protocol.directory import Directory
from protocol.erasure import decode_block
from protocol.errors import PeerMisbehavedError, ShoalError
from protocol.ids import BLOCK_SIZE, Buffer, Digest, PeerId, Shard
from protocol.records import Record
from protocol.wire import MAX_BITMAPS

log = logging.getLogger(__name__)

UNSETTLED_S = 30.0
"""For this long after a view change, a home asks the other keepers before the upstream: one of them may have been home
before, and hold the block."""
HOLDINGS_TTL_S = 2.0
MAX_REMEMBERED = 4096
MAX_HOLDINGS = 16 << 20
"""Bytes of remembered holdings. One answer has up to 1 MiB of bitmaps; honest ones have some hundred bytes."""
MAX_CANDIDATES = 8
HINT_S = 2.0
"""For an answer about what a member holds, which it has in memory."""
HELD_S = 8.0
"""For a block or shard that a member holds: 512 KiB take 1 s at 4 Mbit/s, and may wait behind others."""

Reply = TypeVar("Reply", messages.Holders, messages.HoldingsFound)


class Holders:
    def __init__(self, site: Site, questions: Questions, directory: Directory) -> None:
        self._site, self._questions, self._directory = site, questions, directory
        ttl = HOLDINGS_TTL_S, trio.current_time
        self._holdings: TTLCache[tuple[PeerId, Digest], Holdings] = TTLCache(MAX_HOLDINGS, *ttl, getsizeof=_memory_of)
        self._named: TTLCache[Digest, tuple[PeerId, ...]] = TTLCache(MAX_REMEMBERED, *ttl)

    async def handle(
        self, peer: PeerId, request: messages.GetHoldings | messages.FindHolders | messages.Announce
    ) -> Answer:
        match request:
            case messages.GetHoldings():
                return Answer(_pack(self._site.tiers.holdings(Digest.parse(request.digest))))
            case messages.FindHolders():
                holders = self._directory.holders(Digest.parse(request.digest), trio.current_time())
                return Answer(messages.Holders(holders))
            case messages.Announce():
                for digest in request.digests:
                    self._directory.announce(Digest.parse(digest), peer, trio.current_time())
                return Answer(messages.Done())

    async def find(self, stretch: Stretch, got: Callable[[int, Obtained], None]) -> None:
        """The blocks of the stretch that members hold: whole blocks, else k shards of one code; those that are left
        from their reader."""
        left = set(stretch.indices)

        def take(index: int, obtained: Obtained) -> None:
            if index in left:
                left.remove(index)
                got(index, obtained)

        if candidates := await self._candidates(stretch):
            async with trio.open_nursery() as nursery:
                for peer in candidates:
                    if (peer, stretch.ref.digest) not in self._holdings:
                        nursery.start_soon(self._learn_holdings, peer, stretch.ref.digest)
            holdings = {peer: self._holdings.get((peer, stretch.ref.digest), Holdings()) for peer in candidates}
            for peer, held in holdings.items():
                if wanted := [index for index in stretch.indices if index in left and held.blocks >> index & 1]:
                    await self._blocks_from(peer, stretch.only(wanted), take, 0, HELD_S)
            for index in sorted(left):
                await self._decoded_from(holdings, stretch.only([index]), take)
        if left and stretch.reader:
            await self._from_reader(stretch.only(sorted(left)), take)

    async def _from_reader(self, stretch: Stretch, take: Callable[[int, Obtained], None]) -> None:
        """The reader reads the blocks from the upstream and sends each as the only shard of the code 1+0."""

        def granted(index: int, obtained: Obtained) -> None:
            self._site.facts.granted(stretch.ref.digest, stretch.locator)
            take(index, obtained)

        asked = stretch._replace(reader="", background=False)
        await self._blocks_from(PeerId(stretch.reader), asked, granted, 1, math.inf)

    async def _candidates(self, stretch: Stretch) -> list[PeerId]:
        site = self._site
        if len(site.view.site) < 2:
            return []
        now = trio.current_time()
        _, keepers = site.placement().keepers(stretch.stripe, stretch.length)
        candidates = list(await self._named_by_directory(stretch.ref.digest))
        if candidates or keepers[0] != site.own or now - site.view.changed_at < UNSETTLED_S:
            candidates += keepers
        alive = {member.peer_id for member in site.view.site} - {site.own}
        usable = (peer for peer in dict.fromkeys(candidates) if peer in alive and not site.health.avoided(peer, now))
        return list(islice(usable, MAX_CANDIDATES))

    async def _named_by_directory(self, digest: Digest) -> tuple[PeerId, ...]:
        """The holders that the first directory with an entry for the object names."""
        named = self._named.get(digest)
        if named is not None:
            return named
        named = ()
        for peer in self._site.placement().directory(digest):
            if self._site.health.avoided(peer, trio.current_time()):
                continue
            if peer == self._site.own:
                named = self._directory.holders(digest, trio.current_time())
            elif reply := await self._ask(peer, messages.FindHolders(str(digest)), messages.Holders):
                named = reply.peers
            if named:
                break
        self._named[digest] = named
        return named

    async def _learn_holdings(self, peer: PeerId, digest: Digest) -> None:
        reply = await self._ask(peer, messages.GetHoldings(str(digest)), messages.HoldingsFound)
        most = self._site.max_object // BLOCK_SIZE // 8 + 1
        self._holdings[peer, digest] = _unpack(reply, most) if reply else Holdings()

    async def _ask(self, peer: PeerId, question: messages.Request, kind: type[Reply]) -> Reply | None:
        try:
            answer = await self._questions.ask(peer, question, Lane.CONTROL, SMALL_SILENCE_S, HINT_S)
        except ShoalError as error:
            log.debug("%s to %s: %s", type(question).__name__, peer, error)
            return None
        return answer.message if isinstance(answer.message, kind) else None

    async def _blocks_from(
        self, peer: PeerId, stretch: Stretch, take: Callable[[int, Obtained], None], hops: int, within_s: float
    ) -> None:
        """Whole blocks from a member, as far as it sends them."""

        def part(message: messages.ShardFound, body: Buffer) -> None:
            held = self._questions.checked(stretch, message, body)
            take(held.record.index, Obtained(held, Source.PEER, (peer,)))

        await self._ask_for(peer, stretch, Shard(1, 0, 0), part, hops=hops, within_s=within_s)

    async def _ask_for(
        self, peer: PeerId, stretch: Stretch, shard: Shard, part: Part, *, hops: int, within_s: float
    ) -> None:
        try:
            if hops:
                await self._questions.stream(peer, stretch, shard, part, hops=hops, lane=Lane.URGENT)
            else:
                await self._questions.stream_held(peer, stretch, shard, part, within_s=within_s)
        except PeerMisbehavedError as error:
            self._site.view.quarantine(peer, str(error))
        except ShoalError as error:
            log.debug("%s from %s: %s", stretch, peer, error)

    async def _decoded_from(
        self, holdings: Mapping[PeerId, Holdings], stretch: Stretch, take: Callable[[int, Obtained], None]
    ) -> None:
        """A single block, if members hold k shards of one code."""
        by_code: dict[tuple[int, int], dict[int, PeerId]] = {}
        for peer, held in holdings.items():
            for shard, bits in held.shards.items():
                if bits >> stretch.indices[0] & 1:
                    by_code.setdefault((shard.k, shard.m), {}).setdefault(shard.index, peer)
        for (k, m), owners in by_code.items():
            if len(owners) >= k:
                chosen = {Shard(k, m, index): peer for index, peer in islice(owners.items(), k)}
                block = await self._gather(chosen, stretch)
                if block is not None:
                    take(stretch.indices[0], Obtained(block, Source.PEER, tuple(chosen.values())))
                    return

    async def _gather(self, owners: Mapping[Shard, PeerId], stretch: Stretch) -> Held | None:
        """A single block from k shards of one code, one from each owner."""
        shards: dict[int, Buffer] = {}
        records: list[Record] = []

        def part(message: messages.ShardFound, body: Buffer) -> None:
            held = self._questions.checked(stretch, message, body)
            shards[message.index] = held.data
            records.append(held.record)

        async with trio.open_nursery() as nursery:
            for shard, peer in owners.items():
                ask = partial(self._ask_for, peer, stretch, shard, part, hops=0, within_s=HELD_S)
                nursery.start_soon(ask)
        if len(shards) < len(owners):
            return None
        code = next(iter(owners))
        data = decode_block(shards, code.k, code.m, stretch.length)
        return Held(data, records[0]) if records[0].matches(data) else None


def _memory_of(holdings: Holdings) -> int:
    """Bytes, about; never so few that there are more than MAX_REMEMBERED."""
    bitmaps = (holdings.blocks, *holdings.shards.values())
    return MAX_HOLDINGS // MAX_REMEMBERED + sum(bits.bit_length() // 8 for bits in bitmaps)


def _pack(holdings: Holdings) -> messages.HoldingsFound:
    def bits(value: int) -> bytes:
        return value.to_bytes((value.bit_length() + 7) // 8, "little")

    shards = islice(holdings.shards.items(), MAX_BITMAPS)
    rows = tuple((shard.k, shard.m, shard.index, bits(value)) for shard, value in shards)
    return messages.HoldingsFound(bits(holdings.blocks), rows)


def _unpack(reply: messages.HoldingsFound, most: int) -> Holdings:
    """The bitmaps up to the bit of the last block that an object may have, in the first `most` bytes."""
    shards = {Shard(k, m, index): int.from_bytes(bits[:most], "little") for k, m, index, bits in reply.shards}
    return Holdings(int.from_bytes(reply.blocks[:most], "little"), shards)
