"""Sends requests to members, and notes in the health of each how it answered. `Asking` makes a plan's requests.

Every GetShards is made here, and shards and blocks that this node passes on to others are checked here. The exchange
has already checked that an answer fits its request: the block, the code, the shard and the length (`check_answer` in
protocol/wire.py).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from cache.store import Held
from node.blocks.values import LOOK_EVERY_S, SILENCE_S, Site, Stretch, is_copy
from node.exchange.contract import Answer, Into, Lane, State
from node.registry.contract import RegistryNews
from protocol import errors
from protocol.fetch_plan import Ask, StripePlan
from protocol.ids import Buffer, PeerId, Shard
from protocol.messages import Failed, GetShards, Request, ShardFound

Part = Callable[[ShardFound, Buffer], None]


class Questions:
    def __init__(self, site: Site, news: RegistryNews) -> None:
        self._site, self._news = site, news

    async def ask(
        self, peer: PeerId, question: Request, lane: Lane, silence_s: float, within_s: float = math.inf
    ) -> Answer:
        """Raises UnavailableError if the answer is `Failed`, else as Exchange.request. The code of a failure does not
        matter: only the registry itself can say that an object does not exist, or is denied. There is nothing that the
        peer could wait for, so an answer that takes longer than `within_s` counts as none, also if the peer says
        meanwhile that it works."""
        site = self._site
        site.health.asked(peer)
        try:
            with trio.fail_after(within_s):
                answer = await site.exchange.request(peer, question, lane=lane, silence_s=silence_s)
        except trio.TooSlowError:
            site.health.failed(peer, trio.current_time())
            raise errors.UnavailableError(f"{peer} did not answer within {within_s:.0f} s") from None
        except errors.PeerUnavailableError:
            site.health.failed(peer, trio.current_time())
            site.view.report_failure(peer)
            raise
        except BaseException:
            site.health.dropped(peer)
            raise
        site.health.answered(peer, None, trio.current_time())
        if isinstance(answer.message, Failed):
            raise errors.UnavailableError(f"{peer}: {answer.message.code}: {answer.message.text}")
        return answer

    async def stream(
        self,
        peer: PeerId,
        stretch: Stretch,
        shard: Shard,
        part: Part,
        *,
        hops: int,
        lane: Lane,
        keep: bool = False,
        plan: StripePlan | None = None,
        heard: Callable[[State], None] | None = None,
        into: Into = None,
    ) -> None:
        """Ask for a shard of each block of the stretch. `hops` limits the peer's requests; with `keep`, this node will
        keep the shards. `part` gets each shard as it arrives. Returns once all have come; raises UnavailableError if
        the peer cannot send them all, and as Exchange.stream. `plan` measures the peer's time."""
        site, left, scope = self._site, len(stretch.indices), trio.CancelScope()
        refusal: errors.ShoalError | None = None
        failed: Failed | None = None

        def came(message: ShardFound, body: Buffer) -> None:
            nonlocal left, refusal
            now, left = trio.current_time(), left - 1
            site.health.answered(peer, plan.took_s(peer, now) if plan is not None else None, now)
            try:
                part(message, body)
            except errors.ShoalError as error:
                refusal = error
                scope.cancel()

        question = self._question(stretch, shard, hops=hops, keep=keep)
        site.health.asked(peer, left)
        try:
            with scope:
                failed = await site.exchange.stream(
                    peer, question, lane=lane, silence_s=SILENCE_S, part=came, heard=heard, into=into
                )
        except errors.PeerUnavailableError:
            site.health.failed(peer, trio.current_time())
            site.view.report_failure(peer)
            left -= 1
            raise
        finally:
            site.health.dropped(peer, left)
        if refusal is not None:
            raise refusal
        if failed is not None:
            raise errors.UnavailableError(f"{peer}: {failed.code}: {failed.text}")

    async def stream_held(self, peer: PeerId, stretch: Stretch, shard: Shard, part: Part, *, within_s: float) -> None:
        """As `stream`, of what the peer has at hand: a shard that takes longer than `within_s` does not come."""
        with trio.CancelScope(deadline=trio.current_time() + within_s) as scope:

            def came(message: ShardFound, body: Buffer) -> None:
                scope.deadline = trio.current_time() + within_s
                part(message, body)

            await self.stream(peer, stretch, shard, came, hops=0, lane=Lane.BULK)
            return
        self._site.health.failed(peer, trio.current_time())
        raise errors.UnavailableError(f"{peer} did not answer within {within_s:.0f} s")

    def _question(self, stretch: Stretch, shard: Shard, *, hops: int, keep: bool) -> GetShards:
        first = stretch.indices[0]
        reader = self._site.own if stretch.locator.grant else stretch.reader
        return GetShards(
            digest=str(stretch.ref.digest),
            first=first,
            wanted=sum(1 << index - first for index in stretch.indices),
            size=stretch.ref.size,
            k=shard.k,
            m=shard.m,
            want=shard.index,
            hops=hops,
            source=str(stretch.locator),
            reader=reader if hops else "",  # a peer that uses only its stores need not know the reader
            background=stretch.background and hops > 0,
            asker=stretch.kept_for[-1] if stretch.kept_for and hops else "",
            keep=keep,
            reached=hops > 0 and self._news.answers(stretch.locator.upstream),
        )

    def checked(self, stretch: Stretch, message: ShardFound, body: Buffer, *, keep: bool = False) -> Held:
        """The shard or whole block of an answer; with `keep` it may be passed on. Raises as Trust.check, and
        PeerMisbehavedError if the bytes of a whole block, or the proof of a shard to keep, are wrong."""
        self._site.trust.check(message.record, stretch.ref, message.record.index)
        self._site.facts.arrived(stretch.ref.digest, message.origin)
        shard = Shard(message.k, message.m, message.index)
        if is_copy(shard):
            if not message.record.matches(body):
                raise errors.PeerMisbehavedError(f"wrong bytes for {message.record.digest} #{message.record.index}")
            return Held(body, message.record)
        if keep:
            self._site.trust.check_kept(message.proof, message.record, shard, body)
        return Held(body, message.record, message.proof)

    def note_overdue(self, plan: StripePlan) -> tuple[list[PeerId], list[Ask]]:
        """The peers that just became late, and the requests that replace those given up. Updates the health."""
        now = trio.current_time()
        late, asks = plan.overdue(now)
        for peer in late:
            self._site.health.overdue(peer, plan.took_s(peer, now) or 0.0, now)
        return late, asks


