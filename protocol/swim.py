"""SWIM membership, as decisions only.

After Das, Gupta, Motivala, "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol" (2002).
Four parts work together here: the table of statements about members (`member_table`), failure detection, and
dissemination by gossip and by syncs. States, precedence and timings: docs/PROTOCOL.md, "Membership".

`Swim` knows no clock and no socket. `tick` returns the I/O to do; its result comes back through `acked`, `failed`,
`synced` and `received`. Call `tick` whenever the time `due` is reached; ask for `due` again after every event.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from random import Random

from protocol.dissemination import GossipQueue, Syncs
from protocol.failure_detector import FailureDetector
from protocol.ids import PeerId
from protocol.member_table import Entry, MemberTable, in_state
from protocol.members import MAX_MEMBERS, Member, State, Update
from protocol.swim_values import Action, Change, Disconnect, Event, Gossip, Probe, SwimConfig, Tell
from protocol.wire import MAX_INCARNATION


class Swim:
    """One node's view and its duties. `known`, `excluded` and `banished` are for reading only: see `MemberTable`.
    `incarnation` must exceed that of earlier lives of this peer id. Wall-clock milliseconds at start suffice: a
    restarted node then overrides all statements about its former life, including its death, before it hears them. If
    the clock went backwards, it refutes them when it hears them."""

    def __init__(self, own: Member, incarnation: int, config: SwimConfig, rng: Random, now: float) -> None:
        self._config = config
        self._table = MemberTable(Update(own, State.ALIVE, min(incarnation, MAX_INCARNATION)), rng)
        self._detector = FailureDetector(self._table, config, rng, now)
        self._gossip = GossipQueue(self._table, config, now)
        self._syncs = Syncs(self._table, config, rng, now)
        self._cuts: list[PeerId] = []
        self._tells: dict[PeerId, None] = {}
        self.known: Mapping[PeerId, Entry] = self._table.entries
        self.excluded: Mapping[PeerId, float] = self._table.excluded
        self.banished: Container[PeerId] = self._table.banished
        self.view, self.updates_for = self._gossip.view, self._gossip.updates_for
        self.acked, self.doubt = self._detector.acked, self._detector.doubt

    @property
    def own(self) -> Update:
        return self._table.own

    @property
    def site(self) -> tuple[Member, ...]:
        return self._table.site

    def take_changes(self) -> list[Change]:
        """Changes in this node's site since the last call."""
        changes, self._table.changes = self._table.changes, []
        return changes

    def received(
        self, updates: Iterable[Update], now: float, *, whole_view: bool = False, settled: bool = False
    ) -> None:
        """Statements by an authenticated member. A death in a whole view may be old, and refuted long ago on the other
        side of a healed partition: it counts as suspicion. `settled`: all members have these already, and this node's
        statements too, so that nothing is left to pass on."""
        self._notice_pause(now)
        for update in updates:
            peer = update.member.peer_id
            if peer == self.own.member.peer_id:
                if self._table.refute(update):
                    self._gossip.rumours.add(peer)
            elif update.incarnation > 0 and peer not in self.banished:
                news = self._table.news_in(update, whole_view=whole_view)
                if news is not None:
                    self._adopt(news, now)
        if settled:
            self._gossip.rumours.clear()

    def introduced(self, member: Member, now: float) -> None:
        """`member` proved that it is in the cluster, and has these addresses."""
        self._notice_pause(now)
        peer = member.peer_id
        if peer == self.own.member.peer_id or peer in self.banished:
            return
        entry = self.known.get(peer)
        if entry is None or entry.is_hint:
            self._adopt(Update(member, State.ALIVE, 0), now)
        elif entry.update.member != member:
            self._table.move(member)
        self._syncs.want(peer)

    def hint(self, member: Member, now: float) -> None:
        """`member` may be alive: it is asked, and is not in the site before it answers."""
        peer = member.peer_id
        if peer not in self.banished and peer != self.own.member.peer_id and peer not in self.known:
            self._adopt(Update(member, State.DEAD, 0), now)
            self._syncs.want(peer)

    def failed(self, probe: Probe, now: float, *, helpers_answered: bool) -> None:
        """Neither `probe.peer` nor any helper on its behalf answered. Nothing is concluded across a pause."""
        self._notice_pause(now)
        suspicion = self._detector.failed(probe, helpers_answered=helpers_answered)
        if suspicion is not None:
            self._adopt(suspicion, now)

    def synced(self, peer: PeerId) -> None:
        """The sync with `peer` ended, well or not."""
        self._syncs.under_way.discard(peer)

    def abandoned(self) -> None:
        """The task that did the I/O was cancelled: no probe and no sync is under way any more."""
        self._detector.probing.clear()
        self._syncs.under_way.clear()

    def exclude(self, peer: PeerId, until: float) -> None:
        """Take `peer` out of the site, and leave it alone, until then."""
        self._table.exclude(peer, until)
        self._cuts.append(peer)

    def banish(self, peer: PeerId) -> None:
        """Forget `peer`, and ignore every statement about it, for good. The caller bounds the number of these."""
        if peer == self.own.member.peer_id or peer in self.banished:
            return
        self._table.banished.add(peer)
        self._cuts.append(peer)
        if peer in self.known:
            self._table.note(self.known[peer].update.member, Event.REVOKED)
            self._drop(peer)

    def spread(self) -> None:
        """There is a new revocation: send it to some members of this site, and to a few of others."""
        near = self._table.sample(self._config.spread_fanout(len(self.site)))
        self._tells.update(dict.fromkeys([*near, *self._table.sample_far(self._config.gossip_fanout)]))

    def leave(self) -> tuple[Gossip, ...]:
        """This node leaves: returns the messages that notify members. After this it neither probes nor refutes."""
        self._table.own = in_state(self.own, State.LEFT)
        return tuple(Gossip(peer) for peer in self._table.sample(self._config.leave_fanout))

    def due(self, now: float) -> float:
        """When `tick` is next wanted; `now` if at once."""
        if self._cuts or self._tells:
            return now
        if self.own.state is State.LEFT:
            return math.inf
        return max(now, min(self._detector.due(), self._gossip.due(), self._syncs.due()))

    def tick(self, now: float) -> list[Action]:
        self._notice_pause(now)
        for update in self._detector.condemned(now):
            self._adopt(update, now)
        self._table.readmit(now)
        cuts, self._cuts = self._cuts, []
        tells, self._tells = self._tells, {}
        actions: list[Action] = [*(Disconnect(peer) for peer in cuts), *(Tell(peer) for peer in tells)]
        if self.own.state is not State.LEFT:
            if now >= self._syncs.next_retry:
                for peer, entry in self._table.lost().items():
                    if entry.since < now - self._config.forget_s:
                        self._drop(peer)
            actions += [*self._detector.probes(now), *self._gossip.gossip(now), *self._syncs.begin(now)]
        return actions

    def _notice_pause(self, now: float) -> None:
        if self._detector.resume(now):
            self._syncs.next_sync = now

    def _adopt(self, update: Update, now: float) -> None:
        """Hold `update` from now on, and pass it on. A full table drops a lost member for it, but no live one."""
        peer = update.member.peer_id
        entry = self.known.get(peer)
        if entry is None and len(self.known) >= MAX_MEMBERS - 1:
            lost = self._table.lost()
            if not lost:
                return
            self._drop(min(lost, key=lambda peer: lost[peer].since))
        if entry is not None and entry.is_hint and entry.update.state is State.DEAD:
            self._syncs.wanted.pop(peer, None)  # a confirmed hint needs no sync any more
        is_stale = self._table.hold(update, now)
        self._detector.heard(update, now)  # its timeout depends on the members before this change
        self._table.stale |= is_stale
        if not self.known[peer].is_hint:
            self._gossip.rumours.add(peer)

    def _drop(self, peer: PeerId) -> None:
        self._table.drop(peer)
        self._gossip.rumours.pop(peer, None)
        self._detector.forget(peer)
        self._syncs.wanted.pop(peer, None)
