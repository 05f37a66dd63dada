"""SWIM membership, as decisions only: who is probed when, who is believed, what is passed on.

After Das, Gupta, Motivala, "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol" (2002),
with the suspicion and incarnations of its section 4.2, the local health of Lifeguard (Dadgar et al., 2018) in its
simplest form, and full-state syncs as in hashicorp/memberlist. States, precedence and timings: docs/PROTOCOL.md,
"Membership".

`Swim` knows no clock and no socket. `tick` returns the I/O to do; what came of it is told by `acked`, `failed`,
`synced` and `received`. `due` says when the next tick is wanted: after every event, and whenever that time is reached.

Statements about a member form a total order (`supersedes`), and a node holds the greatest that it has heard, so that
the order in which gossip arrives does not matter.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from heapq import nsmallest
from random import Random

import msgspec

from protocol.ids import PeerId
from protocol.members import MAX_MEMBERS, Member, State, Update
from protocol.wire import MAX_HEADER, MAX_INCARNATION

MAX_VIEW_BYTES = MAX_HEADER - (256 << 10)
"""Of a view's encoded statements: a message's bound, less its frame and all revocations. Only invented members ever
come near it."""

RTT_GAIN = 0.2
"""Weight of a new round-trip sample: about the last five count."""


_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class SwimConfig:
    """Each knob trades detection time against traffic or false alarms; N is the number of members of the site.

    - `probe_interval_s`: each node probes one member in each. Halving it halves detection and doubles idle traffic.
    - `probe_timeout_s`: for the ping, and again for the indirect one; above the round trip of a busy board.
    - `indirect_probes`: helpers asked when a ping fails. More of them forgive more loss.
    - `suspicion_base`: a suspect has `probe_interval_s * (suspicion_base + log10(N))` to refute. Gossip reaches a
      site in about a second, so 2.7 s at 5 nodes and 4.5 s at 300 leave room for the way there and back.
    - `gossip_interval_s`, `gossip_fanout`: while there is news, so many members are told each interval.
    - `piggyback`: statements in one message; bounds it to a few KiB.
    - `retransmit_factor`: each node passes a statement on `retransmit_factor * ceil(log10(N + 1))` times.
    - `sync_interval_s`: between syncs of whole views, which mend what gossip missed; scaled up beyond 32 nodes.
    - `sync_timeout_s`, `parallel_syncs`: bound the work that a list of stale addresses can cause.
    - `retry_interval_s`: one dead or departed member is tried again in each, so that partitions heal.
    - `forget_s`: how long a dead member is remembered.
    - `pause_s`: a tick so much later than due means that this very node stood still.
    - `max_strain`: a node whose helpers are silent too blames itself, and slows its probes up to 1 + this times.
    - `leave_fanout`: members that are told of a departure directly; gossip does the rest.
    """

    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.5
    indirect_probes: int = 3
    suspicion_base: float = 2.0
    gossip_interval_s: float = 0.2
    gossip_fanout: int = 3
    piggyback: int = 16
    retransmit_factor: int = 4
    sync_interval_s: float = 15.0
    sync_timeout_s: float = 2.0
    parallel_syncs: int = 4
    retry_interval_s: float = 3.0
    forget_s: float = 24 * 3600.0
    pause_s: float = 2.0
    max_strain: int = 3
    leave_fanout: int = 5

    def suspicion_s(self, members: int) -> float:
        return self.probe_interval_s * (self.suspicion_base + math.log10(max(1, members)))

    def retransmit_limit(self, members: int) -> int:
        return self.retransmit_factor * math.ceil(math.log10(members + 1))

    def spread_fanout(self, members: int) -> int:
        """If each who hears tells so many at random, all hear at once in 49 of 50 cases; else with their next sync."""
        return math.ceil(math.log(members)) + 4

    def sync_pause_s(self, members: int) -> float:
        """memberlist's push-pull scale: doubling the site beyond 32 nodes adds one interval."""
        return self.sync_interval_s * (1 + max(0, math.ceil(math.log2(max(1, members) / 32))))

    def retry_pause_s(self, members: int) -> float:
        return self.retry_interval_s * max(1.0, math.log10(max(1, members)))


