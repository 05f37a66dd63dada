"""Carries out SWIM's decisions: the I/O between `Membership`, which decides, and the exchange's control lane.

This module does not repeat failed requests. It reports a failed probe to `Membership`, which decides what to do next.
"""

from __future__ import annotations

import logging
from typing import assert_never

import trio

from node.exchange.contract import Answer, Exchange, Lane
from node.identity.revocations import Revocations
from node.membership.membership import Membership
from protocol.admission import Revocation
from protocol.errors import BadInputError, DeniedError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.messages import Failed, Ping, PingRequest, Pong, Reply, Request, Sync, SyncReply
from protocol.swim_values import Action, Disconnect, Gossip, Probe, SyncWith, Tell

log = logging.getLogger(__name__)

HELPER_SHARE = 0.8
"""Share of the probe timeout for a helper's ping. In the rest, the helper can still report a missing answer."""


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
            self._membership.spread()
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
                self._membership.received(request.updates)
                return Answer(Pong(self._swim.updates_for(peer)))
            case PingRequest():
                self._membership.received(request.updates)
                return Answer(await self._ping_for(peer, request.target))
            case Sync():
                self._received(peer, request.revocations)
                self._membership.received(request.updates, whole_view=True)
                return Answer(SyncReply(self._swim.view(), self._revocations.all))
            case _:
                raise BadInputError(f"not a request of membership: {type(request).__name__}")

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
                question = Ping(self._swim.updates_for(action.peer), self._revocations.all)
                await self._request(action.peer, question, self._timeout_s)
            case Disconnect():
                self._exchange.disconnect(action.peer)
            case _:
                assert_never(action)

    async def _probe(self, probe: Probe) -> None:
        if await self._ping(probe.peer, probe.timeout_s):
            return
        replies = await self._ask_helpers(probe)
        if any(isinstance(reply, Pong) for reply in replies):
            self._membership.acked(probe.peer, None)
        else:
            self._membership.failed(probe, helpers_answered=bool(replies))

    async def _ask_helpers(self, probe: Probe) -> list[Reply]:
        """The helpers' answers; the first Pong ends the wait."""
        replies: list[Reply] = []

        async def ask(helper: PeerId) -> None:
            request = PingRequest(probe.peer, self._swim.updates_for(helper))
            reply = await self._request(helper, request, probe.timeout_s)
            if isinstance(reply, Pong):
                self._membership.received(reply.updates)
                nursery.cancel_scope.cancel()
            if reply is not None:
                replies.append(reply)

        async with trio.open_nursery() as nursery:
            for helper in probe.via:
                nursery.start_soon(ask, helper)
        return replies

    async def _ping(self, peer: PeerId, timeout_s: float) -> bool:
        started = trio.current_time()
        reply = await self._request(peer, Ping(self._swim.updates_for(peer)), timeout_s)
        if not isinstance(reply, Pong):
            return False
        self._membership.acked(peer, trio.current_time() - started)
        self._membership.received(reply.updates)
        return True

    async def _ping_for(self, asker: PeerId, target: PeerId) -> Reply:
        is_other = self._membership.find(target) not in (None, self._membership.own)
        if not is_other or self._membership.is_quarantined(target):
            return Failed("not-found", "no such member")
        if await self._ping(target, HELPER_SHARE * self._timeout_s):
            return Pong(self._swim.updates_for(asker))
        return Failed("unavailable", "no answer")

    async def _sync(self, sync: SyncWith) -> None:
        started = trio.current_time()
        question = Sync(self._swim.view(), self._revocations.all)
        reply = await self._request(sync.peer, question, sync.timeout_s)
        if isinstance(reply, SyncReply):
            self._received(sync.peer, reply.revocations)
            self._membership.acked(sync.peer, trio.current_time() - started)
            self._membership.received(reply.updates, whole_view=True)
        self._membership.synced(sync.peer)

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
