"""Reads stripes from their keepers: any k of the k + m shards of one signed record make a block.

protocol/fetch_plan.py decides which keepers to ask, and when an answer is late. This module makes the requests, decodes
the shards and checks each block against its record. A reader asks its own cell, then the root cell. A shard that is a
part of the block is received at its place in the block.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice

import trio

from cache.store import READ_HERE, Held
from node.blocks.keeper import Keeper, Sent
from node.blocks.questions import Asking, Questions
from node.blocks.trust import Suspicion
from node.blocks.values import Miss, Obtained, Site, Stretch, Taker, is_copy
from node.exchange.contract import Lane, State
from node.telemetry.sources import Source
from protocol.erasure import decode_block, encode_shard
from protocol.errors import PeerMisbehavedError, ShoalError, UnavailableError
from protocol.evidence import contradict
from protocol.fetch_plan import Ask, StripePlan
from protocol.health import SpareBudget
from protocol.ids import BlockId, Buffer, PeerId, Piece, Shard, shard_length
from protocol.messages import ShardFound
from protocol.placement import Geometry, Route
from protocol.records import Record
from protocol.shard_proofs import answerable_for

log = logging.getLogger(__name__)

COPY_PATIENCE_S = 6.0
"""Longest wait for a keeper of copies that only says that it works: a late shard shows by its siblings, a copy not."""
MAX_UNTANGLED = 64
"""Combinations of k shards that are tried in search of a wrong shard: 4 of 5 shards give 5, 10 of 12 give 66."""


@dataclass(slots=True)
class _Block:
    """A block, and what has arrived of it: shards by number, each with its sender, all under one record."""

    id: BlockId
    length: int
    shape: Geometry
    shards: dict[int, tuple[PeerId, Held]] = field(default_factory=dict)
    record: Record | None = None
    whole: bytearray | None = None
    """Memory for the block. Each data shard is received at its place in it."""

    def place(self, index: int) -> memoryview | None:
        """The place of a shard in the block, unless it does not fit there."""
        size = shard_length(self.length, self.shape.k)
        if index >= self.shape.k or (index + 1) * size > self.length:
            return None
        if self.whole is None:
            self.whole = bytearray(self.length)
        return memoryview(self.whole)[index * size : (index + 1) * size]

    def add(self, peer: PeerId, index: int, held: Held) -> bool:
        """Whether the shard is of the same block as those before it. Shards under a record with other bytes may be
        right, but are of no use here, and must not be compared with this block."""
        if self.record is None:
            self.record = held.record
        if self.record.sha256 != held.record.sha256:
            return False
        self.shards[index] = peer, held
        return True

    def decoded(self, chosen: Sequence[int]) -> Held | None:
        """The block from these shards, if it matches the record. Memory into which a late shard may still be received
        is not used for it."""
        shape, record = self.shape, self.record
        if record is None:
            return None
        shards = {index: self.shards[index][1].data for index in chosen}
        if is_copy(Shard(shape.k, shape.m, chosen[0])):
            data: Buffer = shards[chosen[0]]
        elif self.whole is not None and all(index < shape.k and self._is_placed(index) for index in chosen):
            data = self.whole
        else:
            data = decode_block(shards, shape.k, shape.m, self.length)
        return Held(data, record) if record.matches(data) else None

    def _is_placed(self, index: int) -> bool:
        data = self.shards[index][1].data if index in self.shards else None
        return isinstance(data, memoryview) and data.obj is self.whole


class CodedReads:
    """A `BlockSource`. If this node is one of the keepers, its own shard is read like those of others."""

    def __init__(self, site: Site, questions: Questions, keeper: Keeper) -> None:
        self._site, self._questions, self._keeper = site, questions, keeper
        self._budget = SpareBudget()

    async def find(self, stretch: Stretch, taker: Taker) -> None:
        site = self._site
        own_cell = site.placement().route(site.own, stretch.stripe, stretch.length)
        if own_cell.home == site.own:
            return
        await site.storing.room()
        left = stretch
        for route in dict.fromkeys((own_cell, own_cell.root)):
            attempt = _Attempt(site, self._questions, self._keeper, self._budget, left, route=route, taker=taker)
            await attempt.run()
            if not attempt.blocks:
                return
            left = stretch.only(attempt.blocks)
        if stretch.background:  # only its home reads such a block, and it cannot now
            raise attempt.failure or UnavailableError(f"{left} cannot be obtained now")
        for index, block in attempt.blocks.items():
            taker.missed(index, Miss(attempt.plan.retries + 1, partial(attempt.blame, block)))


class _Attempt:
    """One read of a stretch along one route. `blocks` are those that are not obtained yet, at last those that are not
    obtained at all."""

    def __init__(
        self,
        site: Site,
        questions: Questions,
        keeper: Keeper,
        budget: SpareBudget,
        stretch: Stretch,
        *,
        route: Route,
        taker: Taker,
    ) -> None:
        self._site, self._questions, self._keeper, self._budget = site, questions, keeper, budget
        self._stretch, self._route, self._taker = stretch, route, taker
        shape, ref = route.shape, stretch.ref
        self.blocks = {index: _Block(ref.block(index), ref.block_length(index), shape) for index in stretch.indices}
        self.failure: ShoalError | None = None
        own, health = site.own, site.health
        # The home also serves the other keepers: among equals it is asked last.
        others = sorted((peer for peer in route.keepers if peer != own), key=lambda peer: peer == route.home)
        order = health.order(others, trio.current_time())
        if own in route.keepers:
            # Other members will ask for this node's shards anyway: obtain them first, and only once.
            order.insert(0, own)
        self._order = order
        late, answered = health.late_after_s, health.answered_at
        self.plan = StripePlan(route.keepers, order, shape.k, stretch.indices, late, answered_at=answered)
        self._asking = Asking(self.plan, self._ask, self._overdue)

    async def run(self) -> None:
        """Ask keepers until k shards of each block have arrived, or no keeper is left to ask."""
        plan, health, shape, own = self.plan, self._site.health, self._route.shape, self._site.own
        self._budget.earned(shape.k * len(self.blocks))
        # A spare shard uses this node's link. If answers arrive evenly, it is requested only when a shard is late.
        steady = health.steady(peer for peer in self._order[: shape.k] if peer != own)
        await self._asking.run(plan.start(self._taker.urgent and not steady, trio.current_time()))
        for peer in plan.beaten if plan.done else ():
            health.beaten(peer, trio.current_time())
        for block in [block for block in self.blocks.values() if len(block.shards) >= shape.k]:
            await self._untangle(block)

    def _overdue(self) -> list[Ask]:
        """Requests that replace those given up, and requests for spare shards if shards are late."""
        plan, health, now = self.plan, self._site.health, trio.current_time()
        late, asks = self._questions.note_overdue(plan)
        for peer in plan.given_up:
            health.beaten(peer, now)
        for peer in plan.waited_for:
            if health.unfit(peer, now) and plan.has_spare:
                asks += plan.give_up(peer, now)
        for peer, since in plan.cold if self._route.shape.k == 1 else ():
            if now - since > COPY_PATIENCE_S:
                asks += plan.give_up(peer, now) if plan.has_spare else plan.failed(peer, now)
        for peer in late:
            if plan.has_spare and (self._taker.urgent or self._budget.spend()):
                asks += plan.spare(peer, now)
        return asks

    async def _ask(self, ask: Ask) -> None:
        stretch, shape, hops = self._stretch.only(ask.blocks), self._route.shape, self._route.hops
        shard = Shard(shape.k, shape.m, ask.want)
        try:
            if ask.peer == self._site.own:
                # As another keeper reports while it asks the home.
                self.plan.heard(ask.peer, False, trio.current_time())
                await self._keeper.own(stretch, shard, hops, partial(self._add_own, ask.want))
                return
            await self._questions.stream(
                ask.peer,
                stretch,
                shard,
                partial(self._part, ask.peer),
                hops=hops,
                lane=Lane.URGENT if self._taker.urgent else Lane.BULK,
                plan=self.plan,
                heard=partial(self._heard, ask.peer),
                into=self._into,
            )
            return
        except PeerMisbehavedError as error:
            self._site.view.quarantine(ask.peer, str(error))
        except ShoalError as error:
            log.debug("shards of %s from %s: %s", stretch, ask.peer, error)
            self.failure = error
        self._asking.more(self.plan.failed(ask.peer, trio.current_time()))

    def _heard(self, peer: PeerId, state: State) -> None:
        self.plan.heard(peer, state is State.READY, trio.current_time())

    def _into(self, message: ShardFound) -> memoryview | None:
        self._taker.warmed(message.record.index)
        block = self.blocks.get(message.record.index)
        return block.place(message.index) if block is not None else None

    def _part(self, peer: PeerId, message: ShardFound, body: Buffer) -> None:
        self._site.trust.check(message.record, self._stretch.ref, message.record.index)
        self._site.trust.check_maker(message.proof)
        self._site.facts.arrived(self._stretch.ref.digest, message.origin)
        self._add(peer, message.index, message.record.index, Held(body, message.record, message.proof))

    def _add_own(self, number: int, index: int, sent: Sent) -> None:
        held = sent[0]
        if index in self.blocks and (place := self.blocks[index].place(number)) is not None:
            place[:] = held.data
            held = held._replace(data=place)
        self._add(self._site.own, number, index, held)

    def _add(self, peer: PeerId, number: int, index: int, held: Held) -> None:
        """Shard `number` of block `index` came."""
        now, block = trio.current_time(), self.blocks.get(index)
        if block is not None and not block.add(peer, number, held):
            log.warning("two records of %s disagree", block.id)
            if block.record is not None and contradict(block.record, held.record):
                self._suspect(block.record, held.record)
            self._asking.more(self.plan.failed(peer, now, index))
            return
        is_last = self.plan.got(peer, index, now)
        if block is not None:
            self._taker.warmed(index)
            if is_last and (whole := block.decoded(tuple(block.shards))) is not None:
                self._got(block, whole)
        self._asking.more()

    def _got(self, block: _Block, whole: Held) -> None:
        del self.blocks[block.id.index]
        peers = tuple(peer for peer, _ in block.shards.values() if peer != self._site.own)
        self._site.keep(Piece(block.id), whole.data, whole.record, kept_for=READ_HERE)
        self._taker.got(block.id.index, Obtained(whole, Source.PEER, peers, self.plan.retries))

    async def _untangle(self, block: _Block) -> None:
        """The shards do not make the block: find the wrong one, with one shard more."""
        log.warning("shards of %s do not make the block: looking for the wrong one", block.id)
        for ask in self.plan.one_more(block.id.index, trio.current_time()):
            await self._ask(ask)
        for chosen in islice(combinations(block.shards, block.shape.k), MAX_UNTANGLED):
            await trio.lowlevel.checkpoint()
            if (whole := block.decoded(chosen)) is not None:
                await self.blame(block, Obtained(whole, Source.PEER))
                self._got(block, whole)
                return

    async def blame(self, block: _Block, truth: Obtained) -> None:
        """Quarantine the members that answer for wrong shards: by their signature, or because they sent them without
        a right one. Discard wrong shards of this node."""
        site, shape, claim, right = self._site, block.shape, block.record, truth.held
        if claim is not None and claim.sha256 != right.record.sha256:
            # Two records: the registry's own bytes decide (node/evidence/judge.py), not those of a mirror or a member.
            self._suspect(claim, right.record if contradict(claim, right.record) else None)
            return
        for number, (peer, held) in block.shards.items():
            shard = Shard(shape.k, shape.m, number)
            if memoryview(held.data) == memoryview(encode_shard(right.data, shape.k, shape.m, number)):
                continue
            if peer == site.own:
                await site.tiers.discard(Piece(block.id, shard))
            liar = answerable_for(peer, held.proof, held.record, shard, held.data)
            site.view.quarantine(liar, f"a wrong shard of {block.id.digest} #{block.id.index}")

    def _suspect(self, record: Record, other: Record | None) -> None:
        self._site.trust.suspect(Suspicion(record, str(self._stretch.locator), other=other))
