"""This node as keeper: it sends others the blocks and shards that it holds, and obtains its own shards that it lacks.

Waits form no circle. Each request limits the hops that its receiver may still use. A reader asks the keepers of its
cell. A keeper asks a keeper in the cell above (`hops` 3 and more, one less at each step), in the root cell the home
(2). The home (1) asks the upstream, or members for what they hold (0). No request waits for a reader's own read.

A shard that arrives is at once on its way to all members that wait for it: it is queued on their connections by plain
calls (node/runtime/shared_work.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from cache.store import Askers, Held
from node.blocks.grants import Grants
from node.blocks.home import Home
from node.blocks.questions import Asking, Questions
from node.blocks.values import Group, Obtained, Site, Stretch, is_copy
from node.exchange.contract import Lane, Sender, State
from node.identity.identity import Identity
from node.oci.references import Locator
from node.registry.contract import RegistryNews
from node.runtime.shared_work import Flow, SharedWork
from protocol.erasure import encode_shard
from protocol.errors import PeerMisbehavedError, ShoalError, UnavailableError
from protocol.fetch_plan import Ask, StripePlan
from protocol.ids import Buffer, Digest, ObjectRef, PeerId, Shard
from protocol.messages import GetShards, ShardFound
from protocol.shard_proofs import make_proof

log = logging.getLogger(__name__)

HOME_PATIENCE_S = 8.0
"""Extra wait for a late home before another member acts for it, which costs a second copy from the upstream."""
MAX_HOMES = 3
"""The home and two that act for it. If all three fail, the reader itself reads the blocks from the upstream."""

Took = Callable[[int, Held], None]
"""Takes the shard of the block with this index."""
Sent = tuple[Held, PeerId]
"""A shard, and the member that sent it: this node, if it held the shard."""
Arrived = Callable[[int, Sent], None]
Keeping = tuple[Shard, Group]


class Keeper:
    def __init__(
        self,
        site: Site,
        home: Home,
        questions: Questions,
        grants: Grants,
        *,
        identity: Identity,
        news: RegistryNews,
    ) -> None:
        self._site, self._home, self._questions, self._grants = site, home, questions, grants
        self._identity, self._news = identity, news
        self._keeping: SharedWork[Keeping, Sent] = SharedWork(site.nursery)

    async def handle(self, peer: PeerId, request: GetShards, sender: Sender) -> None:
        stretch, shard, send = self._understood(peer, request, sender)
        if request.hops == 1:
            await self._home.blocks(stretch, partial(_cut, shard, send), sender.coming)
            return
        missing = await self._send_held(stretch, shard, send, sender)
        if missing and request.hops:

            def took(index: int, sent: Sent) -> None:
                send(index, sent[0])

            await self._keep(stretch.only(missing), shard, request.hops, took, progress=sender.coming)

    def at_once(self, peer: PeerId, request: GetShards, sender: Sender) -> bool:
        """Answer from memory, if it has all that is wanted."""
        stretch, shard, send = self._understood(peer, request, sender)
        held = [self._held_now(stretch, index, shard) for index in stretch.indices]
        for index, found in zip(stretch.indices, held, strict=True) if all(held) else ():
            assert found is not None
            send(index, found)
        return all(held)

    def _understood(self, peer: PeerId, request: GetShards, sender: Sender) -> tuple[Stretch, Shard, Took]:
        """The blocks that are wanted, the shard of them, and the function that sends one. Raises ShoalError."""
        ref, shard = ObjectRef(Digest.parse(request.digest), request.size), Shard(request.k, request.m, request.want)
        self._site.check_size(ref)
        asked = Stretch(
            Locator.parse(request.source),
            ref,
            tuple(request.first + bit for bit in range(request.wanted.bit_length()) if request.wanted >> bit & 1),
            reader="" if request.reader == self._site.own else request.reader,
            background=request.background,
            kept_for=self._askers(peer, request),
        )
        if request.reached:
            self._news.told(asked.locator.upstream)

        def send(index: int, held: Held) -> None:
            if request.keep:
                held = self._with_proof(shard, held)
            origin = self._site.facts.origin(ref.digest)
            found = ShardFound(shard.k, shard.m, shard.index, held.record, origin=origin, proof=held.proof)
            sender.send(found, held.data)

        return self._grants.as_own_client(asked), shard, send

    def _askers(self, peer: PeerId, request: GetShards) -> Askers:
        """For whom the request has this node keep a piece. `peer` may have named an invented member."""
        asker = PeerId(request.asker)
        return (peer,) if asker == peer or self._site.view.find(asker) is None else (peer, asker)

    async def _send_held(self, stretch: Stretch, shard: Shard, send: Took, sender: Sender) -> list[int]:
        """Send the shards of held pieces, as the connection has room. Returns the indices of the other blocks."""
        missing = []
        for index in stretch.indices:
            held = self._held_now(stretch, index, shard)
            if held is None and any(self._site.tiers.holds(stretch.piece(index, kind)) for kind in (None, shard)):
                await sender.room()
                held = await self._held(stretch, index, shard)
            if held is None:
                missing.append(index)
            else:
                send(index, held)
        return missing

    def _held_now(self, stretch: Stretch, index: int, shard: Shard) -> Held | None:
        """The shard, if the memory has it or its block."""
        for kind in (None, shard):
            piece = stretch.piece(index, kind)
            found = self._site.tiers.get_nowait(piece, stretch.ref.size)
            if found is not None and self._site.is_trusted(piece, found[0]):
                return found[0] if kind is not None else _shard_of(shard, found[0])
        return None

    async def _held(self, stretch: Stretch, index: int, shard: Shard) -> Held | None:
        size, kept_for = stretch.ref.size, stretch.kept_for
        whole = await self._site.trusted(stretch.piece(index), size, kept_for)
        if whole is not None:
            return _shard_of(shard, whole[0])
        kept = await self._site.trusted(stretch.piece(index, shard), size, kept_for)
        return kept[0] if kept is not None else None

    async def own(self, stretch: Stretch, shard: Shard, hops: int, took: Arrived) -> None:
        """This node's shards of a stretch, for its own read. Those that it lacks it obtains within `hops`, and keeps
        them. Returns once all have come; raises the first error."""
        missing = []
        for index in stretch.indices:
            held = await self._held(stretch, index, shard)
            if held is None:
                missing.append(index)
            else:
                took(index, (held, self._site.own))
        if missing:
            await self._keep(stretch.only(missing), shard, hops, took)

    async def _keep(
        self,
        stretch: Stretch,
        shard: Shard,
        hops: int,
        took: Arrived,
        *,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        work = partial(self._obtain, stretch, shard, hops)
        await self._keeping.obtain((shard, stretch.group), stretch.indices, work, took, progress=progress)

    async def _obtain(self, stretch: Stretch, shard: Shard, hops: int, flow: Flow[Keeping, Sent]) -> None:
        await _Obtaining(self._site, self._home, self._questions, stretch.only(flow.left), shard, flow).run(hops)

    def _with_proof(self, shard: Shard, held: Held) -> Held:
        """A shard for a keeper. One that this node kept has its maker's proof; else this node just made it. A copy of
        the block needs none, because the record shows whether it is right."""
        if held.proof is not None or is_copy(shard):
            return held
        proof = make_proof(held.record, shard, held.data, maker=self._site.own, sign=self._identity.sign)
        return held._replace(proof=proof)


class _Obtaining:
    """Obtains this node's shards of a stretch from their source, which in the root cell is the home. If that fails, or
    is far slower than others, the next source is asked; in the root cell, this one then acts as home."""

    def __init__(
        self,
        site: Site,
        home: Home,
        questions: Questions,
        stretch: Stretch,
        shard: Shard,
        flow: Flow[Keeping, Sent],
    ) -> None:
        self._site, self._home, self._questions = site, home, questions
        self._stretch, self._shard, self._flow = stretch, shard, flow
        self._failures: list[ShoalError] = [UnavailableError(f"no home of {stretch} answers")]

    async def run(self, hops: int) -> None:
        await self._site.storing.room()
        site, stretch, health, now = self._site, self._stretch, self._site.health, trio.current_time()
        self._route = site.placement().route(site.own, stretch.stripe, stretch.length)
        self._sources = self._route.sources(self._shard.index, hops)
        usable = health.usable((peer for peer in self._sources if peer != site.own), now)
        most = 1 if stretch.background else MAX_HOMES
        homes = [peer for peer in self._sources if peer == site.own or peer in usable][:most]
        late, answered = health.late_after_s, health.answered_at
        self._plan = StripePlan(
            homes, homes, 1, stretch.indices, late, answered_at=answered, patience_s=HOME_PATIENCE_S
        )
        self._since: dict[PeerId, float] = {}
        """When each home was asked, or last sent a shard."""
        self._asking = Asking(self._plan, self._ask, self._overdue)
        await self._asking.run(self._plan.start(False, now))
        if self._flow.left:
            raise self._failures[-1]

    async def _ask(self, ask: Ask) -> None:
        home, stretch = ask.peer, self._stretch.only(ask.blocks)
        self._since[home] = trio.current_time()
        try:
            with self._home.times.waiting(home):
                if home == self._site.own:
                    self._heard(home, State.WAITING)  # as another home reports while it reads the blocks
                    took = partial(_cut, self._shard, partial(self._took, home))
                    await self._home.blocks(stretch, took, partial(self._heard, home, State.COMING))
                    return
                await self._questions.stream(
                    home,
                    stretch,
                    self._shard,
                    partial(self._part, home),
                    hops=self._sources[home],
                    lane=Lane.URGENT,
                    keep=True,
                    plan=self._plan,
                    heard=partial(self._heard, home),
                )
                return
        except PeerMisbehavedError as error:
            self._site.view.quarantine(home, str(error))
            self._failures.append(UnavailableError(str(error)))  # the asker of this node is not at fault
        except ShoalError as error:
            self._failures.append(error)
        self._asking.more(self._plan.failed(home, trio.current_time()))

    def _part(self, home: PeerId, message: ShardFound, body: Buffer) -> None:
        self._took(home, message.record.index, self._questions.checked(self._stretch, message, body, keep=True))

    def _took(self, home: PeerId, index: int, held: Held) -> None:
        now = trio.current_time()
        if self._plan.was_cold(home):
            self._home.times.came(held.record.length, self._since[home], now)
            self._home.times.coming(home, now)
        self._since[home] = now
        self._plan.got(home, index, now)
        stretch, shard = self._stretch, self._shard
        if not self._site.tiers.holds(stretch.piece(index)):
            piece = stretch.piece(index, None if is_copy(shard) else shard)
            self._site.keep(piece, held.data, held.record, held.proof, kept_for=stretch.kept_for)
        self._flow.deliver(index, (held, home))
        if self._plan.done:
            self._asking.more()

    def _heard(self, home: PeerId, state: State) -> None:
        self._plan.heard(home, state is State.READY, trio.current_time())
        if state is State.COMING:
            self._home.times.coming(home, trio.current_time())
            self._flow.progress()

    def _overdue(self) -> list[Ask]:
        plan, health, times, now = self._plan, self._site.health, self._home.times, trio.current_time()
        asks = self._questions.note_overdue(plan)[1]
        for home, asked_at in plan.cold:
            slow = not self._stretch.background and times.too_long(home, asked_at, self._route.depth, now)
            if health.unfit(home, now) or slow:
                asks += plan.give_up(home, now)
        for home in plan.given_up:
            if not health.unfit(home, now):
                log.info("%s obtains blocks too slowly: others act as home for it", home)
                health.gave_up(home, now)
        return asks


def _shard_of(shard: Shard, held: Held) -> Held:
    return Held(encode_shard(held.data, shard.k, shard.m, shard.index), held.record)


def _cut(shard: Shard, took: Took, index: int, obtained: Obtained) -> None:
    took(index, _shard_of(shard, obtained.held))
