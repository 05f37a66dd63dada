"""SWIM membership, as decisions only.

After Das, Gupta, Motivala, "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol" (2002),
with one change: only a member itself states that it is there, or leaves, and signs this. Others may suspect it; each
node concludes for itself that a suspect is dead, when no later statement came in time.

Four parts work together here: the table of statements and conclusions (`member_table`), failure detection, and
dissemination by gossip and by comparison of views. States, precedence and timings: docs/PROTOCOL.md, "Membership".

`Swim` knows no clock and no socket. `tick` returns the I/O to do; its result comes back through `acked`, `failed`,
`synced` and the methods under "Learning". All statements and suspicions that come in are checked already: ask `is_news`
and `heeds` first, which spares the check of what changes nothing. Call `tick` whenever the time `due` is reached; ask
for `due` again after every event.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from random import Random

from protocol.dissemination import GossipQueue, Syncs
from protocol.failure_detector import Accusers, FailureDetector
from protocol.ids import PeerId
from protocol.member_table import Entry, MemberTable
from protocol.members import MAX_MEMBERS, Member, News, State, Suspicion, Vouched
from protocol.statements import Author
from protocol.summary import Difference, difference, keys_in, state_in, summary_of
from protocol.swim_values import Action, Change, Disconnect, Event, Gossip, Probe, SwimConfig, Tell
from protocol.wire import MAX_INCARNATION


class Swim:
    """One idea with many events: a node's view and its duties. `known`, `excluded` and `banished` are for reading only:
    see `MemberTable`. `incarnation` should exceed that of earlier lives of this peer id; wall-clock milliseconds at
    start suffice. If the clock went backwards, the node hears a later statement that it signed itself, and takes the
    incarnation after that."""

    def __init__(
        self, own: Member, incarnation: int, author: Author, *, config: SwimConfig, rng: Random, now: float
    ) -> None:
        self._author, self._config = author, config
        self._table = MemberTable(author.state(own, max(1, min(incarnation, MAX_INCARNATION))), rng)
        self._detector = FailureDetector(self._table, config, rng, now)
        self._accusers = Accusers()
        self._gossip = GossipQueue(self._table, config, now)
        self._syncs = Syncs(self._table, config, rng, now)
        self._cuts: list[PeerId] = []
        self._tells: dict[PeerId, None] = {}
        self.known: Mapping[PeerId, Entry] = self._table.entries
        self.excluded: Mapping[PeerId, float] = self._table.excluded
        self.banished: Container[PeerId] = self._table.banished
        self.news_for = self._gossip.news_for
        self.doubt = self._detector.doubt
        self.is_news = self._table.is_news

    @property
    def own(self) -> Vouched:
        return self._table.own

    @property
    def site(self) -> tuple[Member, ...]:
        return self._table.site

    def take_changes(self) -> list[Change]:
        """Changes in this node's site since the last call."""
        changes, self._table.changes = self._table.changes, []
        return changes

    # Learning

    def learned(self, statements: Iterable[Vouched], now: float) -> int:
        """Returns how many of them were news."""
        self._notice_pause(now)
        count = 0
        for statement in statements:
            if not self.is_news(statement):
                continue
            count += 1
            if statement.peer_id == self.own.peer_id:
                self._state_again(statement.incarnation + 1)  # of a former life, or the clock went back
            else:
                self._adopt(statement, now)
        return count

    def settled(self, statements: Iterable[Vouched], now: float) -> None:
        """As `learned`, but all members have these already, and this node's statement too: nothing is passed on."""
        self.learned(statements, now)
        self._gossip.clear()
        for entry in self.known.values():
            entry.shown = self.own.incarnation

    def heeds(self, suspicion: Suspicion, now: float) -> bool:
        """Whether `suspicion` counts, if its accuser signed it: a live member that did not accuse too many, about the
        last statement that this node has of a member."""
        accuser, peer = suspicion.accuser, suspicion.peer_id
        by = self.known.get(accuser)
        if by is None or not by.is_live or accuser in self.excluded or accuser == peer:
            return False
        if peer == self.own.peer_id:
            is_current = suspicion.incarnation == self.own.incarnation
        else:
            entry = self.known.get(peer)
            is_current = (
                entry is not None
                and entry.state is State.ALIVE
                and suspicion.incarnation == entry.statement.incarnation
            )
        return is_current and self._accusers.may(accuser, now)

    def accused(self, suspicions: Iterable[Suspicion], now: float) -> None:
        self._notice_pause(now)
        for suspicion in suspicions:
            if self.heeds(suspicion, now) and self._accusers.take(suspicion.accuser, now):
                if suspicion.peer_id == self.own.peer_id:
                    self._refute()
                elif now < self.known[suspicion.peer_id].trusted:
                    self.doubt(suspicion.peer_id, now)
                else:
                    self._suspect(suspicion, now)

    def contacted(self, peer: PeerId, news: News, now: float) -> None:
        """A message of `peer` said which statement of this node `peer` has, and whether it doubts it."""
        self.shown(peer, news.held)
        if news.doubted and peer in self.known:
            self._doubted_by(peer, news.held, now)

    def introduced(self, statement: Vouched, now: float, observed: str = "") -> None:
        """The member itself showed `statement`, and was seen to connect from the host `observed`."""
        self._notice_pause(now)
        peer = statement.peer_id
        if peer == self.own.peer_id or peer in self.banished:
            return
        if self.is_news(statement):
            self._adopt(statement, now)
        if peer in self.known:
            self.known[peer].observed = observed
            self._syncs.want(peer)

    def hint(self, statement: Vouched, now: float) -> None:
        """The member may be alive: it is asked, and is not in the site before it is heard of."""
        peer = statement.peer_id
        if peer in self.banished or peer == self.own.peer_id or peer in self.known or not self._has_room():
            return
        self._table.hint(statement, now)
        self._syncs.want(peer)

    # Comparison of views

    def summary(self) -> bytes:
        return summary_of(self._table)

    def compared(self, peer: PeerId, summary: bytes, now: float) -> Difference:
        """The answer to the summary of `peer`, whose own statement was learned before."""
        mine = state_in(summary, self._table.own_key)
        self.shown(peer, mine[0] if mine else 0)
        if mine is not None and mine[1] in (State.SUSPECT, State.DEAD):
            self._doubted_by(peer, mine[0], now)
        return difference(self._table, summary)

    def doubt_all(self, accuser: PeerId, keys: bytes, now: float) -> None:
        """`accuser` cannot reach these: this node finds out for itself, and refutes what concerns itself."""
        if self._table.own_key in keys_in(keys):
            self._doubted_by(accuser, self.own.incarnation, now)
        for peer in self._peers(keys):
            self.doubt(peer, now)

    def wanted_by(self, peer: PeerId, keys: bytes) -> News:
        """The statements, with certificates, that `peer` wants."""
        own = [self.own] if self._table.own_key in keys_in(keys) else []
        return self._gossip.news_with(peer, (*own, *(self.known[subject].statement for subject in self._peers(keys))))

    def shown(self, peer: PeerId, incarnation: int) -> None:
        """`peer` has this node's statement of this incarnation."""
        if peer in self.known:
            self.known[peer].shown = incarnation

    def _peers(self, keys: bytes) -> list[PeerId]:
        by_key = self._table.by_key
        return [by_key[key] for key in keys_in(keys) if key in by_key]

    # Results of I/O

    def acked(self, peer: PeerId, now: float, rtt_s: float | None = None) -> None:
        """`peer` answered, by itself (with the round trip) or through a helper. This ends a suspicion here, whoever
        had it. It is passed on all the same, so that the member hears of it and refutes it."""
        self._detector.acked(peer, now, rtt_s)
        entry = self.known.get(peer)
        if entry is not None and entry.state is State.SUSPECT:
            entry.trusted = now + self._detector.suspicion_s()
            self._disprove(entry)
            self._conclude(peer, State.ALIVE, now)

    def failed(self, probe: Probe, now: float, *, helpers_answered: bool) -> None:
        """Neither `probe.peer` nor any helper on its behalf answered. Nothing is concluded across a pause."""
        self._notice_pause(now)
        if self._detector.failed(probe, helpers_answered=helpers_answered):
            incarnation = self.known[probe.peer].statement.incarnation
            self._suspect(self._author.suspect(probe.peer, incarnation), now)

    def synced(self, peer: PeerId) -> None:
        """The sync with `peer` ended, well or not."""
        self._syncs.under_way.discard(peer)

    def abandoned(self) -> None:
        """The task that did the I/O was cancelled: no probe and no sync is under way any more."""
        self._detector.probing.clear()
        self._syncs.under_way.clear()

    # Orders

    def exclude(self, peer: PeerId, until: float) -> None:
        """Take `peer` out of the site, and leave it alone, until then."""
        self._table.exclude(peer, until)
        self._cuts.append(peer)

    def banish(self, peer: PeerId) -> None:
        """Forget `peer`, and ignore every statement about it, for good. The caller bounds the number of these."""
        if peer == self.own.peer_id or peer in self.banished:
            return
        self._table.banished.add(peer)
        self._cuts.append(peer)
        if peer in self.known:
            self._table.note(self.known[peer].member, Event.REVOKED)
            self._drop(peer)

    def spread(self) -> None:
        """There is a new revocation: send it to some members of this site, and to a few of others."""
        near = self._table.sample(self._config.spread_fanout(len(self.site)))
        self._tells.update(dict.fromkeys([*near, *self._table.sample_far(self._config.gossip_fanout)]))

    def renewed(self) -> None:
        """This node has a new certificate: state it to all."""
        self._refute()
        self._gossip.certified_at = self.own.incarnation

    def leave(self) -> tuple[Gossip, ...]:
        """This node leaves: returns the messages that notify members. After this it neither probes nor refutes."""
        self._table.own = self._author.state(self.own.member, self.own.incarnation, leaving=True)
        return tuple(Gossip(peer) for peer in self._table.sample(self._config.leave_fanout))

    # Time

    def due(self, now: float) -> float:
        """When `tick` is next wanted; `now` if at once."""
        if self._cuts or self._tells:
            return now
        if self.own.leaving:
            return math.inf
        return max(now, min(self._detector.due(), self._gossip.due(), self._syncs.due()))

    def tick(self, now: float) -> list[Action]:
        self._notice_pause(now)
        for peer in self._detector.condemned(now):
            self._conclude(peer, State.DEAD, now)
            self._gossip.forget(peer)
        self._table.readmit(now)
        cuts, self._cuts = self._cuts, []
        tells, self._tells = self._tells, {}
        actions: list[Action] = [*(Disconnect(peer) for peer in cuts), *(Tell(peer) for peer in tells)]
        if not self.own.leaving:
            if now >= self._syncs.next_retry:
                for peer, entry in self._table.lost().items():
                    if entry.since < now - self._config.forget_s:
                        self._drop(peer)
            actions += [*self._detector.probes(now), *self._gossip.gossip(now), *self._syncs.begin(now)]
        return actions

    def _notice_pause(self, now: float) -> None:
        if self._detector.resume(now):
            self._syncs.next_sync = now

    # Changes

    def _doubted_by(self, peer: PeerId, incarnation: int, now: float) -> None:
        if incarnation == self.own.incarnation and self._accusers.take(peer, now):
            self._refute()

    def _refute(self) -> None:
        self._state_again(self.own.incarnation + 1)

    def _state_again(self, incarnation: int) -> None:
        if not self.own.leaving and incarnation <= MAX_INCARNATION:
            self._table.own = self._author.state(self.own.member, incarnation)
            self._gossip.rumours.add(self.own.peer_id)

    def _suspect(self, suspicion: Suspicion, now: float) -> None:
        self._conclude(suspicion.peer_id, State.SUSPECT, now)
        self.known[suspicion.peer_id].suspicion = suspicion
        self._gossip.suspicions.add(suspicion.peer_id)

    def _disprove(self, entry: Entry) -> None:
        """A suspect turned out to be alive."""
        if entry.suspicion is not None and entry.suspicion.accuser != self.own.peer_id:
            self._accusers.note_false(entry.suspicion.accuser)

    def _conclude(self, peer: PeerId, state: State, now: float) -> None:
        is_stale = self._table.conclude(peer, state, now)
        self._detector.noted(peer, state, now)  # its timeout depends on the members before this change
        self._table.stale |= is_stale

    def _adopt(self, statement: Vouched, now: float) -> None:
        """Hold `statement` from now on, and pass it on."""
        peer = statement.peer_id
        entry = self.known.get(peer)
        if entry is None and not self._has_room():
            return
        if entry is not None and entry.is_hint:
            self._syncs.wanted.pop(peer, None)  # a confirmed hint needs no sync any more
        if entry is not None and entry.state is State.SUSPECT and not statement.leaving:
            self._disprove(entry)
        self._gossip.forget(peer)
        is_stale = self._table.hold(statement, now)
        self._detector.noted(peer, statement.state, now)
        self._table.stale |= is_stale
        self._gossip.rumours.add(peer)

    def _has_room(self) -> bool:
        """Whether the table takes another member. A full table drops a lost member for it, but no live one."""
        if len(self.known) >= MAX_MEMBERS - 1:
            lost = self._table.lost()
            if not lost:
                return False
            self._drop(min(lost, key=lambda peer: lost[peer].since))
        return True

    def _drop(self, peer: PeerId) -> None:
        self._table.drop(peer)
        self._gossip.forget(peer)
        self._detector.forget(peer)
        self._syncs.wanted.pop(peer, None)