class Asking:
    """Makes a plan's requests in tasks until the plan is done or stuck; requests under way are then cancelled.

    `ask` makes one request and reports its answers to the plan; then it calls `more`, if need be with further requests.
    An exception that it raises ends the plan. `overdue` returns further requests. It is called when the plan's next
    check is due, and after LOOK_EVERY_S.
    """

    def __init__(
        self, plan: StripePlan, ask: Callable[[Ask], Awaitable[None]], overdue: Callable[[], list[Ask]]
    ) -> None:
        self._plan, self._ask, self._overdue = plan, ask, overdue
        self._wake, self._armed = trio.Event(), -math.inf
        self._nursery: trio.Nursery | None = None

    async def run(self, asks: list[Ask]) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.more(asks)
            while not self._plan.done and not self._plan.stuck:
                self._wake = trio.Event()
                self._armed = min(self._plan.next_check(), trio.current_time() + LOOK_EVERY_S)
                with trio.move_on_at(self._armed):
                    await self._wake.wait()
                    continue
                self.more(self._overdue())
            self._nursery = None
            nursery.cancel_scope.cancel()

    def more(self, asks: list[Ask] | None = None) -> None:
        """The plan has heard of something, and wants these requests. After the end of `run` none are made."""
        if self._nursery is None:
            return
        for ask in asks or ():
            self._nursery.start_soon(self._ask, ask)
        if self._plan.next_check() < self._armed or self._plan.done or self._plan.stuck:
            self._wake.set()
