"""How news of members spreads: by gossip piggybacked on pings, and by comparisons of whole views for missed gossip.

Gossip follows SWIM, section 4.1: each item is passed on a limited number of times, the least often sent first. A ping
leaves out what its receiver is seen to have, so the pings of a quiet site carry nothing. Syncs follow
hashicorp/memberlist, but send summaries and then what differs (protocol/summary.py).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from heapq import nsmallest
from random import Random

from protocol.ids import PeerId
from protocol.member_table import MemberTable
from protocol.members import NO_NEWS, News, State, Statement, Suspicion
from protocol.swim_values import Gossip, SwimConfig, SyncWith

SUSPICION_FACTOR = 2
"""A suspicion is passed on this many times as often as a statement. It has one chance to reach each member: there is no
second wave with the death, which each concludes for itself. At 20 members, 1 in 100 missed it otherwise."""


class Rumours(dict[PeerId, int]):
    """Members about which there is news to pass on, with the number of times that this news was sent."""

    def add(self, peer: PeerId) -> None:
        self[peer] = 0

    def pick(self, count: int, heard: Container[PeerId] = ()) -> list[PeerId]:
        """`heard`: members about which the receiver has just sent news itself."""
        return nsmallest(count, (peer for peer in self if peer not in heard), key=self.__getitem__)

    def count(self, peers: Iterable[PeerId], limit: int) -> None:
        """Note that `peers` were sent once more; news that was sent `limit` times is dropped."""
        for peer in peers:
            self[peer] += 1
            if self[peer] >= limit:
                del self[peer]


class GossipQueue:
    """Decides which news each message carries, and when to send a message only to pass on news.

    `rumours` are members with a new statement, `suspicions` those that are suspected: statements go first, so that no
    number of suspicions delays them. `certified_at`: the incarnation of this node's first statement with its current
    certificate; who has an earlier statement lacks the certificate.
    """

    def __init__(self, table: MemberTable, config: SwimConfig, now: float) -> None:
        self._table, self._config = table, config
        self.rumours, self.suspicions = Rumours(), Rumours()
        self.rumours.add(table.own.peer_id)
        self.certified_at = table.own.incarnation
        self._next_gossip = now

    def due(self) -> float:
        return self._next_gossip if self.rumours or self.suspicions else math.inf

    def gossip(self, now: float) -> list[Gossip]:
        if now < self.due():
            return []
        self._next_gossip = now + self._config.gossip_interval_s
        if not self._table.neighbours:
            self.clear()  # a sync brings everything to the next member
        return [Gossip(peer) for peer in self._table.sample(self._config.gossip_fanout)]

    def clear(self) -> None:
        self.rumours.clear()
        self.suspicions.clear()

    def forget(self, peer: PeerId) -> None:
        self.rumours.pop(peer, None)
        self.suspicions.pop(peer, None)

    def news_for(self, peer: PeerId, answered: News = NO_NEWS) -> News:
        """The news that a message to `peer` carries: this node's own statement unless `peer` has it, and rumours.
        `answered`: what `peer` has just sent, and need not be sent back."""
        entries, config = self._table.entries, self._config
        about = entries.get(peer)
        picked = self.rumours.pick(config.piggyback, {statement.peer_id for statement in answered.statements})
        accused = {suspicion.peer_id for suspicion in answered.suspicions}
        suspects = self.suspicions.pick(config.piggyback - len(picked), accused)
        if about is None or about.state is State.ALIVE:  # a message to a suspect or dead peer does not count as sent
            limit = config.retransmit_limit(len(self._table.site))
            self.rumours.count(picked, limit)
            self.suspicions.count(suspects, SUSPICION_FACTOR * limit)
        statements = [self._rumour(subject) for subject in picked if subject not in (peer, self._table.own.peer_id)]
        suspicions = [entries[subject].suspicion for subject in suspects if subject != peer]
        return self.news_with(
            peer, (*self._own_for(peer), *statements), tuple(item for item in suspicions if item is not None)
        )

    def news_with(
        self, peer: PeerId, statements: tuple[Statement, ...], suspicions: tuple[Suspicion, ...] = ()
    ) -> News:
        about = self._table.entries.get(peer)
        if about is None or about.is_hint:
            return News(statements, suspicions)
        doubted = about.state in (State.SUSPECT, State.DEAD)
        return News(statements, suspicions, held=about.statement.incarnation, doubted=doubted)

    def _rumour(self, subject: PeerId) -> Statement:
        entry = self._table.entries[subject]
        return entry.statement if entry.is_new else entry.statement.bare()

    def _own_for(self, peer: PeerId) -> tuple[Statement, ...]:
        own, entry = self._table.own, self._table.entries.get(peer)
        shown = 0 if entry is None else entry.shown
        if shown >= own.incarnation and not own.leaving:
            return ()
        return (own.bare() if shown >= self.certified_at else own,)


class Syncs:
    """Comparisons of whole views: with random members, with new members, and with lost members, which may be back."""

    def __init__(self, table: MemberTable, config: SwimConfig, rng: Random, now: float) -> None:
        self._table, self._config = table, config
        self.under_way: set[PeerId] = set()
        self.wanted: dict[PeerId, None] = {}
        self.next_sync = now + rng.random() * config.sync_interval_s
        self.next_retry = now + rng.random() * config.retry_interval_s

    def due(self) -> float:
        can_begin = self.wanted and len(self.under_way) < self._config.parallel_syncs
        return -math.inf if can_begin else min(self.next_sync, self.next_retry)

    def want(self, peer: PeerId) -> None:
        if peer not in self.under_way and peer not in self._table.excluded:
            self.wanted[peer] = None

    def begin(self, now: float) -> list[SyncWith]:
        members = len(self._table.site)
        if now >= self.next_sync:
            self.next_sync = now + self._config.sync_pause_s(members)
            for peer in self._table.sample(1):
                self.want(peer)
        if now >= self.next_retry:
            self.next_retry = now + self._config.retry_pause_s(members)
            own = self._table.own.member.site
            lost = [entry for entry in self._table.lost().values() if entry.member.site == own]
            if lost:
                longest = min(lost, key=lambda entry: entry.tried)
                longest.tried = now
                self.want(longest.member.peer_id)
        chosen = list(self.wanted)[: max(0, self._config.parallel_syncs - len(self.under_way))]
        for peer in chosen:
            del self.wanted[peer]
        self.under_way.update(chosen)
        return [SyncWith(peer, self._config.sync_timeout_s) for peer in chosen]
