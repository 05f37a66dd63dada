"""The membership of the site: SWIM (`protocol/swim.py`) driven over the exchange's control lane.

`Membership` is what this node believes, and the `View` that the rest of the node asks; it does no I/O, so the exchange
can be built with its `find` and `is_refused`. `Gossiper` does the I/O that it decides on, and answers other members.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import trio

from node.membership.quarantine import QUARANTINE_S, Quarantine
from protocol.ids import PeerId
from protocol.members import Member, State, Update
from protocol.swim import Swim
from protocol.swim_values import Action, Event, Gossip, Probe, SwimConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One member for the operator; ages in seconds, None for never. `quarantine`: the reason, or empty."""

    member: Member
    state: State
    incarnation: int
    since_s: float
    seen_s: float | None
    rtt_s: float | None
    quarantine: str


class Membership:
    """Implements `View`. Built inside trio's loop. `incarnation`: Unix time in milliseconds, see `Swim`."""

    def __init__(
        self,
        own: Member,
        incarnation: int,
        rng: Random,
        config: SwimConfig | None = None,
        quarantine_s: float = QUARANTINE_S,
    ) -> None:
        self.own = own
        self.config = config or SwimConfig()
        self.changed_at = trio.current_time()
        self._swim = Swim(own, incarnation, config=self.config, rng=rng, now=self.changed_at)
        self._quarantine = Quarantine(self._swim, quarantine_s)
        self.site = self._swim.site
        self.version = 0
        self._changed = trio.Event()
        self._touched = trio.Event()

    # The view

    @property
    def known(self) -> tuple[Member, ...]:
        members = (entry.update.member for entry in self._swim.known.values())
        return (self.own, *(member for member in members if member.site == self.own.site))

    async def wait_changed(self) -> None:
        """Wait until `site` changes next."""
        await self._changed.wait()

    def find(self, peer: PeerId) -> Member | None:
        if peer == self.own.peer_id:
            return self.own
        entry = self._swim.known.get(peer)
        return None if entry is None else entry.update.member

    def current(self) -> tuple[Member, ...]:
        """The members of the site, quarantined or not, this node first: those that an introduction names."""
        others = (entry.update.member for entry in self._swim.known.values() if entry.is_live)
        return (self.own, *(member for member in others if member.site == self.own.site))

    def table(self) -> tuple[Row, ...]:
        """All other members that are remembered, by name."""
        now = trio.current_time()
        rows = [
            Row(
                member=entry.update.member,
                state=entry.update.state,
                incarnation=entry.update.incarnation,
                since_s=now - entry.since,
                seen_s=None if entry.seen is None else now - entry.seen,
                rtt_s=entry.rtt_s,
                quarantine=self._quarantine.reason(peer),
            )
            for peer, entry in self._swim.known.items()
        ]
        return tuple(sorted(rows, key=lambda row: (row.member.name, row.member.peer_id)))

    # Members that fail or misbehave

    def report_failure(self, peer: PeerId) -> None:
        self._swim.doubt(peer, trio.current_time())
        self._settle()

    def quarantine(self, peer: PeerId, reason: str, seconds: float | None = None) -> None:
        """`seconds`: the time that is left of a quarantine that began before this process."""
        if peer != self.own.peer_id:
            self._quarantine.begin(peer, reason, seconds)
            self._settle()

    def quarantines(self) -> tuple[tuple[PeerId, str, float], ...]:
        """Each peer in quarantine, the reason, and the seconds that are left."""
        return self._quarantine.rows()

    def is_quarantined(self, peer: PeerId) -> bool:
        return peer in self._quarantine

    def banish(self, peer: PeerId) -> None:
        """Its certificate is revoked: cut it off, forget it, and never again believe a statement about it."""
        if peer == self.own.peer_id:
            log.error("the certificate of this very node is revoked: members refuse it. Join anew with a new identity")
        self._swim.banish(peer)
        self._settle()

    def is_refused(self, peer: PeerId) -> bool:
        return self.is_quarantined(peer) or peer in self._swim.banished

    # Events

    def introduced(self, members: tuple[Member, ...]) -> None:
        """The introducer met `members[0]`, which named the others. This is how a node enters a site."""
        now = trio.current_time()
        for member in members[:1]:
            self._swim.introduced(member, now)
        self.remembered(members[1:])

    def remembered(self, members: Iterable[Member]) -> None:
        """These were members before; they are asked, and enter the view only when they answer."""
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
        """Send the revocations to some members at once."""
        self._swim.spread()
        self._settle()

    def abandoned(self) -> None:
        self._swim.abandoned()

    # Messages and actions

    def updates_for(self, peer: PeerId) -> tuple[Update, ...]:
        return self._swim.updates_for(peer)

    def view(self) -> tuple[Update, ...]:
        return self._swim.view()

    def leave(self) -> tuple[Gossip, ...]:
        return self._swim.leave()

    async def next_actions(self) -> list[Action]:
        """Waits until there is something to do."""
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
        """After every event: publish changes of the view, and look at the timers again."""
        for change in self._swim.take_changes():
            level = logging.DEBUG if change.event is Event.REFUTED else logging.INFO
            log.log(level, change.event.value, extra={"peer": change.member.peer_id, "node": change.member.name})
        self._quarantine.forget_ended()
        if self._swim.site is not self.site:
            self.site = self._swim.site
            self.version += 1
            self.changed_at = trio.current_time()
            self._changed.set()
            self._changed = trio.Event()
        self._touched.set()
