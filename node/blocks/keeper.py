"""This node as keeper: it sends others the blocks and shards that it holds, and obtains its own shard if it lacks it.

Waits form no circle. Each request limits the hops that its receiver may still use. A reader asks the keepers of its
cell. A keeper asks a keeper in the cell above (`hops` 3 and more, one less at each step), in the root cell the home
(2). The home (1) asks the upstream, or members for what they hold (0). No request waits for a reader's own read.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from cache.store import Askers, Held
from node.blocks.grants import Grants
from node.blocks.home import Home
from node.blocks.questions import Questions, carry_out
from node.blocks.values import SILENCE_S, BlockAddress, Site, Work, is_copy
from node.exchange.contract import Answer, Lane
from node.identity.identity import Identity
from node.oci.references import Locator
from node.runtime.single_flight import SingleFlight
from protocol.erasure import encode_shard
from protocol.errors import PeerMisbehavedError, ShoalError, UnavailableError
from protocol.fetch_plan import Ask, ShardPlan
from protocol.ids import Digest, ObjectRef, PeerId, Piece, Shard
from protocol.messages import BlockFound, Failed, GetBlock, GetShard, ShardFound
from protocol.shard_proofs import make_proof

log = logging.getLogger(__name__)

Kept = tuple[Shard, Held]
"""A shard's place in its code; its bytes and the record of its block."""

HOME_PATIENCE_S = 8.0
"""Extra wait for a late home before another member acts for it, which costs a second copy from the upstream."""
MAX_HOMES = 3
"""The home and two that act for it. If all three fail, the reader itself reads the block from the upstream."""
_NOT_HELD = Answer(Failed("not-held", "not held"))


