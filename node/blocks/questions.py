"""Sends requests to members, and notes in the health of each how it answered. `carry_out` makes a plan's requests.

Every GetShard is made here, and shards and blocks that this node passes on to others are checked here. The exchange has
already checked that an answer fits its request: the block, the code, the length, and with `exact` the shard
(`check_answer` in protocol/wire.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from cache.store import Held
from node.blocks.values import LOOK_EVERY_S, BlockAddress, Site, is_copy
from node.exchange.contract import Answer, Lane
from protocol import errors
from protocol.fetch_plan import Ask, ShardPlan
from protocol.ids import PeerId, Shard
from protocol.messages import BlockFound, Failed, GetShard, Request, ShardFound

T = TypeVar("T")


class Questions:
    def __init__(self, site: Site) -> None:
        self._site = site

    async def ask(
        self,
        peer: PeerId,
        question: Request,
        lane: Lane,
        silence_s: float,
        *,
        plan: ShardPlan | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Raises UnavailableError if the answer is `Failed`, else as Exchange.request. The code of a failure does not
        matter: only the registry itself can say that an object does not exist, or is denied. `plan` follows the peer's
        progress and measures its time. `ready` is called once the peer has the answer."""

        def heard(is_ready: bool) -> None:
            if plan is not None:
                plan.heard(peer, is_ready, trio.current_time())
            if is_ready:
                ready()

        site = self._site
        site.health.asked(peer)
        try:
            answer = await site.exchange.request(peer, question, lane=lane, silence_s=silence_s, heard=heard)
        except errors.PeerUnavailableError:
            site.health.failed(peer, trio.current_time())
            site.view.report_failure(peer)
            raise
        except BaseException:
            site.health.dropped(peer)
            raise
        now = trio.current_time()
        site.health.answered(peer, plan.took_s(peer, now) if plan is not None else None, now)
        if isinstance(answer.message, Failed):
            raise errors.UnavailableError(f"{peer}: {answer.message.code}: {answer.message.text}")
        return answer

    async def ask_held(self, peer: PeerId, question: Request, lane: Lane, silence_s: float, within_s: float) -> Answer:
        """As `ask`, about what the peer has at hand: there is nothing to wait for, so an answer that takes longer than
        `within_s` counts as none, also if the peer says meanwhile that it works."""
        with trio.move_on_after(within_s):
            return await self.ask(peer, question, lane, silence_s)
        self._site.health.failed(peer, trio.current_time())
        raise errors.UnavailableError(f"{peer} did not answer within {within_s:.0f} s")

    def get_shard(
        self, address: BlockAddress, shard: Shard, *, hops: int, exact: bool = True, keep: bool = False
    ) -> GetShard:
        """A request for a shard, or without `exact` for any shard of its code. `hops` limits the peer's requests. With
        `keep`, this node will keep the shard."""
        reader = self._site.own if address.locator.grant else address.reader
        return GetShard(
            digest=str(address.ref.digest),
            index=address.index,
            size=address.ref.size,
            k=shard.k,
            m=shard.m,
            want=shard.index,
            hops=hops,
            source=str(address.locator),
            exact=exact,
            reader=reader if hops else "",  # a peer that uses only its stores need not know the reader
            background=address.background and hops > 0,
            asker=address.kept_for[-1] if address.kept_for and hops else "",
            keep=keep,
        )

    def checked(self, address: BlockAddress, answer: Answer, *, keep: bool = False) -> Held:
        """The shard or whole block of an answer; with `keep` it may be passed on. Raises as Trust.check, and
        PeerMisbehavedError if the bytes of a whole block, or the proof of a shard to keep, are wrong."""
        message, body = answer.message, answer.body
        if not isinstance(message, ShardFound | BlockFound) or body is None:
            raise errors.UnavailableError("an answer without a block")
        self._site.trust.check(message.record, address.ref, address.index)
        self._site.facts.arrived(address.ref.digest, message.origin)
        shard = Shard(message.k, message.m, message.index) if isinstance(message, ShardFound) else None
        if not isinstance(message, ShardFound) or shard is None or is_copy(shard):
            if not message.record.matches(body):
                raise errors.PeerMisbehavedError(f"wrong bytes for {address.ref.digest} #{address.index}")
            return Held(body, message.record)
        if keep:
            self._site.trust.check_kept(message.proof, message.record, shard, body)
        return Held(body, message.record, message.proof)

    def note_overdue(self, plan: ShardPlan) -> tuple[list[PeerId], list[Ask]]:
        """The peers that just became late, and the requests that replace those given up. Updates the health."""
        now = trio.current_time()
        late, asks = plan.overdue(now)
        for peer in late:
            self._site.health.overdue(peer, plan.took_s(peer, now) or 0.0, now)
        return late, asks


async def carry_out(
    plan: ShardPlan,
    asks: list[Ask],
    ask: Callable[[Ask], Awaitable[T]],
    *,
    note: Callable[[Ask, T], list[Ask]],
    overdue: Callable[[], list[Ask]],
) -> None:
    """Make a plan's requests in tasks, and report their answers to it. Returns when the plan is done or stuck; requests
    that are still under way are then cancelled.

    `asks` are the first requests. `ask` makes one; an exception that it raises ends the plan. `note` receives its
    answer and returns further requests. So does `overdue`, which is called when the plan's next check is due, and after
    LOOK_EVERY_S without an answer.
    """
    send, receive = trio.open_memory_channel[tuple[Ask, T]](len(asks))

    async def make(request: Ask) -> None:
        await send.send((request, await ask(request)))

    async with trio.open_nursery() as nursery:
        for request in asks:
            nursery.start_soon(make, request)
        while not plan.done and not plan.stuck:
            more: list[Ask] = []
            with trio.move_on_at(min(plan.next_check(), trio.current_time() + LOOK_EVERY_S)) as waiting:
                more = note(*await receive.receive())
            for request in overdue() if waiting.cancelled_caught else more:
                nursery.start_soon(make, request)
        nursery.cancel_scope.cancel()
