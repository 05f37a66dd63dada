"""The membership of the site: SWIM (`protocol/swim.py`) driven over the exchange's control lane.

`Membership` holds this node's beliefs, and is the `View` that the rest of the node asks. It does no I/O, so the
exchange can be built with its `locate` and `is_refused`. `Gossiper` does the I/O and answers other members.

A peer that misbehaved is in quarantine: out of the view for a time, with a reason that operators see. `Swim` stores the
end of that time, because it neither probes nor believes such a peer; `Membership` stores the reason. A revocation, in
contrast, is permanent, has no reason, and makes `Swim` forget the peer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Protocol

import trio

from node.membership.addresses import with_observed
from node.membership.passports import CHECKS_IN_A_TURN, Passports
from protocol.errors import PeerMisbehavedError
from protocol.ids import PeerId
from protocol.introduction import MAX_INTRODUCED
from protocol.members import Member, State, Statement, Suspicion, Vouched
from protocol.swim import Swim
from protocol.swim_values import Action, Event, SwimConfig

log = logging.getLogger(__name__)

QUARANTINE_S = 3600.0
"""Long enough that a peer with faulty memory (or a worse fault) does not slow every pull, short enough to recover."""


class View(Protocol):
    """The members of this node's site as this node sees them now. All methods are immediate.

    - `site`: the alive members of the own site, this node among them, without those in quarantine; sorted by peer id.
    - `version` grows with every change of `site`; `changed_at` is trio.current_time() at the last change.
    - `find` returns any member that was introduced or gossiped and is not forgotten, alive or not, of any site.
    - `report_failure`: a read from the peer failed, so it is probed at once.
    - `quarantine` takes a peer out of the view for a time; operators see the reason.
    """

    @property
    def site(self) -> tuple[Member, ...]: ...

    @property
    def version(self) -> int: ...

    @property
    def changed_at(self) -> float: ...

    def find(self, peer: PeerId) -> Member | None: ...

    def report_failure(self, peer: PeerId) -> None: ...

    def quarantine(self, peer: PeerId, reason: str) -> None: ...

    def is_quarantined(self, peer: PeerId) -> bool: ...


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
    """Implements `View`. Must be built inside trio's loop. `incarnation`: Unix time in milliseconds, see `Swim`."""

    def __init__(
        self,
        own: Member,
        incarnation: int,
        rng: Random,
        passports: Passports,
        config: SwimConfig | None = None,
        quarantine_s: float = QUARANTINE_S,
    ) -> None:
        self.own = own
        self.config = config or SwimConfig()
        self.changed_at = trio.current_time()
        self.passports = passports
        self.swim = Swim(own, incarnation, passports.author, config=self.config, rng=rng, now=self.changed_at)
        self._quarantine_s = quarantine_s
        self._reasons: dict[PeerId, str] = {}
        """The reasons of the current quarantines."""
        self.site = self.swim.site
        self.version = 0
        self._changed = trio.Event()
        self._touched = trio.Event()

    # The view

    async def wait_changed(self) -> None:
        """Wait until `site` changes next."""
        await self._changed.wait()

    def find(self, peer: PeerId) -> Member | None:
        if peer == self.own.peer_id:
            return self.own
        entry = self.swim.known.get(peer)
        return None if entry is None else entry.member

    def locate(self, peer: PeerId) -> Member | None:
        """As `find`, but with the address from which this node saw the member connect: it is surely routed here."""
        entry = self.swim.known.get(peer)
        if entry is None or not entry.observed:
            return self.find(peer)
        return with_observed(entry.member, entry.observed)

    def current(self) -> tuple[Member, ...]:
        """The members of the site, quarantined or not, this node first."""
        others = (entry.member for entry in self.swim.known.values() if entry.is_live)
        return (self.own, *(member for member in others if member.site == self.own.site))

    def named(self) -> tuple[Vouched, ...]:
        """The statements that an introduction shows, this node's own first."""
        others = (entry.statement for entry in self.swim.known.values() if entry.is_live)
        near = (statement for statement in others if statement.member.site == self.own.site)
        return (self.swim.own, *islice(near, MAX_INTRODUCED - 1))

    def to_remember(self, most: int) -> tuple[Vouched, ...]:
        """The statements of the site's other members, live ones first."""
        near = [entry for entry in self.swim.known.values() if entry.member.site == self.own.site]
        near.sort(key=lambda entry: (not entry.is_live, -entry.since))
        return tuple(entry.statement for entry in near[:most])

    def table(self) -> tuple[Row, ...]:
        """All other members that are remembered, by name."""
        now = trio.current_time()
        rows = [
            Row(
                member=entry.member,
                state=entry.state,
                incarnation=entry.statement.incarnation,
                since_s=now - entry.since,
                seen_s=None if entry.seen is None else now - entry.seen,
                rtt_s=entry.rtt_s,
                quarantine=self._reasons.get(peer, ""),
            )
            for peer, entry in self.swim.known.items()
        ]
        return tuple(sorted(rows, key=lambda row: (row.member.name, row.member.peer_id)))

    # Members that fail or misbehave

    def report_failure(self, peer: PeerId) -> None:
        self.swim.doubt(peer, trio.current_time())
        self._settle()

    def quarantine(self, peer: PeerId, reason: str, seconds: float | None = None) -> None:
        """`seconds`: the remaining time of a quarantine that began before this process."""
        if peer == self.own.peer_id or (self.is_quarantined(peer) and self._reasons.get(peer) == reason):
            return
        seconds = self._quarantine_s if seconds is None else seconds
        log.info("quarantined", extra={"peer": peer, "reason": reason, "seconds": seconds})
        self.swim.exclude(peer, trio.current_time() + seconds)
        self._reasons[peer] = reason
        self._settle()

    def quarantines(self) -> tuple[tuple[PeerId, str, float], ...]:
        """Each peer in quarantine, the reason, and the remaining seconds."""
        now = trio.current_time()
        return tuple((peer, self._reasons[peer], until - now) for peer, until in self.swim.excluded.items())

    def is_quarantined(self, peer: PeerId) -> bool:
        return peer in self.swim.excluded

    def banish(self, peer: PeerId) -> None:
        """Disconnect and forget a peer whose certificate is revoked, and ignore all later statements about it."""
        if peer == self.own.peer_id:
            log.error("the certificate of this node is revoked: members refuse it. Join again with a new identity")
        self.swim.banish(peer)
        self._settle()

    def is_refused(self, peer: PeerId) -> bool:
        return self.is_quarantined(peer) or peer in self.swim.banished

    # Events

    @contextmanager
    def event(self) -> Iterator[float]:
        """Tell `swim` of an event, with the time that this yields. Afterwards the changes are published."""
        yield trio.current_time()
        self._settle()

    def introduced(self, statements: Sequence[Vouched], observed: str = "") -> None:
        """Add the member of `statements[0]`, which was seen to connect from the host `observed` and named the others.
        By this a node enters a site."""
        now = trio.current_time()
        for statement in statements[:1]:
            self.swim.introduced(statement, now, observed)
        self.remembered(statements[1:])

    def remembered(self, statements: Iterable[Vouched]) -> None:
        """Ask former or named members. They enter the view only when they answer."""
        now = trio.current_time()
        for statement in statements:
            self.swim.hint(statement, now)
        self._settle()

    async def received(
        self, peer: PeerId, statements: Iterable[Statement], suspicions: Iterable[Suspicion] = ()
    ) -> int:
        """Check and learn what `peer` sent; returns how many statements were news. A peer that sends what no honest
        member passes on is quarantined."""
        try:
            count = await self._learn(statements)
            for suspicion in suspicions:
                if self.swim.heeds(suspicion, trio.current_time()):
                    self.passports.check_suspicion(suspicion)
                    self.swim.accused((suspicion,), trio.current_time())
        except PeerMisbehavedError as error:
            self.quarantine(peer, str(error))
            return 0
        self._settle()
        return count

    async def _learn(self, statements: Iterable[Statement]) -> int:
        """Check and learn statements a few at a time: what another message brought meanwhile is not checked again."""
        count = checks = 0
        for statement in statements:
            if not self.swim.is_news(statement):
                continue
            checked = self.passports.check(statement, self._held(statement.peer_id))
            if checked is not None:
                count += self.swim.learned((checked,), trio.current_time())
            checks += 1
            if not checks % CHECKS_IN_A_TURN:
                await trio.lowlevel.checkpoint()
        return count

    def _held(self, peer: PeerId) -> Vouched | None:
        entry = self.swim.known.get(peer)
        if entry is not None:
            return entry.statement
        return self.swim.own if peer == self.own.peer_id else None

    def renewed(self) -> None:
        """This node has a new certificate."""
        self.swim.renewed()
        self._settle()

    def settled(self, statements: Iterable[Vouched]) -> None:
        """Accept statements that all members have for a long time: as news they would be passed on for minutes."""
        self.swim.settled(statements, trio.current_time())
        self._settle()

    async def next_actions(self) -> list[Action]:
        """Wait until actions are due, and return them."""
        while True:
            now = trio.current_time()
            due = self.swim.due(now)
            if due <= now:
                await trio.lowlevel.checkpoint()  # before the tick: a cancellation must not lose its actions
                actions = self.swim.tick(now)
                self._settle()
                return actions
            self._touched = trio.Event()
            with trio.move_on_at(due):
                await self._touched.wait()

    def _settle(self) -> None:
        """After every event: publish changes of the view, and have `next_actions` check its timers again."""
        for change in self.swim.take_changes():
            level = logging.DEBUG if change.event is Event.REFUTED else logging.INFO
            log.log(level, change.event.value, extra={"peer": change.member.peer_id, "node": change.member.name})
        self._reasons = {peer: reason for peer, reason in self._reasons.items() if self.is_quarantined(peer)}
        if self.swim.site is not self.site:
            self.site = self.swim.site
            self.version += 1
            self.changed_at = trio.current_time()
            self._changed.set()
            self._changed = trio.Event()
        self._touched.set()
