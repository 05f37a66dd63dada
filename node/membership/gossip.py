"""Carries out what SWIM decides."""

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
from protocol.swim import Action, Disconnect, Gossip, Probe, SyncWith, Tell

log = logging.getLogger(__name__)

HELPER_SHARE = 0.8
"""Of the probe timeout, for a helper's ping: so that it can still say in time that it got no answer."""


class Gossiper:
    """Probes, tells and syncs as `membership` decides, and answers Ping, PingRequest and Sync."""

    def __init__(self, membership: Membership, exchange: Exchange, revocations: Revocations) -> None:
        self._membership = membership
        self._exchange = exchange
        self._revocations = revocations
        self._timeout_s = membership.config.probe_timeout_s
        for one in revocations.all:
            membership.banish(PeerId(one.subject))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Works until it is cancelled; a clean stop calls `leave` first."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    for action in await self._membership.next_actions():
                        nursery.start_soon(self._perform, action)
        finally:
            self._membership.abandoned()

    def revoke(self, revocations: tuple[Revocation, ...]) -> list[str]:
        """Hold to these from now on, and tell others. Returns the subjects that were not known.

        Raises PeerMisbehavedError where the authority did not sign one.
        """
        new = self._revocations.add(revocations)
        for subject in new:
            log.warning("revoked", extra={"subject": subject})
            self._membership.banish(PeerId(subject))
        if new:
            self._membership.spread()
        return new

    def _told(self, peer: PeerId, revocations: tuple[Revocation, ...]) -> None:
        try:
            self.revoke(revocations)
        except PeerMisbehavedError as error:
            self._membership.quarantine(peer, str(error))

    async def handle(self, peer: PeerId, request: Request) -> Answer:
        """Raises DeniedError to the refused, BadInputError for requests that are not of membership."""
        if self._membership.is_refused(peer):
            raise DeniedError("quarantined or revoked")
        match request:
            case Ping():
                self._told(peer, request.revocations)
                self._membership.received(request.updates)
                return Answer(Pong(self._membership.updates_for(peer)))
            case PingRequest():
                self._membership.received(request.updates)
                return Answer(await self._ping_for(peer, request.target))
            case Sync():
                self._told(peer, request.revocations)
                self._membership.received(request.updates, whole_view=True)
                return Answer(SyncReply(self._membership.view(), self._revocations.all))
            case _:
                raise BadInputError(f"not a request of membership: {type(request).__name__}")

    async def leave(self) -> None:
        """Tell a few members that this node goes; they tell the rest. At most one probe timeout."""
        async with trio.open_nursery() as nursery:
            for gossip in self._membership.leave():
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
                question = Ping(self._membership.updates_for(action.peer), self._revocations.all)
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
        """What they answered; the first Pong ends it."""
        replies: list[Reply] = []

        async def ask(helper: PeerId) -> None:
            request = PingRequest(probe.peer, self._membership.updates_for(helper))
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
        reply = await self._request(peer, Ping(self._membership.updates_for(peer)), timeout_s)
        if not isinstance(reply, Pong):
            return False
        self._membership.acked(peer, trio.current_time() - started)
        self._membership.received(reply.updates)
        return True

    async def _ping_for(self, asker: PeerId, target: PeerId) -> Reply:
        known = self._membership.find(target) not in (None, self._membership.own)
        if not known or self._membership.is_quarantined(target):
            return Failed("not-found", "no such member")
        if await self._ping(target, HELPER_SHARE * self._timeout_s):
            return Pong(self._membership.updates_for(asker))
        return Failed("unavailable", "no answer")

    async def _sync(self, sync: SyncWith) -> None:
        started = trio.current_time()
        question = Sync(self._membership.view(), self._revocations.all)
        reply = await self._request(sync.peer, question, sync.timeout_s)
        if isinstance(reply, SyncReply):
            self._told(sync.peer, reply.revocations)
            self._membership.acked(sync.peer, trio.current_time() - started)
            self._membership.received(reply.updates, whole_view=True)
        self._membership.synced(sync.peer)

    async def _request(self, peer: PeerId, request: Request, timeout_s: float) -> Reply | None:
        """None where no answer came in time, whatever the reason."""
        with trio.move_on_after(timeout_s):
            try:
                answer = await self._exchange.request(peer, request, lane=Lane.CONTROL, silence_s=timeout_s)
            except (PeerUnavailableError, PeerMisbehavedError) as error:
                log.debug("no answer", extra={"peer": peer, "reason": str(error)})
                return None
            return answer.message
        return None