@dataclass(frozen=True, slots=True)
class Probe:
    """Ping `peer`; if that fails, have each of `via` ping it. Each step may take `timeout_s`."""

    peer: PeerId
    via: tuple[PeerId, ...]
    timeout_s: float
    at: float


@dataclass(frozen=True, slots=True)
class Gossip:
    """Ping `peer` for the sake of what piggybacks; a failure means nothing."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class SyncWith:
    """Exchange whole views with `peer`."""

    peer: PeerId
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close what is open with `peer`."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell `peer` the revocations."""

    peer: PeerId


Action = Probe | Gossip | SyncWith | Disconnect | Tell


class Event(StrEnum):
    JOINED = "joined"
    SUSPECTED = "suspected"
    REFUTED = "refuted"
    DROPPED = "dropped"
    LEFT = "left"
    READMITTED = "re-admitted"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Change:
    member: Member
    event: Event


_EVENTS = {
    (None, State.ALIVE): Event.JOINED,
    (None, State.SUSPECT): Event.JOINED,
    (State.ALIVE, State.SUSPECT): Event.SUSPECTED,
    (State.ALIVE, State.DEAD): Event.DROPPED,
    (State.ALIVE, State.LEFT): Event.LEFT,
    (State.SUSPECT, State.ALIVE): Event.REFUTED,
    (State.SUSPECT, State.DEAD): Event.DROPPED,
    (State.SUSPECT, State.LEFT): Event.LEFT,
    (State.DEAD, State.ALIVE): Event.READMITTED,
    (State.DEAD, State.SUSPECT): Event.READMITTED,
    (State.LEFT, State.ALIVE): Event.READMITTED,
    (State.LEFT, State.SUSPECT): Event.READMITTED,
}


@dataclass(slots=True)
class Known:
    """What is held of one other member. Times are those given as `now`. `seen`: its last answer; None for never."""

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
        """Not yet heard of in its own words: not passed on."""
        return self.update.incarnation == 0


def supersedes(new: Update, old: Update) -> bool:
    """Whether `new` overrides `old`, both of one member: later incarnation, then graver state.

    Equal in both, with other addresses, can only come of an introduction or a lie; any fixed choice makes all agree.
    """
    if (new.incarnation, new.state) != (old.incarnation, old.state):
        return (new.incarnation, new.state) > (old.incarnation, old.state)
    return msgspec.structs.astuple(new.member) > msgspec.structs.astuple(old.member)


class Rumours:
    """News still to be passed on: the least told first, each a limited number of times."""

    def __init__(self) -> None:
        self._told: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return len(self._told)

    def add(self, peer: PeerId) -> None:
        self._told[peer] = 0

    def discard(self, peer: PeerId) -> None:
        self._told.pop(peer, None)

    def clear(self) -> None:
        self._told.clear()

    def pick(self, count: int) -> list[PeerId]:
        return nsmallest(count, self._told, key=self._told.__getitem__)

    def count(self, peers: Iterable[PeerId], limit: int) -> None:
        """`peers` were told once more."""
        for peer in peers:
            self._told[peer] += 1
            if self._told[peer] >= limit:
                del self._told[peer]


