"""Reading a block for a client of this node: what is held, else any k shards of the keepers, else the origin."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, takewhile

import trio

from cache.store import Held
from node.blocks.faults import Blame
from node.blocks.keeper import Seeder
from node.blocks.plan_runner import carry_out
from node.blocks.trust import Suspicion
from node.blocks.values import LOOK_EVERY_S, SILENCE_S, BlockAddress, Obtained, Site, Work
from node.exchange.contract import Answer, Lane
from node.runtime.single_flight import SingleFlight, Ticket
from node.telemetry.sources import Source
from protocol.erasure import decode_block, encode_shard
from protocol.errors import DeniedError, NotFoundError, PeerMisbehavedError, ShoalError, UnavailableError
from protocol.evidence import contradict
from protocol.fetch_plan import Ask, ShardPlan
from protocol.health import SpareBudget
from protocol.ids import Buffer, PeerId, Piece, Shard, shard_length
from protocol.messages import GetShard, ShardFound
from protocol.placement import Geometry, Route
from protocol.records import Record
from protocol.window import ReadWindow

log = logging.getLogger(__name__)

MAX_UNTANGLED = 64
"""Ways to choose k of the shards that are tried to find the wrong one; 4 of 5 has 5, 10 of 12 has 66."""


@dataclass(slots=True)
class _Attempt:
    """One coded read as it goes."""

    address: BlockAddress
    route: Route
    plan: ShardPlan
    lane: Lane
    shards: dict[int, tuple[PeerId, Buffer]] = field(default_factory=dict)
    record: Record | None = None
    failure: ShoalError | None = None

    @property
    def shape(self) -> Geometry:
        return self.route.shape


class Fetcher:
    def __init__(self, site: Site, seeder: Seeder, nursery: trio.Nursery) -> None:
        self._site, self._seeder = site, seeder
        self._budget = SpareBudget()
        self._wrong = Blame()
        self._reads: SingleFlight[Work, Obtained] = SingleFlight(nursery)
        self.window = ReadWindow()
        self.turned = trio.lowlevel.ParkingLot()
        """All of it is unparked whenever a block's read ends, or the block is in the site, or a client's read ends."""

    async def idle(self) -> None:
        """Until no client reads."""
        while self.window.clients:
            await self.turned.park()

    def begin(self, address: BlockAddress, urgent: bool) -> Ticket[Work, Obtained]:
        """Start reading a block, or join its read that is under way. Raises UnavailableError and its like in `wait`."""
        if address.work not in self._reads:
            self.window.began(address.key, trio.current_time())
        return self._reads.join(address.work, lambda: self._timed(address, urgent))

    async def _timed(self, address: BlockAddress, urgent: bool) -> Obtained:
        began = trio.current_time()
        try:
            return replace(await self._read(address, urgent), seconds=trio.current_time() - began)
        finally:
            self.window.ended(address.key, trio.current_time())
            self.turned.unpark_all()

    def _warmed(self, address: BlockAddress) -> None:
        if self.window.warmed(address.key, trio.current_time()):
            self.turned.unpark_all()

    async def _read(self, address: BlockAddress, urgent: bool) -> Obtained:
        site = self._site
        found = await site.tiers.get(Piece(address.block), address.ref.size)
        if found is not None:
            return Obtained(found[0], Source(found[1]))
        route = site.placement().route(site.own, address.block, address.length)
        attempt: _Attempt | None = None
        for way in dict.fromkeys((route, route.root)) if route.home != site.own else ():
            attempt = await self._coded(address, way, urgent)
            held = await self._assemble(attempt)
            if held is not None:
                peers = tuple(peer for peer, _ in attempt.shards.values() if peer != site.own)
                attempt.shards.clear()  # as much as the block, and not to wait for the disk
                await site.tiers.put(Piece(address.block), held.data, held.record)
                return Obtained(held, Source.PEER, peers, attempt.plan.retries)
            if isinstance(attempt.failure, (DeniedError, NotFoundError)):
                break
        if attempt is not None and address.background:  # what its home does not read now nobody does
            raise attempt.failure or UnavailableError(f"{address.block} is not to be had now")
        obtained = await self._seeder.home(address)
        self._warmed(address)
        if attempt is not None:
            await self._blame(attempt, obtained)
            return Obtained(obtained.held, obtained.source, obtained.peers, attempt.plan.retries + 1)
        return obtained

    # Asking

    async def _coded(self, address: BlockAddress, route: Route, urgent: bool) -> _Attempt:
        """Ask until k shards are there or nobody is left."""
        site = self._site
        health, shape, keepers = site.health, route.shape, route.keepers
        # The home also feeds the other keepers: of equals it is asked last.
        others = sorted((peer for peer in keepers if peer != site.own), key=lambda peer: peer == route.home)
        order = health.order(others, trio.current_time())
        if site.own in keepers:
            # Others will want this node's shard anyway, so it is had first, and once.
            order.insert(0, site.own)
        plan = ShardPlan(keepers, order, shape.k, health.late_after_s, health.answered_at)
        attempt = _Attempt(address, route, plan, Lane.URGENT if urgent else Lane.BULK)
        self._budget.earned(shape.k)

        async def ask(what: Ask) -> Answer | None:
            return await (self._ask_self if what.peer == site.own else self._ask_peer)(what, attempt)

        # A spare takes its part of the reader's link: where answers come evenly it can wait until one is late.
        all_at_once = urgent and not health.steady(peer for peer in order[: shape.k] if peer != site.own)
        asks = plan.start(all_at_once, trio.current_time())
        await carry_out(
            plan, asks, ask, partial(self._note, attempt), partial(self._overdue, plan, urgent), LOOK_EVERY_S
        )
        if plan.done:
            for peer in plan.beaten:
                health.beaten(peer, trio.current_time())
        return attempt

    def _overdue(self, plan: ShardPlan, urgent: bool) -> list[Ask]:
        """Whom to ask for those who are given up, and as spares for those who are late."""
        health, now = self._site.health, trio.current_time()
        late, asks = self._seeder.note_overdue(plan)
        for peer in plan.given_up:
            health.beaten(peer, now)
        for peer in plan.waited_for:
            if health.unfit(peer, now) and plan.has_spare:
                asks += plan.give_up(peer, now)
        for _ in late:
            if plan.has_spare and (urgent or self._budget.spend()):
                asks += plan.spare(now)
        return asks

    async def _ask_self(self, ask: Ask, attempt: _Attempt) -> Answer | None:
        shape = attempt.shape
        attempt.plan.heard(ask.peer, False, trio.current_time())  # as another keeper would say while it asks the home
        try:
            shard, data, record = await self._seeder.keep(
                attempt.address, Shard(shape.k, shape.m, ask.want), attempt.route.reach, exact=ask.exact
            )
        except ShoalError as error:
            log.debug("own shard of %s: %s", attempt.address.block, error)
            attempt.failure = error
            return None
        return Answer(ShardFound(shard.k, shard.m, shard.index, record), data)

    async def _ask_peer(self, ask: Ask, attempt: _Attempt) -> Answer | None:
        site, address, plan = self._site, attempt.address, attempt.plan
        question = GetShard(
            str(address.ref.digest), address.index, address.ref.size, attempt.shape.k, attempt.shape.m,
            ask.want, attempt.route.reach, str(address.locator), ask.exact, self._seeder.reader_of(address),
            address.background,
        )  # fmt: skip

        def heard(ready: bool) -> None:
            plan.heard(ask.peer, ready, trio.current_time())
            if ready:
                self._warmed(address)

        try:
            answer = await self._seeder.ask(
                ask.peer, question, attempt.lane, SILENCE_S,
                heard=heard, took_s=lambda: plan.took_s(ask.peer, trio.current_time()),
            )  # fmt: skip
            self._check(attempt, answer)
        except PeerMisbehavedError as error:
            site.view.quarantine(ask.peer, str(error))
            return None
        except ShoalError as error:
            log.debug("shard of %s from %s: %s", address.block, ask.peer, error)
            attempt.failure = error
            return None
        return answer

    def _check(self, attempt: _Attempt, answer: Answer) -> None:
        """Raises PeerMisbehavedError unless the answer may be a shard of the block in the code that was asked for."""
        message, body, shape = answer.message, answer.body, attempt.shape
        if not isinstance(message, ShardFound) or body is None or (message.k, message.m) != (shape.k, shape.m):
            raise PeerMisbehavedError("a shard of another code than was asked for")
        if message.index >= shape.width or len(body) != shard_length(attempt.address.length, shape.k):
            raise PeerMisbehavedError(f"a shard {message.index} of {len(body)} bytes")
        self._site.trust.check(message.record, attempt.address.ref, attempt.address.index)

    def _note(self, attempt: _Attempt, ask: Ask, answer: Answer | None) -> list[Ask]:
        peer, now = ask.peer, trio.current_time()
        if answer is None or answer.body is None or not isinstance(answer.message, ShardFound):
            return attempt.plan.failed(peer, now)
        if attempt.record is None:
            attempt.record = answer.message.record
        elif attempt.record.sha256 != answer.message.record.sha256:
            log.warning("two records of %s disagree", attempt.address.block)
            if contradict(attempt.record, answer.message.record):
                source = str(attempt.address.locator)
                self._site.trust.suspect(Suspicion(attempt.record, source, other=answer.message.record))
            return attempt.plan.failed(peer, now)
        self._warmed(attempt.address)
        attempt.shards.setdefault(answer.message.index, (peer, answer.body))
        return attempt.plan.got(peer, answer.message.index, now)

    # Checking

    async def _assemble(self, attempt: _Attempt) -> Held | None:
        record, shape = attempt.record, attempt.shape
        if record is None or not attempt.plan.done:
            return None
        data = self._decode(attempt, tuple(attempt.shards))
        if record.matches(data):
            return Held(data, record)
        log.warning("shards of %s do not make the block: looking for the wrong one", attempt.address.block)
        for ask in attempt.plan.spare(trio.current_time()):
            answer = await self._ask_peer(ask, attempt)
            if answer is not None and answer.body is not None and isinstance(answer.message, ShardFound):
                attempt.shards.setdefault(answer.message.index, (ask.peer, answer.body))
        for number, chosen in enumerate(combinations(attempt.shards, shape.k)):
            if number >= MAX_UNTANGLED:
                break
            data = self._decode(attempt, chosen)
            if record.matches(data):
                held = Held(data, record)
                await self._blame(attempt, Obtained(held, Source.PEER))
                return held
        return None

    def _decode(self, attempt: _Attempt, chosen: tuple[int, ...]) -> bytearray:
        shape = attempt.shape
        shards = {index: attempt.shards[index][1] for index in chosen}
        return decode_block(shards, shape.k, shape.m, attempt.address.length)

    async def _blame(self, attempt: _Attempt, truth: Obtained) -> None:
        """Quarantine who made shards wrong, as far as that is clear (node/blocks/faults.py); drop this node's own."""
        site, shape, claim = self._site, attempt.shape, attempt.record
        if claim is not None and claim.sha256 != truth.held.record.sha256:
            # Two claims: the registry decides, and no mirror or member.
            record = truth.held.record
            other = record if contradict(claim, record) else None
            site.trust.suspect(Suspicion(claim, str(attempt.address.locator), other=other))
            return
        for index, (peer, body) in attempt.shards.items():
            if memoryview(body) == memoryview(encode_shard(truth.held.data, shape.k, shape.m, index)):
                continue
            if peer == site.own:
                await site.tiers.discard(Piece(attempt.address.block, Shard(shape.k, shape.m, index)))
            liar = self._wrong.wrong(attempt.route.makers(peer, index) | self._former_makers(attempt, peer, index))
            if liar is not None:
                site.view.quarantine(liar, f"wrong shards of {attempt.address.ref.digest} #{attempt.address.index}")

    def _former_makers(self, attempt: _Attempt, peer: PeerId, index: int) -> frozenset[PeerId]:
        """Those who were makers before some were gone or in quarantine: keepers may have their shards from them."""
        address, site = attempt.address, self._site
        once = site.placement().of(site.view.known).route(site.own, address.block, address.length)
        homes = takewhile(lambda peer: peer != attempt.route.home, once.cells[-1])
        return frozenset(homes) | once.makers(peer, index)
