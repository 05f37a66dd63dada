"""SWIM's failure detection: when each member is probed, and what follows if it does not answer.

It uses SWIM's suspicion (section 4.2) with a last check: each node pings a suspect itself before it counts as dead, so
that no accusation outweighs an answer. It also uses the simplest form of Lifeguard's local health (Dadgar et al.,
2018): *strain* counts probes whose helpers were silent too. This points to this node's own link, and slows its probes.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from random import Random

from protocol.ids import PeerId
from protocol.member_table import MemberTable
from protocol.members import State
from protocol.swim_values import Probe, SwimConfig

RTT_GAIN = 0.2
"""Weight of a new round-trip sample: about the last five count."""


MAX_ACCUSED, ACCUSED_S = 8, 5.0
"""Suspicions of one member that count in this time. An honest node probes one member in each second, and a few more
after failed reads."""
MAX_FALSE, FALSE_S = 16, 600.0
"""After this many suspicions that turned out false, no more of the accuser count until the time is over. At 5 % loss an
honest node has four. A liar that accuses all members then causes few refutations, and delays no news."""


class Accusers:
    """Counts the suspicions of each member, and the false ones. Only members may be counted: they bound it."""

    def __init__(self) -> None:
        self._all, self._false = Counter[PeerId](), Counter[PeerId]()
        self._all_until = self._false_until = -math.inf

    def may(self, accuser: PeerId, now: float) -> bool:
        if now >= self._all_until:
            self._all.clear()
            self._all_until = now + ACCUSED_S
        if now >= self._false_until:
            self._false.clear()
            self._false_until = now + FALSE_S
        return self._all[accuser] < MAX_ACCUSED and self._false[accuser] < MAX_FALSE

    def take(self, accuser: PeerId, now: float) -> bool:
        """Count a suspicion of `accuser`. Returns whether it is heeded."""
        if not self.may(accuser, now):
            return False
        self._all[accuser] += 1
        return True

    def note_false(self, accuser: PeerId) -> None:
        self._false[accuser] += 1


class FailureDetector:
    """It returns its conclusions, which the caller stores in the table."""

    def __init__(self, table: MemberTable, config: SwimConfig, rng: Random, now: float) -> None:
        self._table, self._config, self._rng = table, config, rng
        self._suspects: dict[PeerId, float] = {}
        """Each with the time at which it counts as dead."""
        self._checked: set[PeerId] = set()
        """Suspects whose last check began."""
        self.probing: dict[PeerId, Probe] = {}
        self._wanted: dict[PeerId, None] = {}
        self._ring: list[PeerId] = []
        self._turn = self._strain = 0
        self._next_probe = now + rng.random() * config.probe_interval_s

    def due(self) -> float:
        can_probe = self._wanted and len(self.probing) < self._config.parallel_probes
        if can_probe:
            return -math.inf
        ends = (end if peer in self._checked else end - self._timeout_s for peer, end in self._suspects.items())
        return min((self._next_probe, *ends))

    @property
    def _timeout_s(self) -> float:
        return self._config.probe_timeout_s * (1 + self._strain)

    def resume(self, now: float) -> bool:
        """Whether this process was paused until now. If so, all timers restart, because no answer could arrive. The
        probe timer shows this, because only a pause can delay it by `pause_s`."""
        if now - self._next_probe <= self._config.pause_s:
            return False
        self.probing.clear()
        self._next_probe = now
        for peer in self._suspects:
            self._suspects[peer] = now + self.suspicion_s()
        self._checked.clear()
        return True

    def suspicion_s(self) -> float:
        return self._config.suspicion_s(len(self._table.site))

    def noted(self, peer: PeerId, state: State, now: float) -> None:
        """`peer` is in this state from now on: start or end its suspicion."""
        self._checked.discard(peer)
        if state is State.SUSPECT:
            self._suspects[peer] = now + self.suspicion_s()
        else:
            self._suspects.pop(peer, None)

    def condemned(self, now: float) -> list[PeerId]:
        """Suspects that neither refuted nor answered the last check in time."""
        return [peer for peer, end in self._suspects.items() if end <= now and peer in self._checked]

    def doubt(self, peer: PeerId, now: float) -> None:
        """Another part of the node, or another member, found `peer` failing: probe it at once, at most once in each
        probe interval."""
        entry = self._table.entries.get(peer)
        if entry is not None and now - entry.doubted >= self._config.probe_interval_s:
            entry.doubted = now
            self._wanted[peer] = None

    def acked(self, peer: PeerId, now: float, rtt_s: float | None = None) -> None:
        """`peer` answered, by itself (with the round trip) or through a helper."""
        if self.probing.pop(peer, None) is not None:
            self._strain = max(0, self._strain - 1)
        entry = self._table.entries.get(peer)
        if entry is None:
            return
        entry.seen = now
        if rtt_s is not None:
            entry.rtt_s = rtt_s if entry.rtt_s is None else entry.rtt_s + RTT_GAIN * (rtt_s - entry.rtt_s)

    def failed(self, probe: Probe, *, helpers_answered: bool) -> bool:
        """Whether the probed member is suspected from now on."""
        if self.probing.get(probe.peer) != probe:
            return False
        del self.probing[probe.peer]
        if probe.via and not helpers_answered:
            self._strain = min(self._config.max_strain, self._strain + 1)
        entry = self._table.entries.get(probe.peer)
        return entry is not None and entry.state is State.ALIVE

    def forget(self, peer: PeerId) -> None:
        self._suspects.pop(peer, None)
        self._checked.discard(peer)
        self.probing.pop(peer, None)
        self._wanted.pop(peer, None)

    def probes(self, now: float) -> list[Probe]:
        room = max(0, self._config.parallel_probes - len(self.probing))
        peers = dict.fromkeys(list(self._wanted)[:room])
        for peer in peers:
            del self._wanted[peer]
        if now >= self._next_probe:
            self._next_probe = now + self._config.probe_interval_s * (1 + self._strain)
            target = self._next_target()
            if target is not None:
                peers[target] = None
        probes = [self._probe(p, now) for p in peers if self._table.is_near(p) and p not in self.probing]
        return [*self._last_checks(now), *probes]

    def _last_checks(self, now: float) -> list[Probe]:
        """The suspects themselves bound their number. A late tick gives a suspect its time all the same."""
        due = [p for p, end in self._suspects.items() if p not in self._checked and end - self._timeout_s <= now]
        for peer in due:
            self._checked.add(peer)
            self._suspects[peer] = max(self._suspects[peer], now + self._timeout_s)
        checks = [Probe(peer, (), self._timeout_s, now) for peer in due if peer not in self._table.excluded]
        self.probing.update({check.peer: check for check in checks})
        return checks

    def _probe(self, peer: PeerId, now: float) -> Probe:
        via = [helper for helper in self._table.sample(self._config.indirect_probes + 1) if helper != peer]
        helpers = tuple(via[: self._config.indirect_probes])
        probe = self.probing[peer] = Probe(peer, helpers, self._timeout_s, now)
        return probe

    def _next_target(self) -> PeerId | None:
        """In turn, this node's successor in the order of the site, and the next member of a shuffled ring, as in SWIM.
        The ring alone leaves a member unprobed for t intervals with probability e**-t. A fixed watcher bounds this by
        two intervals, and the ring remains if the watcher fails too."""
        others = self._table.neighbours
        self._turn += 1
        if others and self._turn % 2:
            return others[bisect(others, self._table.own.peer_id) % len(others)]
        self._ring = [peer for peer in self._ring if self._table.is_near(peer)] or self._rng.sample(others, len(others))
        return self._ring.pop() if self._ring else None
