"""What a node does for others, and for itself as a keeper: answer from what it holds, keep its shard, act as home.

Waits never form a circle: reader, keepers of cell above cell (`reach` 2 and more, one less at each step), home, holder
or origin. A home waits for holders, who answer from what they hold (`reach` 0), and for the origin. Nobody waits for
his own read of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from itertools import islice

import cachetools
import trio

from cache.store import Held, Holdings
from node.blocks.plan_runner import carry_out
from node.blocks.values import LOOK_EVERY_S, SILENCE_S, SMALL_SILENCE_S, BlockAddress, Obtained, Site, Work, is_copy
from node.exchange.contract import Answer, Heard, Lane
from node.oci.references import Locator
from node.registry.batching import BatchedReads
from node.runtime.single_flight import SingleFlight
from node.telemetry.sources import Source
from protocol.directory import Directory
from protocol.erasure import decode_block, encode_shard
from protocol.errors import (
    DeniedError,
    NotFoundError,
    PeerMisbehavedError,
    PeerUnavailableError,
    ShoalError,
    UnavailableError,
)
from protocol.fetch_plan import Ask, ShardPlan
from protocol.home_times import HomeTimes
from protocol.ids import BLOCK_SIZE, BlockId, Buffer, Digest, ObjectRef, PeerId, Piece, Shard, shard_length
from protocol.messages import (
    Announce,
    BlockFound,
    Done,
    Failed,
    FindHolders,
    GetBlock,
    GetHoldings,
    GetShard,
    Holders,
    HoldingsFound,
    Request,
    ShardFound,
)
from protocol.records import Record, make_record
from protocol.wire import MAX_BITMAPS

log = logging.getLogger(__name__)

HOME_PATIENCE_S = 8.0
"""A late home is waited for so much longer before another one acts for it: that costs a copy from the origin."""
UNSETTLED_S = 30.0
"""After a change of the view the keepers that were may hold what the keepers that are lack: they are asked first."""
HOLDINGS_TTL_S = 2.0
MAX_CANDIDATES = 8
BACKGROUND_S = 60.0
"""So long a block that nobody waits for may take, and wait for clients to be done, before whoever wants it is told to
come back later."""
MAX_HOMES = 3
"""A home and two that act for it: when three cannot give a block, the reader's own way to the origin is next."""


def raise_failed(failed: Failed) -> None:
    kinds: dict[str, type[ShoalError]] = {"not-found": NotFoundError, "denied": DeniedError}
    raise kinds.get(failed.code, UnavailableError)(failed.text)


