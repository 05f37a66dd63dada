"""The statements that a node believes about every member, and the view of its site that follows from them.

Statements about a member form a total order (`supersedes`: SWIM, section 4.2). The table holds the greatest statement
heard about each member, so the order in which gossip arrives does not matter. A *hint* is a member that has sent no
statement itself yet (incarnation 0). Hints are not passed on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import msgspec

from protocol.ids import PeerId
from protocol.members import MAX_MEMBERS, Member, State, Update
from protocol.swim_values import Change, Event
from protocol.wire import MAX_INCARNATION

_EVENTS = {
    State.ALIVE: Event.REFUTED,
    State.SUSPECT: Event.SUSPECTED,
    State.DEAD: Event.DROPPED,
    State.LEFT: Event.LEFT,
}
"""The change that is reported when a live member gets another state."""


@dataclass(slots=True)
class Entry:
    """One other member. Times are values of `now`: `seen` is its last answer, None for never."""

    update: Update
    since: float
    seen: float | None = None
    rtt_s: float | None = None
    tried: float = -math.inf
    doubted: float = -math.inf

    @property
    def is_live(self) -> bool:
        return self.update.state < State.DEAD

    @property
    def is_hint(self) -> bool:
        return self.update.incarnation == 0


def supersedes(new: Update, old: Update) -> bool:
    """Whether `new` overrides `old`, both of one member: later incarnation, then graver state. Two that differ only in
    the addresses can only come from an introduction or a lie; any fixed choice makes all agree."""
    if (new.incarnation, new.state) != (old.incarnation, old.state):
        return (new.incarnation, new.state) > (old.incarnation, old.state)
    return msgspec.structs.astuple(new.member) > msgspec.structs.astuple(old.member)


def in_state(update: Update, state: State) -> Update:
    return Update(update.member, state, update.incarnation)


class MemberTable:
    """`own` is this node's statement about itself; `entries` are all other members. `excluded` are members taken out of
    the site, each with the time at which this ends. `site` has the live members of this node's site, suspects too,
    without the excluded, sorted by peer id; it is the same object until something changes. `neighbours` are their peer
    ids without this node."""

    def __init__(self, own: Update, rng: Random) -> None:
        self.own = own
        self.entries: dict[PeerId, Entry] = {}
        self.excluded: dict[PeerId, float] = {}
        self.banished: set[PeerId] = set()
        self.changes: list[Change] = []
        self._rng = rng
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
            others = [entry.update.member for peer, entry in self.entries.items() if self.is_near(peer)]
            self._site = tuple(sorted([own, *others], key=lambda member: member.peer_id))
            self._neighbours = tuple(member.peer_id for member in self._site if member is not own)
            self.stale = False

    def is_near(self, peer: PeerId) -> bool:
        """Whether `peer` is in the site and not this node."""
        entry = self.entries.get(peer)
        near = entry is not None and entry.is_live and entry.update.member.site == self.own.member.site
        return near and peer not in self.excluded

    def sample(self, count: int) -> list[PeerId]:
        return self._draw(self.neighbours, count)

    def sample_far(self, count: int) -> list[PeerId]:
        """Live members of other sites."""
        far = [p for p, e in self.entries.items() if e.is_live and e.update.member.site != self.own.member.site]
        return self._draw(far, count)

    def _draw(self, peers: Sequence[PeerId], count: int) -> list[PeerId]:
        return self._rng.sample(peers, min(count, len(peers)))

    def lost(self) -> dict[PeerId, Entry]:
        """The dead and departed members of all sites, and hints that did not answer yet."""
        return {peer: entry for peer, entry in self.entries.items() if not entry.is_live}

    def refute(self, update: Update) -> bool:
        """If `update` would override this node's own statement, give that a later incarnation."""
        if self.own.state is State.LEFT or not supersedes(update, self.own):
            return False
        self.own = Update(self.own.member, State.ALIVE, min(update.incarnation + 1, MAX_INCARNATION))
        return True

    def news_in(self, update: Update, *, whole_view: bool) -> Update | None:
        """The statement to hold after `update` was heard; None if the table stays as it is."""
        entry = self.entries.get(update.member.peer_id)
        if entry is None:
            # Deaths of unknown members are ignored, else nodes would remind each other of them for ever.
            return update if update.state < State.DEAD else None
        if whole_view and update.state is State.DEAD and entry.is_live:
            update = in_state(update, State.SUSPECT)
        return update if supersedes(update, entry.update) else None

    def hold(self, update: Update, now: float) -> bool:
        """Returns whether the site may differ now: the caller then sets `stale`."""
        peer = update.member.peer_id
        entry = self.entries.get(peer)
        before = None if entry is None else entry.update
        if entry is None:
            entry = self.entries[peer] = Entry(update, now)
        entry.update = update
        if before is None or before.state is not update.state:
            entry.since = now
        was_live = before is not None and before.state < State.DEAD
        if before is not None and was_live:
            if before.state is not update.state:
                self.note(update.member, _EVENTS[update.state])
        elif entry.is_live:
            was_shown = before is not None and before.incarnation > 0
            self.note(update.member, Event.READMITTED if was_shown else Event.JOINED)
        return before is None or before.member != update.member or was_live != entry.is_live

    def move(self, member: Member) -> None:
        entry = self.entries[member.peer_id]
        entry.update = Update(member, entry.update.state, entry.update.incarnation)
        self.stale = True

    def drop(self, peer: PeerId) -> None:
        self.stale |= self.entries.pop(peer).is_live

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
                self.note(self.entries[peer].update.member, Event.READMITTED)