class Keeper:
    def __init__(
        self,
        site: Site,
        home: Home,
        questions: Questions,
        grants: Grants,
        *,
        identity: Identity,
        nursery: trio.Nursery,
    ) -> None:
        self._site, self._home, self._questions, self._grants = site, home, questions, grants
        self._identity = identity
        self._keeping: SingleFlight[tuple[Shard, Work], Held] = SingleFlight(nursery)

    async def handle(self, peer: PeerId, request: GetShard | GetBlock) -> Answer:
        ref = ObjectRef(Digest.parse(request.digest), request.size)
        self._site.check_size(ref)
        if isinstance(request, GetShard):
            return await self._answer_shard(request, ref, self._askers(peer, request))
        held = await self._site.trusted(Piece(ref.block(request.index)), ref.size, (peer,))
        if held is None:
            return _NOT_HELD
        return Answer(BlockFound(held[0].record, self._site.facts.origin(ref.digest)), held[0].data)

    def _askers(self, peer: PeerId, request: GetShard) -> Askers:
        """For whom the request has this node keep a piece. `peer` may have named an invented member."""
        asker = PeerId(request.asker)
        return (peer,) if asker == peer or self._site.view.find(asker) is None else (peer, asker)

    async def _answer_shard(self, request: GetShard, ref: ObjectRef, askers: Askers) -> Answer:
        shard = Shard(request.k, request.m, request.want)
        answer = await self._held_shard(ref, request.index, shard, askers, exact=request.exact)
        if answer is None:
            if request.hops == 0:
                return _NOT_HELD
            locator = Locator.parse(request.source)
            reader = "" if request.reader == self._site.own else request.reader
            background = request.background
            asked = BlockAddress(locator, ref, request.index, reader=reader, background=background, kept_for=askers)
            address = self._grants.as_own_client(asked)
            if request.hops == 1:
                answer = _cut((await self._home.block(address)).held, shard)
            else:
                answer = await self.keep(address, shard, request.hops, exact=request.exact)
        shard, held = self._with_proof(*answer) if request.keep else answer
        origin = self._site.facts.origin(ref.digest)
        return Answer(
            ShardFound(shard.k, shard.m, shard.index, held.record, origin=origin, proof=held.proof), held.data
        )

    async def _held_shard(
        self, ref: ObjectRef, index: int, shard: Shard, kept_for: Askers, *, exact: bool
    ) -> Kept | None:
        """The held shard, or without `exact` another one of the same code, which this node kept in an earlier view."""
        block = ref.block(index)
        whole = await self._site.trusted(Piece(block), ref.size, kept_for)
        if whole is not None:
            return _cut(whole[0], shard)
        held = self._site.tiers.holdings(block.digest).shards
        indices = [s.index for s, bits in held.items() if (s.k, s.m) == (shard.k, shard.m) and bits >> block.index & 1]
        if shard.index not in indices:
            if exact or not indices:
                return None
            shard = Shard(shard.k, shard.m, indices[0])
        kept = await self._site.trusted(Piece(block, shard), ref.size, kept_for)
        return (shard, kept[0]) if kept is not None else None

    async def keep(self, address: BlockAddress, shard: Shard, hops: int, *, exact: bool) -> Kept:
        """This node's shard of a block, or without `exact` another as in `_held_shard`. If none is held, it obtains the
        shard within `hops` and stores it."""
        held = await self._held_shard(address.ref, address.index, shard, address.kept_for, exact=exact)
        if held is not None:
            return held
        return shard, await self._keeping.do((shard, address.work), lambda: self._obtain_shard(address, shard, hops))

    async def _obtain_shard(self, address: BlockAddress, shard: Shard, hops: int) -> Held:
        """Obtain the shard from its source, which in the root cell is the home. If that fails, or is far slower than
        others, ask the next source; in the root cell, this one then acts as home."""
        site, health, now = self._site, self._site.health, trio.current_time()
        route = site.placement().route(site.own, address.block, address.length)
        sources = route.sources(shard.index, hops)
        usable = health.usable((peer for peer in sources if peer != site.own), now)
        most = 1 if address.background else MAX_HOMES
        homes = [peer for peer in sources if peer == site.own or peer in usable][:most]
        late, answered = health.late_after_s, health.answered_at
        plan = ShardPlan(homes, homes, 1, late, answered_at=answered, patience_s=HOME_PATIENCE_S)
        shards: list[Held] = []
        failures: list[ShoalError] = [UnavailableError(f"no home of {address.ref.digest} #{address.index} answers")]

        async def ask(request: Ask) -> Held | None:
            home = request.peer
            try:
                with self._home.times.waiting(home):
                    return await self._ask_home(home, address, shard, hops=sources[home], plan=plan)
            except PeerMisbehavedError as error:
                site.view.quarantine(home, str(error))
                failures.append(UnavailableError(str(error)))  # the asker of this node is not at fault
            except ShoalError as error:
                failures.append(error)
            return None

        def note(request: Ask, answer: Held | None) -> list[Ask]:
            if answer is None:
                return plan.failed(request.peer, trio.current_time())
            shards.append(answer)
            if plan.was_cold(request.peer):
                self._home.times.came(address.length, now, trio.current_time())
            return plan.got(request.peer, request.want, trio.current_time())

        def overdue() -> list[Ask]:
            now = trio.current_time()
            asks = self._questions.note_overdue(plan)[1]
            for home, asked_at in plan.cold:
                slow = not address.background and self._home.times.too_long(home, asked_at, route.depth, now)
                if health.unfit(home, now) or slow:
                    asks += plan.give_up(home, now)
            for home in plan.given_up:
                if not health.unfit(home, now):
                    log.info("%s obtains blocks too slowly: others act as home for it", home)
                    health.gave_up(home, now)
            return asks

        await carry_out(plan, plan.start(False, now), ask, note=note, overdue=overdue)
        if not shards:
            raise failures[-1]
        if not site.tiers.holds(Piece(address.block)):
            piece = Piece(address.block, None if is_copy(shard) else shard)
            held = shards[0]
            await site.tiers.replace(piece, held.data, held.record, held.proof, kept_for=address.kept_for)
        return shards[0]

    async def _ask_home(self, home: PeerId, address: BlockAddress, shard: Shard, *, hops: int, plan: ShardPlan) -> Held:
        if home == self._site.own:
            plan.heard(home, False, trio.current_time())  # as another home reports while it reads the block
            return self._with_proof(*_cut((await self._home.block(address)).held, shard))[1]
        question = self._questions.get_shard(address, shard, hops=hops, keep=True)
        answer = await self._questions.ask(home, question, Lane.URGENT, SILENCE_S, plan=plan)
        return self._questions.checked(address, answer, keep=True)

    def _with_proof(self, shard: Shard, held: Held) -> Kept:
        """A shard for a keeper. One that this node kept has its maker's proof; else this node just made it. A copy of
        the block needs none, because the record shows whether it is right."""
        if held.proof is not None or is_copy(shard):
            return shard, held
        proof = make_proof(held.record, shard, held.data, maker=self._site.own, sign=self._identity.sign)
        return shard, replace(held, proof=proof)


def _cut(held: Held, shard: Shard) -> Kept:
    return shard, Held(encode_shard(held.data, shard.k, shard.m, shard.index), held.record)
