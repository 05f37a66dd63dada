"""The membership of the site: SWIM (`protocol/swim.py`) driven over the exchange's control lane.

`Membership` is what this node believes, and the `View` that everything else asks; it does no I/O, so the exchange can
be built with its `find` and `is_quarantined`. `Gossiper` does the I/O that it decides on, and answers the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import assert_never

import trio

from node.exchange import Answer, Exchange, Lane
from node.revocations import Revocations
from protocol.admission import Revocation
from protocol.errors import BadInputError, DeniedError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.members import Member, State, Update
from protocol.messages import Failed, Ping, PingRequest, Pong, Reply, Request, Sync, SyncReply
from protocol.swim import Swim
from protocol.swim_values import Action, Disconnect, Event, Gossip, Probe, SwimConfig, SyncWith, Tell

log = logging.getLogger(__name__)

QUARANTINE_S = 3600.0
"""Long enough that a peer with bad memory or worse does not waste every pull, short enough to try it again."""

HELPER_SHARE = 0.8
"""Of the probe timeout, for a helper's ping: so that it can still say in time that it got no answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One known member for the operator; ages in seconds, None for never. `quarantine`: the reason, or empty."""

    member: Member
    state: State
    incarnation: int
    since_s: float
    seen_s: float | None
    rtt_s: float | None
    quarantine: str


