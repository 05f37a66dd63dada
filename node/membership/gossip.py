"""Carries out SWIM's decisions: the I/O between `Membership`, which decides, and the exchange's control lane.

This module does not repeat failed requests. It reports a failed probe to `Membership`, which decides what to do next.
"""

from __future__ import annotations

import logging
import os
from typing import assert_never

import trio

from node.exchange.contract import Answer, Exchange, Lane
from node.identity.revocations import Revocations
from node.membership.membership import Membership
from protocol.admission import Revocation
from protocol.errors import BadInputError, DeniedError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.members import News
from protocol.messages import Failed, Ping, PingRequest, Pong, Reply, Request, Sync, SyncReply
from protocol.statements import NONCE, check_alive
from protocol.swim_values import Action, Disconnect, Gossip, Probe, SyncWith, Tell

log = logging.getLogger(__name__)

HELPER_SHARE = 0.8
"""Share of the probe timeout for a helper's ping. In the rest, the helper can still report a missing answer."""
SYNC_ROUNDS = 256
"""Comparisons in one sync: some 3,000 statements each way. Larger differences are left to the next sync."""


class Gossiper:
    """Probes, gossips and syncs as `membership` decides, and answers Ping, PingRequest and Sync."""

    def __init__(self, membership: Membership, exchange: Exchange, revocations: Revocations) -> None:
        self._membership, self._swim = membership, membership.swim
        self._exchange = exchange
        self._revocations = revocations
        self._timeout_s = membership.config.probe_timeout_s
        for revocation in revocations.all:
            membership.banish(PeerId(revocation.subject))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. For a clean stop, call `leave` first."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    for action in await self._membership.next_actions():
                        nursery.start_soon(self._perform, action)
        finally:
            self._swim.abandoned()

    def revoke(self, revocations: tuple[Revocation, ...]) -> list[str]:
        """Apply revocations and send them to other members. Returns the subjects that are new.

        Raises PeerMisbehavedError for a revocation that the authority did not sign.
        """
        new = self._revocations.add(revocations)
        for subject in new:
            log.warning("revoked", extra={"subject": subject})
            self._membership.banish(PeerId(subject))
        if new:
            with self._membership.event():
                self._swim.spread()
        return new

    def _received(self, peer: PeerId, revocations: tuple[Revocation, ...]) -> None:
        try:
            self.revoke(revocations)
        except PeerMisbehavedError as error:
            self._membership.quarantine(peer, str(error))

    async def handle(self, peer: PeerId, request: Request) -> Answer:
        """Raises DeniedError for a refused peer, BadInputError for a request that does not concern membership."""
        if self._membership.is_refused(peer):
            raise DeniedError("quarantined or revoked")
        match request:
            case Ping():
                self._received(peer, request.revocations)
                await self._learn(peer, request.news)
                proof = self._membership.passports.author.prove(request.nonce) if request.nonce else b""
                return Answer(Pong(self._swim.news_for(peer, request.news), proof))
            case PingRequest():
                await self._learn(peer, request.news)
                return Answer(await self._ping_for(peer, request))
            case Sync():
                self._received(peer, request.revocations)
                await self._membership.received(peer, (request.own,))
                return Answer(self._sync_reply(peer, request.summary))
            case _:
                raise BadInputError(f"not a request of membership: {type(request).__name__}")

    async def _learn(self, peer: PeerId, news: News) -> None:
        if news.statements or news.suspicions:
            await self._membership.received(peer, news.statements, news.suspicions)
        with self._membership.event() as now:
            self._swim.contacted(peer, news, now)

    def _sync_reply(self, peer: PeerId, summary: bytes) -> SyncReply:
        with self._membership.event() as now:
            difference = self._swim.compared(peer, summary, now)
        return SyncReply(
            difference.statements,
            difference.doubts,
            difference.wanted,
            more=difference.more,
            revocations=self._revocations.all,
        )

    async def leave(self) -> None:
        """Announce to a few members that this node leaves; they pass it on. Takes at most one probe timeout."""
        async with trio.open_nursery() as nursery:
            for gossip in self._swim.leave():
                nursery.start_soon(self._ping, gossip.peer, self._timeout_s)

    async def _perform(self, action: Action) -> None:
        match action:
            case Probe():
                await self._probe(action)
            case Gossip():
                await self._ping(action.peer, self._timeout_s)
            case SyncWith():
                await self._sync(action)
            case Tell():
                question = Ping(self._swim.news_for(action.peer), revocations=self._revocations.all)
                await self._request(action.peer, question, self._timeout_s)
            case Disconnect():
                self._exchange.disconnect(action.peer)
            case _:
                assert_never(action)

    async def _probe(self, probe: Probe) -> None:
        if await self._ping(probe.peer, probe.timeout_s):
            return
        nonce = os.urandom(NONCE)
        replies = await self._ask_helpers(probe, nonce)
        with self._membership.event() as now:
            if any(_proves(reply, probe.peer, nonce) for reply in replies):
                self._swim.acked(probe.peer, now)
            else:
                self._swim.failed(probe, now, helpers_answered=bool(replies))

    async def _ask_helpers(self, probe: Probe, nonce: bytes) -> list[Reply]:
        """The helpers' answers; the first proof that the probed member is alive ends the wait."""
        replies: list[Reply] = []

        async def ask(helper: PeerId) -> None:
            request = PingRequest(probe.peer, nonce, self._swim.news_for(helper))
            reply = await self._request(helper, request, probe.timeout_s)
            if reply is not None:
                replies.append(reply)
            if isinstance(reply, Pong):
                await self._learn(helper, reply.news)
                if _proves(reply, probe.peer, nonce):
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for helper in probe.via:
                nursery.start_soon(ask, helper)
        return replies

    async def _ping(self, peer: PeerId, timeout_s: float, nonce: bytes = b"") -> Pong | None:
        return await self._send(peer, Ping(self._swim.news_for(peer), nonce), timeout_s)

    async def _send(self, peer: PeerId, ping: Ping, timeout_s: float) -> Pong | None:
        started = trio.current_time()
        reply = await self._request(peer, ping, timeout_s)
        if not isinstance(reply, Pong):
            return None
        with self._membership.event() as now:
            self._swim.acked(peer, now, now - started)
        await self._learn(peer, reply.news)
        return reply

    async def _ping_for(self, asker: PeerId, request: PingRequest) -> Reply:
        target = request.target
        is_other = self._membership.find(target) not in (None, self._membership.own)
        if not is_other or self._membership.is_quarantined(target):
            return Failed("not-found", "no such member")
        pong = await self._ping(target, HELPER_SHARE * self._timeout_s, request.nonce)
        if pong is not None:
            return Pong(self._swim.news_for(asker, request.news), pong.liveness)
        return Failed("unavailable", "no answer")

    async def _sync(self, sync: SyncWith) -> None:
        """Compare views until all that differs was sent: a message carries only a part of a large difference."""
        for _ in range(SYNC_ROUNDS):
            if not await self._sync_once(sync):
                break
        with self._membership.event():
            self._swim.synced(sync.peer)

    async def _sync_once(self, sync: SyncWith) -> bool:
        """Whether there is more to compare, and this made progress."""
        started, own = trio.current_time(), self._swim.own
        question = Sync(own, self._swim.summary(), self._revocations.all)
        reply = await self._request(sync.peer, question, sync.timeout_s)
        if not isinstance(reply, SyncReply):
            return False
        self._received(sync.peer, reply.revocations)
        with self._membership.event() as now:
            self._swim.acked(sync.peer, now, now - started)
        count = await self._membership.received(sync.peer, reply.statements)
        with self._membership.event() as now:
            self._swim.shown(sync.peer, own.incarnation)
            self._swim.doubt_all(sync.peer, reply.doubts, now)
            news = self._swim.wanted_by(sync.peer, reply.wanted)
        if news.statements:
            await self._send(sync.peer, Ping(news), sync.timeout_s)
        return reply.more and (count > 0 or bool(news.statements))

    async def _request(self, peer: PeerId, request: Request, timeout_s: float) -> Reply | None:
        """The answer; None if none arrived in time, for whatever reason."""
        with trio.move_on_after(timeout_s):
            try:
                answer = await self._exchange.request(peer, request, lane=Lane.CONTROL, silence_s=timeout_s)
            except (PeerUnavailableError, PeerMisbehavedError) as error:
                log.debug("no answer", extra={"peer": peer, "reason": str(error)})
                return None
            return answer.message
        return None


def _proves(reply: Reply, peer: PeerId, nonce: bytes) -> bool:
    """Whether `reply` carries the proof that `peer` was alive after `nonce` was drawn. A helper cannot forge it."""
    if not isinstance(reply, Pong):
        return False
    try:
        check_alive(peer, nonce, reply.liveness)
    except BadInputError:
        return False
    return True
