"""What a node believes of every member, and the view of its site that follows from it.

The statements of a member form a total order (`Statement.rank`). The table holds the greatest statement of each member,
so the order in which they arrive does not matter. Beside it stands this node's own conclusion, which lasts until a
greater statement comes: the member is suspected, or dead. A *hint* is a member that was named by another or read from a
file, and did not answer yet. Hints are not passed on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

from protocol.ids import PeerId
from protocol.members import MAX_MEMBERS, Member, State, Statement, Suspicion, Vouched
from protocol.swim_values import Change, Event

_EVENTS = {
    State.ALIVE: Event.REFUTED,
    State.SUSPECT: Event.SUSPECTED,
    State.DEAD: Event.DROPPED,
    State.LEFT: Event.LEFT,
}
"""The change that is reported when a live member gets another state."""
NEW_S = 10.0
"""For this time after a member came, all its statements are passed on with its certificate, longer than gossip takes:
other new members may lack it, also if the member was here before."""
KEY = 8
"""Bytes that stand for a peer id where two tables are compared."""


@dataclass(slots=True)
class Entry:
    """One other member. Times are values of `now`: `seen` is its last answer, None for never.

    `trusted`: until then a suspicion by others leads to a probe only, because it answered this node in spite of one.
    `new_since`: when it came or came back, or got another certificate. `is_new`: this was a moment ago, so that the
    certificate is passed on with the statement. `shown`: the incarnation of
    this node that the member says it has. `observed`: the host from which it was seen to connect, or "".
    """

    statement: Vouched
    state: State
    since: float
    key: bytes
    is_hint: bool = False
    is_new: bool = True
    new_since: float = -math.inf
    suspicion: Suspicion | None = None
    shown: int = 0
    observed: str = ""
    seen: float | None = None
    rtt_s: float | None = None
    tried: float = -math.inf
    doubted: float = -math.inf
    trusted: float = -math.inf

    @property
    def member(self) -> Member:
        return self.statement.member

    @property
    def is_live(self) -> bool:
        return self.state < State.DEAD


def key_of(peer: PeerId) -> bytes:
    return blake2b(peer.encode(), digest_size=KEY).digest()


class MemberTable:
    """`own` is this node's statement about itself; `entries` are all other members. `excluded` are members taken out of
    the site, each with the time at which this ends. `site` has the live members of this node's site, suspects too,
    without the excluded, sorted by peer id; it is the same object until something changes. `neighbours` are their peer
    ids without this node."""

    def __init__(self, own: Vouched, rng: Random) -> None:
        self.own = own
        self.own_key = key_of(own.peer_id)
        self.entries: dict[PeerId, Entry] = {}
        self.by_key: dict[bytes, PeerId] = {}
        self.excluded: dict[PeerId, float] = {}
        self.banished: set[PeerId] = set()
        self.changes: list[Change] = []
        self.rng = rng
        self._site: tuple[Member, ...] = (own.member,)
        self._neighbours: tuple[PeerId, ...] = ()
        self.stale = False

    @property
    def site(self) -> tuple[Member, ...]:
        self._rebuild()
        return self._site

    @property
    def neighbours(self) -> tuple[PeerId, ...]:
        self._rebuild()
        return self._neighbours

    def _rebuild(self) -> None:
        if self.stale:
            own = self.own.member
            others = [entry.member for peer, entry in self.entries.items() if self.is_near(peer)]
            self._site = tuple(sorted([own, *others], key=lambda member: member.peer_id))
            self._neighbours = tuple(member.peer_id for member in self._site if member is not own)
            self.stale = False

    def is_near(self, peer: PeerId) -> bool:
        """Whether `peer` is in the site and not this node."""
        entry = self.entries.get(peer)
        near = entry is not None and entry.is_live and entry.member.site == self.own.member.site
        return near and peer not in self.excluded

    def sample(self, count: int) -> list[PeerId]:
        return self._draw(self.neighbours, count)

    def sample_far(self, count: int) -> list[PeerId]:
        """Live members of other sites."""
        far = [p for p, e in self.entries.items() if e.is_live and e.member.site != self.own.member.site]
        return self._draw(far, count)

    def _draw(self, peers: Sequence[PeerId], count: int) -> list[PeerId]:
        return self.rng.sample(peers, min(count, len(peers)))

    def lost(self) -> dict[PeerId, Entry]:
        """The dead and departed members of all sites, and hints that did not answer yet."""
        return {peer: entry for peer, entry in self.entries.items() if not entry.is_live}

    def is_news(self, statement: Statement) -> bool:
        """Whether the table would hold `statement`, if it is vouched for."""
        peer = statement.peer_id
        if peer == self.own.peer_id:
            return not self.own.leaving and statement.rank > self.own.rank
        if peer in self.banished:
            return False
        entry = self.entries.get(peer)
        if entry is None:
            # Departures of unknown members are ignored, else nodes would remind each other of them for ever.
            return not statement.leaving
        if entry.is_hint:
            return statement.rank >= entry.statement.rank
        return statement.rank > entry.statement.rank

    def hold(self, statement: Vouched, now: float) -> bool:
        """Hold the statement of another member. Returns whether the site may differ now: the caller then sets `stale`,
        as after `conclude`."""
        peer = statement.peer_id
        before = self.entries.get(peer)
        entry = Entry(statement, statement.state, now, key_of(peer), new_since=now)
        if before is None:
            self.by_key[entry.key] = peer
        else:
            entry.seen, entry.rtt_s, entry.tried = before.seen, before.rtt_s, before.tried
            # `shown` begins at 0: after a restart the member has no statement of this node.
            if before.is_live and before.statement.seal == statement.seal:
                entry.new_since = before.new_since
                entry.is_new = now - entry.new_since < NEW_S
            if before.member.addresses == entry.member.addresses:
                entry.observed = before.observed
            if before.state is entry.state:
                entry.since = before.since
        self.entries[peer] = entry
        was_live = before is not None and before.is_live
        if before is not None and was_live:
            if before.state is not entry.state:
                self.note(before.member, _EVENTS[entry.state])
        elif entry.is_live:
            self.note(entry.member, Event.JOINED if before is None or before.is_hint else Event.READMITTED)
        return before is None or before.member != entry.member or was_live != entry.is_live

    def hint(self, statement: Vouched, now: float) -> None:
        peer = statement.peer_id
        entry = self.entries[peer] = Entry(statement, State.DEAD, now, key_of(peer), is_hint=True)
        self.by_key[entry.key] = peer

    def conclude(self, peer: PeerId, state: State, now: float) -> bool:
        """This node concludes that a live `peer` is SUSPECT or DEAD. Returns as `hold`."""
        entry = self.entries[peer]
        entry.state, entry.since = state, now
        self.note(entry.member, _EVENTS[state])
        return not entry.is_live

    def drop(self, peer: PeerId) -> None:
        entry = self.entries.pop(peer)
        del self.by_key[entry.key]
        self.stale |= entry.is_live

    def note(self, member: Member, event: Event) -> None:
        if member.site == self.own.member.site:
            self.changes.append(Change(member, event))

    def exclude(self, peer: PeerId, until: float) -> None:
        while len(self.excluded) >= MAX_MEMBERS:
            del self.excluded[min(self.excluded, key=self.excluded.__getitem__)]
        self.excluded[peer] = until
        self.stale = True

    def readmit(self, now: float) -> None:
        """End the exclusions whose time is over."""
        for peer in [peer for peer, end in self.excluded.items() if end <= now]:
            del self.excluded[peer]
            self.stale = True
            if self.is_near(peer):
                self.note(self.entries[peer].member, Event.READMITTED)
