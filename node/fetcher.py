"""Reading a block for a client of this node: what is held, else any k shards of the keepers, else the origin."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import combinations

import trio

from cache.store import Buffer, Held
from node.exchange import Answer, Lane
from node.objects import Source
from node.seeder import SILENCE_S, BlockAddress, Obtained, Seeder, Site
from node.single_flight import SingleFlight, Ticket
from protocol.erasure import decode_block, encode_shard
from protocol.errors import PeerMisbehavedError, PeerUnavailableError, ShoalError, UnavailableError
from protocol.fetch_plan import Ask, ShardPlan
from protocol.health import SpareBudget
from protocol.ids import BlockId, PeerId, Piece, Shard, shard_length
from protocol.messages import GetShard, ShardFound
from protocol.placement import Geometry
from protocol.records import Record

log = logging.getLogger(__name__)

MAX_UNTANGLED = 64
"""Ways to choose k of the shards that are tried to find the wrong one; 4 of 5 has 5, 10 of 12 has 66."""


@dataclass(frozen=True, slots=True)
class _Event:
    """What came of one request; `answer` is None where nothing did, `heard` is an interim sign of life."""

    ask: Ask
    answer: Answer | None = None
    heard: bool = False


@dataclass(slots=True)
class _Attempt:
    """One coded read as it goes. `asked` has when each peer was asked, until it was heard from or found late."""

    address: BlockAddress
    shape: Geometry
    plan: ShardPlan
    lane: Lane
    asked: dict[PeerId, float] = field(default_factory=dict)
    shards: dict[int, tuple[PeerId, Buffer]] = field(default_factory=dict)
    record: Record | None = None


class Fetcher:
    def __init__(self, site: Site, seeder: Seeder, nursery: trio.Nursery) -> None:
        self._site, self._seeder = site, seeder
        self._budget = SpareBudget()
        self._reads: SingleFlight[tuple[BlockId, int], Obtained] = SingleFlight(nursery)

    def begin(self, address: BlockAddress, urgent: bool) -> Ticket[tuple[BlockId, int], Obtained]:
        """Start reading a block, or join its read that is under way. Raises UnavailableError and its like in `wait`."""
        return self._reads.join((address.block, address.ref.size), lambda: self._read(address, urgent))

    async def _read(self, address: BlockAddress, urgent: bool) -> Obtained:
        site = self._site
        found = await site.tiers.get(Piece(address.block), address.ref.size)
        if found is not None:
            return Obtained(found[0], Source(found[1]))
        shape, keepers = site.placement().keepers(address.block, address.length)
        attempt: _Attempt | None = None
        if keepers[0] != site.own:
            attempt = await self._coded(address, shape, keepers, urgent)
            held = await self._assemble(attempt)
            if held is not None:
                peers = tuple(peer for peer, _ in attempt.shards.values() if peer != site.own)
                attempt.shards.clear()  # a megabyte, which is not to wait for the disk
                await site.tiers.put(Piece(address.block), held.data, held.record)
                return Obtained(held, Source.PEER, peers, attempt.plan.retries)
        obtained = await self._seeder.home(address)
        if attempt is not None:
            await self._blame(attempt, obtained)
            return Obtained(obtained.held, obtained.source, obtained.peers, attempt.plan.retries + 1)
        return obtained

    # Asking

    async def _coded(
        self, address: BlockAddress, shape: Geometry, keepers: tuple[PeerId, ...], urgent: bool
    ) -> _Attempt:
        """Ask until k shards are there or nobody is left."""
        site = self._site
        order = site.health.order((peer for peer in keepers if peer != site.own), trio.current_time())
        if site.own in keepers:
            # Others will want this node's shard anyway, so it is had first, and once.
            order.insert(0, site.own)
        plan = ShardPlan(keepers, order, shape.k)
        attempt = _Attempt(address, shape, plan, Lane.URGENT if urgent else Lane.BULK)
        send, receive = trio.open_memory_channel[_Event](len(keepers) * 2)
        self._budget.earned(shape.k)
        async with trio.open_nursery() as nursery:

            def launch(asks: list[Ask]) -> None:
                for ask in asks:
                    attempt.asked[ask.peer] = trio.current_time()
                    nursery.start_soon(self._ask, ask, attempt, send)

            launch(plan.start(urgent))
            while not plan.done and not plan.stuck:
                with trio.move_on_at(self._next_late(attempt)) as waiting:
                    launch(self._note(attempt, await receive.receive()))
                if waiting.cancelled_caught:
                    launch(self._spare(attempt))
            nursery.cancel_scope.cancel()
        return attempt

    def _next_late(self, attempt: _Attempt) -> float:
        times = (since + self._site.health.late_after_s(peer) for peer, since in attempt.asked.items())
        return min(times, default=float("inf"))

    def _spare(self, attempt: _Attempt) -> list[Ask]:
        now = trio.current_time()
        late = [
            peer for peer, since in attempt.asked.items() if now >= since + self._site.health.late_after_s(peer) - 1e-6
        ]
        for peer in late:
            self._site.health.overdue(peer, now - attempt.asked.pop(peer))
        return attempt.plan.late() if late and self._budget.spend() else []

    async def _ask(self, ask: Ask, attempt: _Attempt, send: trio.MemorySendChannel[_Event]) -> None:
        if ask.peer == self._site.own:
            await send.send(_Event(ask, await self._ask_self(ask, attempt)))
        else:
            await send.send(_Event(ask, await self._ask_peer(ask, attempt)))

    async def _ask_self(self, ask: Ask, attempt: _Attempt) -> Answer | None:
        shape = attempt.shape
        try:
            shard, data, record = await self._seeder.keep(attempt.address, Shard(shape.k, shape.m, ask.want))
        except ShoalError as error:
            log.debug("own shard of %s: %s", attempt.address.block, error)
            return None
        return Answer(ShardFound(shard.k, shard.m, shard.index, record), data)

    async def _ask_peer(self, ask: Ask, attempt: _Attempt) -> Answer | None:
        site, address, started = self._site, attempt.address, trio.current_time()
        waited = False

        def heard() -> None:
            nonlocal waited
            waited = True
            attempt.asked.pop(ask.peer, None)

        question = GetShard(
            str(address.ref.digest), address.index, address.ref.size, attempt.shape.k, attempt.shape.m,
            ask.want, 2, str(address.locator), ask.exact,
        )  # fmt: skip
        site.health.asked(ask.peer)
        settled = False
        try:
            answer = await site.exchange.request(
                ask.peer, question, lane=attempt.lane, silence_s=SILENCE_S, heard=heard
            )
            settled = True
            site.health.answered(ask.peer, None if waited else trio.current_time() - started)
            if not isinstance(answer.message, ShardFound):
                return None
            self._check(attempt, answer)
        except PeerUnavailableError as error:
            settled = True
            site.health.failed(ask.peer, trio.current_time())
            site.view.report_failure(ask.peer)
            log.debug("shard of %s from %s: %s", address.block, ask.peer, error)
            return None
        except PeerMisbehavedError as error:
            site.view.quarantine(ask.peer, str(error))
            return None
        except UnavailableError as error:
            log.debug("shard of %s from %s: %s", address.block, ask.peer, error)
            return None
        finally:
            if not settled:
                site.health.dropped(ask.peer)
        return answer

    def _check(self, attempt: _Attempt, answer: Answer) -> None:
        """Raises PeerMisbehavedError unless the answer may be a shard of the block in the code that was asked for."""
        message, body, shape = answer.message, answer.body, attempt.shape
        if not isinstance(message, ShardFound) or body is None or (message.k, message.m) != (shape.k, shape.m):
            raise PeerMisbehavedError("a shard of another code than was asked for")
        if message.index >= shape.width or len(body) != shard_length(attempt.address.length, shape.k):
            raise PeerMisbehavedError(f"a shard {message.index} of {len(body)} bytes")
        self._site.trust.check(message.record, attempt.address.ref, attempt.address.index)

    def _note(self, attempt: _Attempt, event: _Event) -> list[Ask]:
        peer, answer = event.ask.peer, event.answer
        attempt.asked.pop(peer, None)
        if answer is None or answer.body is None or not isinstance(answer.message, ShardFound):
            return attempt.plan.failed(peer)
        if attempt.record is None:
            attempt.record = answer.message.record
        elif attempt.record.sha256 != answer.message.record.sha256:
            log.warning("two records of %s disagree", attempt.address.block)
            return attempt.plan.failed(peer)
        attempt.shards.setdefault(answer.message.index, (peer, answer.body))
        return attempt.plan.got(peer, answer.message.index)

    # Checking

    async def _assemble(self, attempt: _Attempt) -> Held | None:
        record, shape = attempt.record, attempt.shape
        if record is None or not attempt.plan.done:
            return None
        data = self._decode(attempt, tuple(attempt.shards))
        if record.matches(data):
            return Held(data, record)
        log.warning("shards of %s do not make the block: looking for the wrong one", attempt.address.block)
        for ask in attempt.plan.late():
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
        """Quarantine those whose shards are not those of the true block; of this node's own, drop it."""
        site, shape, claim = self._site, attempt.shape, attempt.record
        if claim is not None and claim.sha256 != truth.held.record.sha256:
            # Two claims. What this node itself just read from the registry decides; else the whole object will.
            if truth.source is Source.ORIGIN and claim.signer != site.own:
                site.view.quarantine(claim.signer, f"signed a false record of {attempt.address.block}")
            return
        for index, (peer, body) in attempt.shards.items():
            right = encode_shard(truth.held.data, shape.k, shape.m, index)
            if memoryview(body) == memoryview(right):
                continue
            if peer == site.own:
                await site.tiers.discard(Piece(attempt.address.block, Shard(shape.k, shape.m, index)))
            else:
                site.view.quarantine(peer, f"wrong shard of {attempt.address.ref.digest} #{attempt.address.index}")