class Seeder:
    def __init__(
        self,
        site: Site,
        origin: BatchedReads,
        directory: Directory,
        sign: Callable[[bytes], bytes],
        nursery: trio.Nursery,
    ) -> None:
        self._site, self._origin, self._directory, self._sign = site, origin, directory, sign
        self._homes: SingleFlight[Work, Obtained] = SingleFlight(nursery)
        self._granted: dict[Digest, list[Locator]] = {}
        """With what clients of this node now read what their registries do not give to everybody."""
        self._keeping: SingleFlight[tuple[Shard, Work], tuple[Buffer, Record]] = SingleFlight(nursery)
        self._home_times = HomeTimes()
        self._holdings: cachetools.TTLCache[tuple[PeerId, Digest], Holdings] = cachetools.TTLCache(
            4096, HOLDINGS_TTL_S, timer=trio.current_time
        )
        self._holders: cachetools.TTLCache[Digest, tuple[PeerId, ...]] = cachetools.TTLCache(
            4096, HOLDINGS_TTL_S, timer=trio.current_time
        )

    # Answers

    async def handle(self, peer: PeerId, request: object) -> Answer:
        """Answers a member's GetShard, GetBlock, GetHoldings, FindHolders and Announce."""
        match request:
            case GetShard():
                return await self._answer_shard(request)
            case GetBlock():
                ref = ObjectRef(Digest.parse(request.digest), request.size)
                found = await self._given(Piece(ref.block(request.index)), ref)
                return Answer(BlockFound(found[0].record), found[0].data) if found else _not_held()
            case GetHoldings():
                return Answer(_pack(self._site.tiers.holdings(Digest.parse(request.digest))))
            case FindHolders():
                return Answer(Holders(self._directory.holders(Digest.parse(request.digest), trio.current_time())))
            case Announce():
                for digest in request.digests:
                    self._directory.announce(Digest.parse(digest), peer, trio.current_time())
                return Answer(Done())
            case _:
                return Answer(Failed("bad-request", f"not a request for blocks: {type(request).__name__}"))

    async def _answer_shard(self, request: GetShard) -> Answer:
        ref = ObjectRef(Digest.parse(request.digest), request.size)
        shard = Shard(request.k, request.m, request.want)
        found = await self._held_shard(ref, request.index, shard, exact=request.exact)
        if found is None:
            if request.reach == 0:
                return _not_held()
            reader = "" if request.reader == self._site.own else request.reader
            asked = BlockAddress(Locator.parse(request.source), ref, request.index, reader, request.background)
            address = self._as_own_client(asked)
            if request.reach == 1:
                obtained = await self.home(address)
                found = _cut(obtained.held, shard)
            else:
                found = await self.keep(address, shard, request.reach, exact=request.exact)
        shard, body, record = found
        return Answer(ShardFound(shard.k, shard.m, shard.index, record), body)

    async def _held_shard(
        self, ref: ObjectRef, index: int, shard: Shard, *, exact: bool
    ) -> tuple[Shard, Buffer, Record] | None:
        """The shard that is wanted, or one of the same code that an earlier view had this node keep."""
        block = ref.block(index)
        whole = await self._given(Piece(block), ref)
        if whole is not None:
            return _cut(whole[0], shard)
        held = self._site.tiers.holdings(block.digest).shards
        indices = [s.index for s, bits in held.items() if (s.k, s.m) == (shard.k, shard.m) and bits >> block.index & 1]
        if exact or shard.index in indices:
            indices = [shard.index] if shard.index in indices else []
        for other in indices[:1]:
            piece = Piece(block, Shard(shard.k, shard.m, other))
            found = await self._given(piece, ref)
            if found is not None and piece.shard is not None:
                return piece.shard, found[0].data, found[0].record
        return None

    async def _given(self, piece: Piece, ref: ObjectRef) -> tuple[Held, str] | None:
        """What is held and others will take: a signer whom this node does not know, they may not know either."""
        found = await self._site.tiers.get(piece, ref.size)
        return found if found and self._site.trust.accepts(found[0].record.signer) else None

    # Keeping

    async def keep(
        self, address: BlockAddress, shard: Shard, reach: int, *, exact: bool
    ) -> tuple[Shard, Buffer, Record]:
        """This node's shard of a block, from the cell above or the home where it is not held; it is kept from then on.

        Without `exact` it may be another one of that code, which an earlier view had this node keep.
        """
        found = await self._held_shard(address.ref, address.index, shard, exact=exact)
        if found is not None:
            return found
        data, record = await self._keeping.do((shard, address.work), lambda: self._obtain_shard(address, shard, reach))
        return shard, data, record

    async def _obtain_shard(self, address: BlockAddress, shard: Shard, reach: int) -> tuple[Buffer, Record]:
        """From its source; the next one takes its place where that fails, or gets on far more slowly than others: in
        the root cell it acts as home."""
        site, now = self._site, trio.current_time()
        route = site.placement().route(site.own, address.block, address.length)
        sources = route.sources(shard.index, reach)
        usable = site.health.usable((peer for peer in sources if peer != site.own), now)
        most = 1 if address.background else MAX_HOMES
        homes = [peer for peer in sources if peer == site.own or peer in usable][:most]
        plan = ShardPlan(homes, homes, 1, site.health.late_after_s, site.health.answered_at, HOME_PATIENCE_S)
        found: list[tuple[Buffer, Record]] = []
        failures: list[ShoalError] = [UnavailableError(f"no home of {address.ref.digest} #{address.index} answers")]

        async def ask(what: Ask) -> tuple[Buffer, Record] | None:
            try:
                with self._home_times.waiting(what.peer):
                    return await self._ask_home(what.peer, sources[what.peer], address, shard, plan)
            except PeerMisbehavedError as error:
                site.view.quarantine(what.peer, str(error))
                failures.append(UnavailableError(str(error)))  # to the asker, who has done nothing wrong
            except ShoalError as error:
                failures.append(error)
            return None

        def note(what: Ask, answer: tuple[Buffer, Record] | None) -> list[Ask]:
            if answer is None:
                return plan.failed(what.peer, trio.current_time())
            found.append(answer)
            if plan.was_cold(what.peer):
                self._home_times.came(address.length, now, trio.current_time())
            return plan.got(what.peer, what.want, trio.current_time())

        def overdue() -> list[Ask]:
            now = trio.current_time()
            asks = self.note_overdue(plan)[1]
            for home, asked_at in plan.cold:
                slow = not address.background and self._home_times.too_long(home, asked_at, route.depth, now)
                if site.health.unfit(home, now) or slow:
                    asks += plan.give_up(home, now)
            for home in plan.given_up:
                if not site.health.unfit(home, now):
                    log.info("%s gets blocks too slowly: others act for it as home", home)
                    site.health.gave_up(home, now)
            return asks

        await carry_out(plan, plan.start(False, now), ask, note, overdue, LOOK_EVERY_S)
        if not found:
            raise failures[-1]
        await self._store_shard(address.block, shard, *found[0])
        return found[0]

    def note_overdue(self, plan: ShardPlan) -> tuple[list[PeerId], list[Ask]]:
        """Who is late by the plan, which counts against them, and whom to ask for those given up."""
        now = trio.current_time()
        late, asks = plan.overdue(now)
        for peer in late:
            self._site.health.overdue(peer, plan.took_s(peer, now) or 0.0, now)
        return late, asks

    async def _ask_home(
        self, home: PeerId, reach: int, address: BlockAddress, shard: Shard, plan: ShardPlan
    ) -> tuple[Buffer, Record]:
        if home == self._site.own:
            plan.heard(home, False, trio.current_time())  # it is cold, as another home would say
            return _cut((await self.home(address)).held, shard)[1:]
        ref = address.ref
        question = GetShard(
            str(ref.digest), address.index, ref.size, shard.k, shard.m, shard.index, reach, str(address.locator),
            True, self.reader_of(address), address.background,
        )  # fmt: skip
        answer = await self.ask(
            home, question, Lane.URGENT, SILENCE_S,
            heard=lambda ready: plan.heard(home, ready, trio.current_time()),
            took_s=lambda: plan.took_s(home, trio.current_time()),
        )  # fmt: skip
        if not isinstance(answer.message, ShardFound) or answer.message.index != shard.index:
            raise UnavailableError(f"{home} does not have shard {shard.index}")
        return self._checked_shard(address, shard, answer)

    def _checked_shard(self, address: BlockAddress, shard: Shard, answer: Answer) -> tuple[Buffer, Record]:
        """Raises PeerMisbehavedError unless the answer can be a shard of this code of this block."""
        message, body = answer.message, answer.body
        if not isinstance(message, ShardFound) or body is None or (message.k, message.m) != (shard.k, shard.m):
            raise PeerMisbehavedError(f"an answer that is no shard {shard.k}+{shard.m}")
        self._site.trust.check(message.record, address.ref, address.index)
        if len(body) != shard_length(address.length, shard.k):
            raise PeerMisbehavedError(f"a shard of {len(body)} bytes")
        if is_copy(shard) and not message.record.matches(body):
            raise PeerMisbehavedError(f"wrong bytes for {address.ref.digest} #{address.index}")
        return body, message.record

    async def _store_shard(self, block: BlockId, shard: Shard, data: Buffer, record: Record) -> None:
        piece = Piece(block) if is_copy(shard) else Piece(block, shard)
        if not self._site.tiers.holds(Piece(block)):
            await self._site.tiers.put(piece, data, record)

    # Being home

    async def home(self, address: BlockAddress) -> Obtained:
        """The whole block: held, or from members that hold it, or from the origin, once however many wait."""
        found = await self._given(Piece(address.block), address.ref)
        if found is not None:
            return Obtained(found[0], Source(found[1]))
        return await self._homes.do(address.work, lambda: self._obtain_block(address))

    async def _obtain_block(self, address: BlockAddress) -> Obtained:
        obtained = await self._from_site(address)
        if obtained is None and address.reader:
            obtained = await self._from_reader(address)
        if obtained is None:
            began = trio.current_time()
            locator = self._as_own_client(address).locator  # it may have come since
            if address.background:
                data = await self._in_background(locator, address)
            else:
                data = await self._origin.read(locator, address.ref, address.index)
                self._home_times.came(address.length, began, trio.current_time())
            obtained = Obtained(Held(data, self._claim(address, data)), Source.ORIGIN)
        if self._site.tiers.holds(Piece(address.block)):
            await self._site.tiers.discard(Piece(address.block))  # of another size, or signed by nobody who is known
        await self._site.tiers.put(Piece(address.block), obtained.held.data, obtained.held.record)
        return obtained

    async def _in_background(self, locator: Locator, address: BlockAddress) -> bytearray:
        with trio.move_on_after(BACKGROUND_S):
            return await self._origin.read(locator, address.ref, address.index, background=True)
        raise UnavailableError(f"{locator.upstream}: what clients read goes first")

    # What is not for everybody

    @contextmanager
    def granted(self, locator: Locator, digest: Digest) -> Iterator[None]:
        """Meanwhile a client of this node reads the object with the locator's grant."""
        locators = self._granted.setdefault(digest, [])
        locators.append(locator)
        try:
            yield
        finally:
            locators.remove(locator)
            if not locators and self._granted.get(digest) is locators:
                del self._granted[digest]

    def _as_own_client(self, address: BlockAddress) -> BlockAddress:
        """With the grant of a client that reads this very object here, and so will want this block anyway."""
        for locator in reversed(self._granted.get(address.ref.digest, [])):
            if replace(locator, grant=None) == address.locator:
                return replace(address, locator=locator, reader="")
        return address

    def reader_of(self, address: BlockAddress) -> str:
        """Who reads the block from the registry if need be, for a request; "" for whoever is its home."""
        return self._site.own if address.locator.grant else address.reader

    async def _from_reader(self, address: BlockAddress) -> Obtained | None:
        """The whole block, as the only shard of the code 1+0, from the member whose client's grant stays with it."""
        ref, peer = address.ref, PeerId(address.reader)
        question = GetShard(str(ref.digest), address.index, ref.size, 1, 0, 0, 1, str(address.locator), True)
        try:
            answer = await self.ask(peer, question, Lane.URGENT, SILENCE_S)
            return Obtained(Held(*self._checked_shard(address, Shard(1, 0, 0), answer)), Source.PEER, (peer,))
        except PeerMisbehavedError as error:
            self._site.view.quarantine(peer, str(error))
        except ShoalError as error:
            log.debug("%s #%d from its reader %s: %s", ref.digest, address.index, peer, error)
        return None

    async def reread(self, address: BlockAddress) -> Held:
        """The block as the registry itself gives it now, whatever its mirrors, this node or the site hold."""
        data = await self._origin.read_certain(address.locator, address.ref, address.index)
        return Held(data, self._claim(address, data))

    async def deceived(self, address: BlockAddress, claim: Record) -> bool:
        """Whether a claim found false is what a mirror gives, so that who signed it need not be a liar."""
        try:  # without a grant, with which no mirror is asked
            data = await self._origin.read(replace(address.locator, grant=None), address.ref, address.index)
        except (DeniedError, NotFoundError):
            return False
        return claim.matches(data)

    def _claim(self, address: BlockAddress, data: Buffer) -> Record:
        return make_record(address.ref, address.index, sha256(data).digest(), self._site.own, self._sign)

    async def admit(self, locator: Locator, ref: ObjectRef, body: bytes) -> None:
        """Store an object that came whole from the origin and was checked against its digest."""
        view = memoryview(body)
        for index in range(ref.block_count):
            address = BlockAddress(locator, ref, index)
            data = bytes(view[index * BLOCK_SIZE : index * BLOCK_SIZE + address.length])
            await self._site.tiers.put(Piece(address.block), data, self._claim(address, data))

    async def _from_site(self, address: BlockAddress) -> Obtained | None:
        """From members that hold the block, or k shards of it between them."""
        candidates = await self._candidates(address)
        if not candidates:
            return None
        async with trio.open_nursery() as nursery:
            for peer in candidates:
                nursery.start_soon(self._learn_holdings, peer, address.ref.digest)
        known = {peer: self._holdings.get((peer, address.ref.digest), Holdings()) for peer in candidates}
        for peer, holdings in known.items():
            if holdings.blocks >> address.index & 1:
                held = await self._whole_from(peer, address)
                if held is not None:
                    return Obtained(held, Source.PEER, (peer,))
        return await self._decoded_from(known, address)

    async def _candidates(self, address: BlockAddress) -> list[PeerId]:
        site = self._site
        if len(site.view.site) < 2:
            return []
        now = trio.current_time()
        _, keepers = site.placement().keepers(address.block, address.length)
        named = list(await self._find_holders(address.ref.digest))
        if named or keepers[0] != site.own or now - site.view.changed_at < UNSETTLED_S:
            named += keepers
        alive = {member.peer_id for member in site.view.site} - {site.own}
        unique = [peer for peer in dict.fromkeys(named) if peer in alive and not site.health.avoided(peer, now)]
        return unique[:MAX_CANDIDATES]

    async def _find_holders(self, digest: Digest) -> tuple[PeerId, ...]:
        found = self._holders.get(digest)
        if found is not None:
            return found
        found = ()
        for peer in self._site.placement().directory(digest):
            if self._site.health.avoided(peer, trio.current_time()):
                continue
            if peer == self._site.own:
                found = self._directory.holders(digest, trio.current_time())
            else:
                found = await self._ask_directory(peer, digest)
            if found:
                break
        self._holders[digest] = found
        return found

    async def _ask_directory(self, peer: PeerId, digest: Digest) -> tuple[PeerId, ...]:
        try:
            answer = await self.ask(peer, FindHolders(str(digest)), Lane.CONTROL, SMALL_SILENCE_S)
        except ShoalError as error:
            log.debug("directory %s: %s", peer, error)
            return ()
        return answer.message.peers if isinstance(answer.message, Holders) else ()

    async def _learn_holdings(self, peer: PeerId, digest: Digest) -> None:
        if (peer, digest) in self._holdings:
            return
        holdings = Holdings()
        try:
            answer = await self.ask(peer, GetHoldings(str(digest)), Lane.CONTROL, SMALL_SILENCE_S)
            if isinstance(answer.message, HoldingsFound):
                holdings = _unpack(answer.message)
        except ShoalError as error:
            log.debug("holdings of %s: %s", peer, error)
        self._holdings[peer, digest] = holdings

    async def _whole_from(self, peer: PeerId, address: BlockAddress) -> Held | None:
        ref = address.ref
        try:
            answer = await self.ask(peer, GetBlock(str(ref.digest), address.index, ref.size), Lane.BULK, SILENCE_S)
            if not isinstance(answer.message, BlockFound) or answer.body is None:
                return None
            self._site.trust.check(answer.message.record, ref, address.index)
            if not answer.message.record.matches(answer.body):
                raise PeerMisbehavedError(f"wrong bytes for {ref.digest} #{address.index}")
        except PeerMisbehavedError as error:
            self._site.view.quarantine(peer, str(error))
            return None
        except ShoalError as error:
            log.debug("block from %s: %s", peer, error)
            return None
        return Held(answer.body, answer.message.record)

    async def _decoded_from(self, known: dict[PeerId, Holdings], address: BlockAddress) -> Obtained | None:
        """From shards that an earlier view had members keep, whatever code that used."""
        by_code: dict[tuple[int, int], dict[int, PeerId]] = {}
        for peer, holdings in known.items():
            for shard, bits in holdings.shards.items():
                if bits >> address.index & 1:
                    by_code.setdefault((shard.k, shard.m), {}).setdefault(shard.index, peer)
        for (k, m), owners in by_code.items():
            if len(owners) >= k:
                chosen = dict(list(owners.items())[:k])
                held = await self._gather(chosen, k, m, address)
                if held is not None:
                    return Obtained(held, Source.PEER, tuple(chosen.values()))
        return None

    async def _gather(self, owners: dict[int, PeerId], k: int, m: int, address: BlockAddress) -> Held | None:
        shards: dict[int, tuple[Buffer, Record]] = {}

        async def take(index: int, peer: PeerId) -> None:
            question = GetShard(
                str(address.ref.digest), address.index, address.ref.size, k, m, index, 0, str(address.locator), True
            )
            try:
                answer = await self.ask(peer, question, Lane.BULK, SILENCE_S)
                if isinstance(answer.message, ShardFound) and answer.message.index == index:
                    shards[index] = self._checked_shard(address, Shard(k, m, index), answer)
            except ShoalError as error:
                log.debug("shard from %s: %s", peer, error)

        async with trio.open_nursery() as nursery:
            for index, peer in owners.items():
                nursery.start_soon(take, index, peer)
        if len(shards) < k:
            return None
        record = next(iter(shards.values()))[1]
        data = decode_block({index: body for index, (body, _) in shards.items()}, k, m, address.length)
        return Held(data, record) if record.matches(data) else None

    async def ask(
        self, peer: PeerId, question: Request, lane: Lane, silence_s: float, *,
        heard: Heard | None = None, took_s: Callable[[], float | None] = lambda: None,
    ) -> Answer:  # fmt: skip
        """One question to a member; what comes of it is noted in its health. A `Failed` is raised as an error.

        `took_s` tells once the answer is there what of the time was the peer's own, None where that is not known.
        """
        site, settled = self._site, False
        site.health.asked(peer)
        try:
            answer = await site.exchange.request(peer, question, lane=lane, silence_s=silence_s, heard=heard)
            settled = True
            site.health.answered(peer, took_s(), trio.current_time())
        except PeerUnavailableError:
            settled = True
            site.health.failed(peer, trio.current_time())
            site.view.report_failure(peer)
            raise
        finally:
            if not settled:
                site.health.dropped(peer)
        if isinstance(answer.message, Failed):
            raise_failed(answer.message)
        return answer


def _not_held() -> Answer:
    return Answer(Failed("not-held", "not held"))


def _cut(held: Held, shard: Shard) -> tuple[Shard, Buffer, Record]:
    return shard, encode_shard(held.data, shard.k, shard.m, shard.index), held.record


def _pack(holdings: Holdings) -> HoldingsFound:
    def bits(value: int) -> bytes:
        return value.to_bytes((value.bit_length() + 7) // 8, "little")

    return HoldingsFound(
        bits(holdings.blocks),
        tuple((s.k, s.m, s.index, bits(value)) for s, value in islice(holdings.shards.items(), MAX_BITMAPS)),
    )


def _unpack(found: HoldingsFound) -> Holdings:
    shards: Iterable[tuple[Shard, int]] = (
        (Shard(k, m, index), int.from_bytes(bits, "little")) for k, m, index, bits in found.shards
    )
    return Holdings(int.from_bytes(found.blocks, "little"), dict(shards))
