"""Reads a block from its keepers: any k of the k + m shards of one signed record make it.

protocol/fetch_plan.py decides which keepers to ask, and when an answer is late. This module makes the requests, decodes
the shards and checks the block against its record. A reader asks its own cell, then the root cell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice

import trio

from cache.store import READ_HERE, Held
from node.blocks.keeper import Keeper, Kept
from node.blocks.questions import Questions, carry_out
from node.blocks.trust import Suspicion
from node.blocks.values import SILENCE_S, BlockAddress, Miss, Obtained, Site
from node.exchange.contract import Lane
from node.telemetry.sources import Source
from protocol.erasure import decode_block, encode_shard
from protocol.errors import PeerMisbehavedError, ShoalError, UnavailableError
from protocol.evidence import contradict
from protocol.fetch_plan import Ask, ShardPlan
from protocol.health import SpareBudget
from protocol.ids import PeerId, Piece, Shard
from protocol.messages import ShardFound
from protocol.placement import Route
from protocol.records import Record
from protocol.shard_proofs import answerable_for

log = logging.getLogger(__name__)

MAX_UNTANGLED = 64
"""Combinations of k shards that are tried in search of a wrong shard: 4 of 5 shards give 5, 10 of 12 give 66."""


@dataclass(slots=True)
class _Attempt:
    address: BlockAddress
    route: Route
    plan: ShardPlan
    lane: Lane
    warmed: Callable[[], None]
    shards: dict[int, tuple[PeerId, Held]] = field(default_factory=dict)
    """By index, each with its sender."""
    record: Record | None = None
    failure: ShoalError | None = None

    def add(self, peer: PeerId, shard: Shard, held: Held) -> bool:
        """Whether the shard is of the same block as those before it. Shards under a record with other bytes may be
        right, but are of no use here, and must not be compared with this block."""
        if self.record is None:
            self.record = held.record
        if self.record.sha256 != held.record.sha256:
            return False
        self.shards.setdefault(shard.index, (peer, held))
        return True


class CodedReads:
    """A `BlockSource`. If this node is one of the keepers, its own shard is read like those of others."""

    def __init__(self, site: Site, questions: Questions, keeper: Keeper) -> None:
        self._site, self._questions, self._keeper = site, questions, keeper
        self._budget = SpareBudget()

    async def find(self, address: BlockAddress, urgent: bool, warmed: Callable[[], None]) -> Obtained | Miss | None:
        site = self._site
        own_cell = site.placement().route(site.own, address.block, address.length)
        if own_cell.home == site.own:
            return None
        for route in dict.fromkeys((own_cell, own_cell.root)):
            attempt = await self._attempt(address, route, urgent, warmed)
            held = await self._assemble(attempt)
            if held is not None:
                peers = tuple(peer for peer, _ in attempt.shards.values() if peer != site.own)
                attempt.shards.clear()  # as large as the block: free them before waiting for the disk
                await site.tiers.put(Piece(address.block), held.data, held.record, kept_for=READ_HERE)
                return Obtained(held, Source.PEER, peers, attempt.plan.retries)
        if address.background:  # only its home reads such a block, and it cannot now
            raise attempt.failure or UnavailableError(f"{address.block} cannot be obtained now")
        return Miss(attempt.plan.retries + 1, partial(self._blame, attempt))

    async def _attempt(self, address: BlockAddress, route: Route, urgent: bool, warmed: Callable[[], None]) -> _Attempt:
        """Ask keepers until k shards have arrived, or no keeper is left to ask."""
        own, health, shape, keepers = self._site.own, self._site.health, route.shape, route.keepers
        # The home also serves the other keepers: among equals it is asked last.
        others = sorted((peer for peer in keepers if peer != own), key=lambda peer: peer == route.home)
        order = health.order(others, trio.current_time())
        if own in keepers:
            # Other members will ask for this node's shard anyway: obtain it first, and only once.
            order.insert(0, own)
        plan = ShardPlan(keepers, order, shape.k, health.late_after_s, answered_at=health.answered_at)
        attempt = _Attempt(address, route, plan, lane=Lane.URGENT if urgent else Lane.BULK, warmed=warmed)
        self._budget.earned(shape.k)

        # A spare shard uses this node's link. If answers arrive evenly, it is requested only when a shard is late.
        all_at_once = urgent and not health.steady(peer for peer in order[: shape.k] if peer != own)
        asks = plan.start(all_at_once, trio.current_time())
        note, overdue = partial(self._note, attempt), partial(self._overdue, plan, urgent)
        await carry_out(plan, asks, partial(self._ask, attempt), note=note, overdue=overdue)
        if plan.done:
            for peer in plan.beaten:
                health.beaten(peer, trio.current_time())
        return attempt

    def _overdue(self, plan: ShardPlan, urgent: bool) -> list[Ask]:
        """Requests that replace those given up, and requests for spare shards if shards are late."""
        health, now = self._site.health, trio.current_time()
        late, asks = self._questions.note_overdue(plan)
        for peer in plan.given_up:
            health.beaten(peer, now)
        for peer in plan.waited_for:
            if health.unfit(peer, now) and plan.has_spare:
                asks += plan.give_up(peer, now)
        for _ in late:
            if plan.has_spare and (urgent or self._budget.spend()):
                asks += plan.spare(now)
        return asks

    async def _ask(self, attempt: _Attempt, ask: Ask) -> Kept | None:
        address, plan, shape, hops = attempt.address, attempt.plan, attempt.route.shape, attempt.route.hops
        shard = Shard(shape.k, shape.m, ask.want)
        try:
            if ask.peer == self._site.own:
                plan.heard(ask.peer, False, trio.current_time())  # as another keeper reports while it asks the home
                return await self._keeper.keep(address, shard, hops, exact=ask.exact)
            question = self._questions.get_shard(address, shard, hops=hops, exact=ask.exact)
            lane, ready = attempt.lane, attempt.warmed
            answer = await self._questions.ask(ask.peer, question, lane, SILENCE_S, plan=plan, ready=ready)
            message, body = answer.message, answer.body
            if not isinstance(message, ShardFound) or body is None:
                raise PeerMisbehavedError("an answer without a shard")
            self._site.trust.check(message.record, address.ref, address.index)
            self._site.trust.check_maker(message.proof)
            self._site.facts.arrived(address.ref.digest, message.origin)
            return Shard(message.k, message.m, message.index), Held(body, message.record, message.proof)
        except PeerMisbehavedError as error:
            self._site.view.quarantine(ask.peer, str(error))
        except ShoalError as error:
            log.debug("shard of %s from %s: %s", address.block, ask.peer, error)
            attempt.failure = error
        return None

    def _note(self, attempt: _Attempt, ask: Ask, answer: Kept | None) -> list[Ask]:
        peer, now = ask.peer, trio.current_time()
        if answer is None:
            return attempt.plan.failed(peer, now)
        shard, held = answer
        if not attempt.add(peer, shard, held):
            log.warning("two records of %s disagree", attempt.address.block)
            if attempt.record is not None and contradict(attempt.record, held.record):
                self._suspect(attempt, attempt.record, held.record)
            return attempt.plan.failed(peer, now)
        attempt.warmed()
        return attempt.plan.got(peer, shard.index, now)

    async def _assemble(self, attempt: _Attempt) -> Held | None:
        record, shape = attempt.record, attempt.route.shape
        if record is None or not attempt.plan.done:
            return None
        held = self._decode(attempt, record, tuple(attempt.shards))
        if held is not None:
            return held
        log.warning("shards of %s do not make the block: looking for the wrong one", attempt.address.block)
        for ask in attempt.plan.spare(trio.current_time()):
            if (answer := await self._ask(attempt, ask)) is not None:
                attempt.add(ask.peer, *answer)
        for chosen in islice(combinations(attempt.shards, shape.k), MAX_UNTANGLED):
            await trio.lowlevel.checkpoint()
            if (held := self._decode(attempt, record, chosen)) is not None:
                await self._blame(attempt, Obtained(held, Source.PEER))
                return held
        return None

    def _decode(self, attempt: _Attempt, record: Record, chosen: tuple[int, ...]) -> Held | None:
        shape, shards = attempt.route.shape, {index: attempt.shards[index][1].data for index in chosen}
        data = decode_block(shards, shape.k, shape.m, attempt.address.length)
        return Held(data, record) if record.matches(data) else None

    async def _blame(self, attempt: _Attempt, truth: Obtained) -> None:
        """Quarantine the members that answer for wrong shards: by their signature, or because they sent them without
        a right one. Discard wrong shards of this node."""
        site, shape, claim, right = self._site, attempt.route.shape, attempt.record, truth.held
        if claim is not None and claim.sha256 != right.record.sha256:
            # Two records: the registry's own bytes decide (node/evidence/judge.py), not those of a mirror or a member.
            self._suspect(attempt, claim, right.record if contradict(claim, right.record) else None)
            return
        for index, (peer, held) in attempt.shards.items():
            shard = Shard(shape.k, shape.m, index)
            if memoryview(held.data) == memoryview(encode_shard(right.data, shape.k, shape.m, index)):
                continue
            if peer == site.own:
                await site.tiers.discard(Piece(attempt.address.block, shard))
            liar = answerable_for(peer, held.proof, held.record, shard, held.data)
            site.view.quarantine(liar, f"a wrong shard of {attempt.address.ref.digest} #{attempt.address.index}")

    def _suspect(self, attempt: _Attempt, record: Record, other: Record | None) -> None:
        self._site.trust.suspect(Suspicion(record, str(attempt.address.locator), other=other))