class Swim:
    """One node's view and its duties. `incarnation` must exceed that of earlier lives of this peer id.

    Wall-clock milliseconds at start do: a restarted node then overrides what is still told of its former life, its
    death too, without having to hear it first. Where the clock went backwards it hears it, and refutes.
    """

    def __init__(self, own: Member, incarnation: int, config: SwimConfig, rng: Random, now: float) -> None:
        self._config = config
        self._rng = rng
        self._own = Update(own, State.ALIVE, min(incarnation, MAX_INCARNATION))
        self._known: dict[PeerId, Known] = {}
        self._suspects: dict[PeerId, float] = {}
        self._excluded: dict[PeerId, float] = {}
        self._banished: set[PeerId] = set()
        self._rumours = Rumours()
        self._rumours.add(own.peer_id)
        self._probing: dict[PeerId, Probe] = {}
        self._syncing: set[PeerId] = set()
        self._wanted_probes: dict[PeerId, None] = {}
        self._wanted_syncs: dict[PeerId, None] = {}
        self._wanted_cuts: list[PeerId] = []
        self._wanted_tells: dict[PeerId, None] = {}
        self._changes: list[Change] = []
        self._site: tuple[Member, ...] = (own,)
        self._others: tuple[PeerId, ...] = ()
        self._stale = False
        self._ring: list[PeerId] = []
        self._turn = 0
        self._strain = 0
        self._next_probe = now + rng.random() * config.probe_interval_s
        self._next_gossip = now
        self._next_sync = now + rng.random() * config.sync_interval_s
        self._next_retry = now + rng.random() * config.retry_interval_s

    # What is known

    @property
    def own(self) -> Update:
        return self._own

    @property
    def site(self) -> tuple[Member, ...]:
        """Live members of the own site, suspects too, without the excluded; sorted by peer id. The same object
        until something changes."""
        if self._stale:
            self._rebuild()
        return self._site

    @property
    def known(self) -> dict[PeerId, Known]:
        """All others, to be read only."""
        return self._known

    def view(self) -> tuple[Update, ...]:
        """Everything worth telling, the own statement first; as much of it as fits one message."""
        updates = [self._own]
        room = MAX_VIEW_BYTES
        for known in self._known.values():
            if not known.is_hint:
                room -= len(_ENCODER.encode(known.update))
                if room < 0:
                    break
                updates.append(known.update)
        return tuple(updates)

    def updates_for(self, peer: PeerId) -> tuple[Update, ...]:
        """What a message to `peer` carries: the own statement, what is held against `peer` so that it can refute,
        and news."""
        about = self._known.get(peer)
        accused = about is not None and about.update.state is not State.ALIVE
        told = self._rumours.pick(self._config.piggyback)
        if not accused:  # what is told to a dead peer is not counted as told
            self._rumours.count(told, self._config.retransmit_limit(len(self.site)))
        told = [one for one in told if one not in (peer, self._own.member.peer_id)]
        if about is not None and accused and not about.is_hint:
            told.insert(0, peer)
        return (self._own, *(self._known[one].update for one in told))

    def take_changes(self) -> list[Change]:
        """What changed in the own site since the last call."""
        changes, self._changes = self._changes, []
        return changes

    # Events

    def received(self, updates: Iterable[Update], now: float, *, whole_view: bool = False) -> None:
        """Statements by an authenticated member. In a whole view a death is no news, and may have been refuted long
        ago on the other side of a healed partition: it counts as suspicion."""
        self._notice_pause(now)
        for update in updates:
            if update.member.peer_id == self._own.member.peer_id:
                self._refute(update)
            elif update.incarnation > 0 and update.member.peer_id not in self._banished:
                self._hear(update, now, whole_view)

    def introduced(self, member: Member, now: float) -> None:
        """`member` proved to be of the cluster, and to be at these addresses."""
        self._notice_pause(now)
        if member.peer_id == self._own.member.peer_id or member.peer_id in self._banished:
            return
        known = self._known.get(member.peer_id)
        if known is None or known.is_hint:
            self._adopt(Update(member, State.ALIVE, 0), now)
        elif known.update.member != member:
            known.update = Update(member, known.update.state, known.update.incarnation)
            self._stale = True
        self._want_sync(member.peer_id)

    def hint(self, member: Member, now: float) -> None:
        """`member` is said to have been there; it is asked, and not shown before it answers."""
        if member.peer_id in self._banished:
            return
        if member.peer_id != self._own.member.peer_id and member.peer_id not in self._known:
            self._adopt(Update(member, State.DEAD, 0), now)
            self._want_sync(member.peer_id)

    def acked(self, peer: PeerId, now: float, rtt_s: float | None = None) -> None:
        """`peer` answered, by itself (with the round trip) or through a helper."""
        if self._probing.pop(peer, None) is not None:
            self._strain = max(0, self._strain - 1)
        known = self._known.get(peer)
        if known is None:
            return
        known.seen = now
        if rtt_s is not None:
            known.rtt_s = rtt_s if known.rtt_s is None else known.rtt_s + RTT_GAIN * (rtt_s - known.rtt_s)

    def failed(self, probe: Probe, now: float, *, helpers_answered: bool) -> None:
        """Neither `probe.peer` nor any helper on its behalf answered. Nothing is concluded across a pause."""
        self._notice_pause(now)
        if self._probing.get(probe.peer) != probe:
            return
        del self._probing[probe.peer]
        if probe.via and not helpers_answered:
            self._strain = min(self._config.max_strain, self._strain + 1)
        known = self._known.get(probe.peer)
        if known is not None and known.update.state is State.ALIVE:
            self._adopt(_in_state(known.update, State.SUSPECT), now)

    def synced(self, peer: PeerId) -> None:
        """The sync with `peer` ended, well or not."""
        self._syncing.discard(peer)

    def abandoned(self) -> None:
        """Nothing is under way any more: whoever did the I/O was cancelled."""
        self._probing.clear()
        self._syncing.clear()

    def doubt(self, peer: PeerId, now: float) -> None:
        """Something else found `peer` failing: probe it at once, at most once in each probe interval."""
        known = self._known.get(peer)
        if known is not None and now - known.doubted >= self._config.probe_interval_s:
            known.doubted = now
            self._wanted_probes[peer] = None

    def exclude(self, peer: PeerId, until: float) -> None:
        """Take `peer` out of the site, and leave it alone, until then."""
        while len(self._excluded) >= MAX_MEMBERS:
            del self._excluded[min(self._excluded, key=self._excluded.__getitem__)]
        self._excluded[peer] = until
        self._wanted_cuts.append(peer)
        self._stale = True

    @property
    def excluded(self) -> Mapping[PeerId, float]:
        """Who is excluded, and until when."""
        return self._excluded

    def is_excluded(self, peer: PeerId) -> bool:
        return peer in self._excluded

    def banish(self, peer: PeerId) -> None:
        """Forget `peer`, and whatever is said of it from now on. For good: who calls bounds their number."""
        if peer == self._own.member.peer_id or peer in self._banished:
            return
        self._banished.add(peer)
        self._wanted_cuts.append(peer)
        known = self._known.get(peer)
        if known is not None:
            self._tell(known.update.member, Event.REVOKED)
            self._suspects.pop(peer, None)
            self._probing.pop(peer, None)
            self._drop(peer)
            self._stale = True

    def is_banished(self, peer: PeerId) -> bool:
        return peer in self._banished

    def spread(self) -> None:
        """There is a revocation that was not known: tell some members of this site, and a few of others."""
        site = self._own.member.site
        far = [peer for peer, one in self._known.items() if one.is_live and one.update.member.site != site]
        near = self._sample(self._config.spread_fanout(len(self.site)))
        self._wanted_tells.update(dict.fromkeys([*near, *self._pick(far, self._config.gossip_fanout)]))

    def leave(self) -> tuple[Gossip, ...]:
        """This node goes: whom to tell. After this it neither probes nor refutes."""
        self._own = _in_state(self._own, State.LEFT)
        return tuple(Gossip(peer) for peer in self._sample(self._config.leave_fanout))

    # Duties

    def due(self, now: float) -> float:
        """When `tick` is next wanted; `now` if at once."""
        if self._wanted_cuts or self._wanted_tells:
            return now
        if self._own.state is State.LEFT:
            return math.inf
        if self._wanted_probes or (self._wanted_syncs and self._free_syncs() > 0):
            return now
        times = [self._next_probe, self._next_sync, self._next_retry, *self._suspects.values()]
        if self._rumours:
            times.append(self._next_gossip)
        return max(now, min(times))

    def tick(self, now: float) -> list[Action]:
        self._notice_pause(now)
        self._expire(now)
        cuts, self._wanted_cuts = self._wanted_cuts, []
        tells, self._wanted_tells = self._wanted_tells, {}
        actions: list[Action] = [*(Disconnect(peer) for peer in cuts), *(Tell(peer) for peer in tells)]
        if self._own.state is not State.LEFT:
            actions += [*self._probes(now), *self._gossip(now), *self._syncs(now)]
        return actions

    def _notice_pause(self, now: float) -> None:
        """After a stop of this very process every timer has run out without a word having been heard: start anew.

        Judged by the probe timer, since nothing but a pause can hold that up.
        """
        if now - self._next_probe <= self._config.pause_s:
            return
        self._probing.clear()
        self._next_probe = self._next_sync = now
        for peer in self._suspects:
            self._suspects[peer] = now + self._config.suspicion_s(len(self.site))

    def _expire(self, now: float) -> None:
        for peer in [peer for peer, end in self._suspects.items() if end <= now]:
            self._adopt(_in_state(self._known[peer].update, State.DEAD), now)
        for peer in [peer for peer, end in self._excluded.items() if end <= now]:
            del self._excluded[peer]
            self._stale = True
            if self._is_near(peer):
                self._tell(self._known[peer].update.member, Event.READMITTED)

    def _probes(self, now: float) -> list[Action]:
        peers, self._wanted_probes = self._wanted_probes, {}
        if now >= self._next_probe:
            self._next_probe = now + self._config.probe_interval_s * (1 + self._strain)
            target = self._next_target()
            if target is not None:
                peers[target] = None
        return [self._probe(peer, now) for peer in peers if self._is_near(peer) and peer not in self._probing]

    def _probe(self, peer: PeerId, now: float) -> Probe:
        via = [one for one in self._sample(self._config.indirect_probes + 1) if one != peer]
        timeout = self._config.probe_timeout_s * (1 + self._strain)
        probe = Probe(peer, tuple(via[: self._config.indirect_probes]), timeout, now)
        self._probing[peer] = probe
        return probe

    def _next_target(self) -> PeerId | None:
        """By turns the own successor in the site's order, and the next of a shuffled ring, as in SWIM.

        The ring alone leaves a member unprobed for t intervals with probability e**-t; a fixed watcher bounds that
        wait by two, and where the watcher is gone as well there is still the ring.
        """
        others = self._neighbours()
        self._turn += 1
        if others and self._turn % 2:
            return others[bisect(others, self._own.member.peer_id) % len(others)]
        self._ring = [peer for peer in self._ring if self._is_near(peer)] or self._rng.sample(others, len(others))
        return self._ring.pop() if self._ring else None

    def _gossip(self, now: float) -> list[Action]:
        if not self._rumours or now < self._next_gossip:
            return []
        self._next_gossip = now + self._config.gossip_interval_s
        if not self._neighbours():
            self._rumours.clear()  # whoever comes is told everything by a sync
        return [Gossip(peer) for peer in self._sample(self._config.gossip_fanout)]

    def _syncs(self, now: float) -> list[Action]:
        if now >= self._next_sync:
            self._next_sync = now + self._config.sync_pause_s(len(self.site))
            for peer in self._sample(1):
                self._want_sync(peer)
        if now >= self._next_retry:
            self._next_retry = now + self._config.retry_pause_s(len(self.site))
            self._forget(now)
            self._retry(now)
        chosen = list(self._wanted_syncs)[: max(0, self._free_syncs())]
        for peer in chosen:
            del self._wanted_syncs[peer]
        self._syncing |= set(chosen)
        return [SyncWith(peer, self._config.sync_timeout_s) for peer in chosen]

    def _retry(self, now: float) -> None:
        site = self._own.member.site
        lost = [one for one in self._known.values() if not one.is_live and one.update.member.site == site]
        if lost:
            longest = min(lost, key=lambda one: one.tried)
            longest.tried = now
            self._want_sync(longest.update.member.peer_id)

    def _forget(self, now: float) -> None:
        old = now - self._config.forget_s
        for peer in [peer for peer, one in self._known.items() if not one.is_live and one.since < old]:
            self._drop(peer)

    def _drop(self, peer: PeerId) -> None:
        del self._known[peer]
        self._rumours.discard(peer)
        self._wanted_probes.pop(peer, None)
        self._wanted_syncs.pop(peer, None)

    def _want_sync(self, peer: PeerId) -> None:
        if peer not in self._syncing and peer not in self._excluded:
            self._wanted_syncs[peer] = None

    def _free_syncs(self) -> int:
        return self._config.parallel_syncs - len(self._syncing)

    def _sample(self, count: int) -> list[PeerId]:
        return self._pick(self._neighbours(), count)

    def _pick(self, peers: Sequence[PeerId], count: int) -> list[PeerId]:
        return self._rng.sample(peers, min(count, len(peers)))

    def _neighbours(self) -> tuple[PeerId, ...]:
        """Peer ids of the site, sorted, without the own."""
        if self._stale:
            self._rebuild()
        return self._others

    def _is_near(self, peer: PeerId) -> bool:
        known = self._known.get(peer)
        near = known is not None and known.is_live and known.update.member.site == self._own.member.site
        return near and peer not in self._excluded

    # Belief

    def _refute(self, update: Update) -> None:
        """Somebody tells something of this node that would override what it says itself."""
        if self._own.state is not State.LEFT and supersedes(update, self._own):
            incarnation = min(update.incarnation + 1, MAX_INCARNATION)
            self._own = Update(self._own.member, State.ALIVE, incarnation)
            self._rumours.add(self._own.member.peer_id)

    def _hear(self, update: Update, now: float, whole_view: bool) -> None:
        known = self._known.get(update.member.peer_id)
        if known is None:
            # The dead are not learned about, else nodes would remind each other of them for ever.
            if update.state < State.DEAD:
                self._adopt(update, now)
            return
        if whole_view and update.state is State.DEAD and known.is_live:
            update = _in_state(update, State.SUSPECT)
        if supersedes(update, known.update):
            self._adopt(update, now)

    def _adopt(self, update: Update, now: float) -> None:
        """Hold `update` from now on, and pass it on."""
        peer = update.member.peer_id
        known = self._known.get(peer)
        if known is None:
            if not self._make_room():
                return
            known = self._known[peer] = Known(update, now)
            before = None
        else:
            before, known.update = known.update, update
        self._note(before, update, now)
        if before is None or before.state is not update.state:
            known.since = now
        if not known.is_hint:
            self._rumours.add(peer)
        if before is None or before.member != update.member or (before.state < State.DEAD) != known.is_live:
            self._stale = True

    def _note(self, before: Update | None, update: Update, now: float) -> None:
        peer = update.member.peer_id
        if update.state is State.SUSPECT:
            self._suspects[peer] = now + self._config.suspicion_s(len(self.site))
        else:
            self._suspects.pop(peer, None)
        if before is not None and before.state is State.DEAD and before.incarnation == 0:
            self._wanted_syncs.pop(peer, None)  # a hint that came true needs no question any more
            before = None
        event = _EVENTS.get((None if before is None else before.state, update.state))
        if event is not None:
            self._tell(update.member, event)

    def _tell(self, member: Member, event: Event) -> None:
        if member.site == self._own.member.site:
            self._changes.append(Change(member, event))

    def _make_room(self) -> bool:
        if len(self._known) < MAX_MEMBERS - 1:
            return True
        lost = [peer for peer, one in self._known.items() if not one.is_live]
        if lost:
            self._drop(min(lost, key=lambda peer: self._known[peer].since))
        return bool(lost)

    def _rebuild(self) -> None:
        own = self._own.member
        others = [known.update.member for peer, known in self._known.items() if self._is_near(peer)]
        self._site = tuple(sorted([own, *others], key=lambda member: member.peer_id))
        self._others = tuple(member.peer_id for member in self._site if member is not own)
        self._stale = False


def _in_state(update: Update, state: State) -> Update:
    return Update(update.member, state, update.incarnation)
