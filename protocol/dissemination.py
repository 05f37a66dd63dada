"""How statements about members spread: by gossip piggybacked on pings, and by syncs of whole views for missed gossip.

Gossip follows SWIM, section 4.1: each statement is passed on a limited number of times, the least often sent first.
Syncs follow hashicorp/memberlist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import nsmallest
from random import Random

import msgspec

from protocol.ids import PeerId
from protocol.member_table import MemberTable
from protocol.members import State, Update
from protocol.swim_values import Gossip, SwimConfig, SyncWith
from protocol.wire import MAX_HEADER

MAX_VIEW_BYTES = MAX_HEADER - (256 << 10)
"""Bytes of a view's encoded statements: a message's bound, less its frame and all revocations. Only a view full of
invented members reaches it."""
_ENCODER = msgspec.msgpack.Encoder()


class Rumours(dict[PeerId, int]):
    """Members about which there is news to pass on, with the number of times that this news was sent."""

    def add(self, peer: PeerId) -> None:
        self[peer] = 0

    def pick(self, count: int) -> list[PeerId]:
        return nsmallest(count, self, key=self.__getitem__)

    def count(self, peers: Iterable[PeerId], limit: int) -> None:
        """Note that `peers` were sent once more; news that was sent `limit` times is dropped."""
        for peer in peers:
            self[peer] += 1
            if self[peer] >= limit:
                del self[peer]


class GossipQueue:
    """Decides which statements each message carries, and when to send a message only to pass on news."""

    def __init__(self, table: MemberTable, config: SwimConfig, now: float) -> None:
        self._table, self._config = table, config
        self.rumours = Rumours()
        self.rumours.add(table.own.member.peer_id)
        self._next_gossip = now

    def due(self) -> float:
        return self._next_gossip if self.rumours else math.inf

    def gossip(self, now: float) -> list[Gossip]:
        if not self.rumours or now < self._next_gossip:
            return []
        self._next_gossip = now + self._config.gossip_interval_s
        if not self._table.neighbours:
            self.rumours.clear()  # a sync brings everything to the next member
        return [Gossip(peer) for peer in self._table.sample(self._config.gossip_fanout)]

    def updates_for(self, peer: PeerId) -> tuple[Update, ...]:
        """The statements that a message to `peer` carries: its own, the one that `peer` has to refute, and news."""
        entries, own = self._table.entries, self._table.own
        about = entries.get(peer)
        accused = about is not None and about.update.state is not State.ALIVE
        picked = self.rumours.pick(self._config.piggyback)
        if not accused:  # a message to a suspect or dead peer does not count as sent
            self.rumours.count(picked, self._config.retransmit_limit(len(self._table.site)))
        picked = [subject for subject in picked if subject not in (peer, own.member.peer_id)]
        if about is not None and accused and not about.is_hint:
            picked.insert(0, peer)
        return (own, *(entries[subject].update for subject in picked))

    def view(self) -> tuple[Update, ...]:
        """All statements except hints, this node's own first; as many as fit into one message."""
        updates = [self._table.own]
        room = MAX_VIEW_BYTES
        for entry in self._table.entries.values():
            if not entry.is_hint:
                room -= len(_ENCODER.encode(entry.update))
                if room < 0:
                    break
                updates.append(entry.update)
        return tuple(updates)


class Syncs:
    """Exchanges of whole views: with random members, with new members, and with lost members, which may be back."""

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
            lost = [entry for entry in self._table.lost().values() if entry.update.member.site == own]
            if lost:
                longest = min(lost, key=lambda entry: entry.tried)
                longest.tried = now
                self.want(longest.update.member.peer_id)
        chosen = list(self.wanted)[: max(0, self._config.parallel_syncs - len(self.under_way))]
        for peer in chosen:
            del self.wanted[peer]
        self.under_way.update(chosen)
        return [SyncWith(peer, self._config.sync_timeout_s) for peer in chosen]