class Membership:
    """`View`, see there. To be built inside trio's loop. `incarnation`: Unix time in milliseconds, see `Swim`."""

    def __init__(
        self,
        own: Member,
        incarnation: int,
        rng: Random,
        config: SwimConfig | None = None,
        quarantine_s: float = QUARANTINE_S,
    ) -> None:
        self.config = config or SwimConfig()
        now = trio.current_time()
        self._own = own
        self._swim = Swim(own, incarnation, self.config, rng, now)
        self._quarantine_s = quarantine_s
        self._reasons: dict[PeerId, str] = {}
        self._site = self._swim.site
        self._version = 0
        self._changed_at = now
        self._changed = trio.Event()
        self._touched = trio.Event()

    # The view

    @property
    def site(self) -> tuple[Member, ...]:
        return self._site

    @property
    def version(self) -> int:
        return self._version

    @property
    def changed_at(self) -> float:
        return self._changed_at

    async def wait_changed(self) -> None:
        """Until `site` changes next."""
        await self._changed.wait()

    def find(self, peer: PeerId) -> Member | None:
        if peer == self._own.peer_id:
            return self._own
        known = self._swim.known.get(peer)
        return None if known is None else known.update.member

    @property
    def known(self) -> tuple[Member, ...]:
        members = (known.update.member for known in self._swim.known.values())
        return (self._own, *(member for member in members if member.site == self._own.site))

    @property
    def own(self) -> Member:
        return self._own

    def current(self) -> tuple[Member, ...]:
        """The site, quarantined or not; this node first. What an introduction names."""
        others = (known.update.member for known in self._swim.known.values() if known.is_live)
        return (self._own, *(member for member in others if member.site == self._own.site))

    def report_failure(self, peer: PeerId) -> None:
        self._swim.doubt(peer, trio.current_time())
        self._settle()

    def quarantine(self, peer: PeerId, reason: str, seconds: float | None = None) -> None:
        """`seconds`: what is left of one that was begun before this process."""
        if peer == self._own.peer_id or (self.is_quarantined(peer) and self._reasons.get(peer) == reason):
            return
        seconds = self._quarantine_s if seconds is None else seconds
        log.info("quarantined", extra={"peer": peer, "reason": reason, "seconds": seconds})
        self._swim.exclude(peer, trio.current_time() + seconds)
        self._reasons[peer] = reason
        self._settle()

    def quarantines(self) -> tuple[tuple[PeerId, str, float], ...]:
        """Who is in quarantine, why, and for how many seconds more."""
        now = trio.current_time()
        return tuple((peer, self._reasons[peer], until - now) for peer, until in self._swim.excluded.items())

    def is_quarantined(self, peer: PeerId) -> bool:
        return self._swim.is_excluded(peer)

    def banish(self, peer: PeerId) -> None:
        """Its certificate is revoked: it is cut off and forgotten, and nothing about it is believed again."""
        if peer == self._own.peer_id:
            log.error("the certificate of this very node is revoked: members refuse it. Join anew with a new identity")
        self._swim.banish(peer)
        self._settle()

    def is_refused(self, peer: PeerId) -> bool:
        return self._swim.is_excluded(peer) or self._swim.is_banished(peer)

    def table(self) -> tuple[Row, ...]:
        """All other members that are remembered, by name."""
        rows = [self._row(peer) for peer in self._swim.known]
        return tuple(sorted(rows, key=lambda row: (row.member.name, row.member.peer_id)))

    def _row(self, peer: PeerId) -> Row:
        known = self._swim.known[peer]
        now = trio.current_time()
        return Row(
            known.update.member,
            known.update.state,
            known.update.incarnation,
            now - known.since,
            None if known.seen is None else now - known.seen,
            known.rtt_s,
            self._reasons.get(peer, ""),
        )

    # What is learned

    def introduced(self, members: tuple[Member, ...]) -> None:
        """The swarm met `members[0]`; the others it named. A site is entered by this."""
        now = trio.current_time()
        for member in members[:1]:
            self._swim.introduced(member, now)
        self.remembered(members[1:])

    def remembered(self, members: Iterable[Member]) -> None:
        """These were members once; they are asked."""
        now = trio.current_time()
        for member in members:
            self._swim.hint(member, now)
        self._settle()

    def received(self, updates: tuple[Update, ...], *, whole_view: bool = False, settled: bool = False) -> None:
        self._swim.received(updates, trio.current_time(), whole_view=whole_view, settled=settled)
        self._settle()

    def acked(self, peer: PeerId, rtt_s: float | None) -> None:
        self._swim.acked(peer, trio.current_time(), rtt_s)

    def failed(self, probe: Probe, *, helpers_answered: bool) -> None:
        self._swim.failed(probe, trio.current_time(), helpers_answered=helpers_answered)
        self._settle()

    def synced(self, peer: PeerId) -> None:
        self._swim.synced(peer)
        self._settle()

    def spread(self) -> None:
        """Have some members told of the revocations at once."""
        self._swim.spread()
        self._settle()

    def abandoned(self) -> None:
        self._swim.abandoned()

    # What is to be said and done

    def updates_for(self, peer: PeerId) -> tuple[Update, ...]:
        return self._swim.updates_for(peer)

    def view(self) -> tuple[Update, ...]:
        return self._swim.view()

    def leave(self) -> tuple[Gossip, ...]:
        return self._swim.leave()

    async def next_actions(self) -> list[Action]:
        """Waits until something is to be done."""
        while True:
            now = trio.current_time()
            due = self._swim.due(now)
            if due <= now:
                await trio.lowlevel.checkpoint()  # before the tick: what it returns must not be lost
                actions = self._swim.tick(now)
                self._settle()
                return actions
            self._touched = trio.Event()
            with trio.move_on_at(due):
                await self._touched.wait()

    def _settle(self) -> None:
        """After every event: publish what changed, and have the timers looked at."""
        for change in self._swim.take_changes():
            level = logging.DEBUG if change.event is Event.REFUTED else logging.INFO
            log.log(level, change.event.value, extra={"peer": change.member.peer_id, "node": change.member.name})
        for peer in [peer for peer in self._reasons if not self._swim.is_excluded(peer)]:
            del self._reasons[peer]
        if self._swim.site is not self._site:
            self._site = self._swim.site
            self._version += 1
            self._changed_at = trio.current_time()
            self._changed.set()
            self._changed = trio.Event()
        self._touched.set()


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
