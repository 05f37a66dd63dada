"""SWIM's failure detection: when each member is probed, and what follows if it does not answer.

It uses SWIM's suspicion (section 4.2) and the simplest form of Lifeguard's local health (Dadgar et al., 2018): *strain*
counts probes whose helpers were silent too. This points to this node's own link, and slows its probes.
"""

from __future__ import annotations

import math
from bisect import bisect
from random import Random

from protocol.ids import PeerId
from protocol.member_table import MemberTable, in_state
from protocol.members import State, Update
from protocol.swim_values import Probe, SwimConfig

RTT_GAIN = 0.2
"""Weight of a new round-trip sample: about the last five count."""


class FailureDetector:
    """It returns its conclusions as updates, which the caller stores in the table."""

    def __init__(self, table: MemberTable, config: SwimConfig, rng: Random, now: float) -> None:
        self._table, self._config, self._rng = table, config, rng
        self._suspects: dict[PeerId, float] = {}
        """Each with the time at which it counts as dead."""
        self.probing: dict[PeerId, Probe] = {}
        self._wanted: dict[PeerId, None] = {}
        self._ring: list[PeerId] = []
        self._turn = self._strain = 0
        self._next_probe = now + rng.random() * config.probe_interval_s

    def due(self) -> float:
        return -math.inf if self._wanted else min((self._next_probe, *self._suspects.values()))

    def resume(self, now: float) -> bool:
        """Whether this process was paused until now. If so, all timers restart, because no answer could arrive. The
        probe timer shows this, because only a pause can delay it by `pause_s`."""
        if now - self._next_probe <= self._config.pause_s:
            return False
        self.probing.clear()
        self._next_probe = now
        for peer in self._suspects:
            self._suspects[peer] = now + self._suspicion_s()
        return True

    def _suspicion_s(self) -> float:
        return self._config.suspicion_s(len(self._table.site))

    def heard(self, update: Update, now: float) -> None:
        """`update` is held from now on: start or end its member's suspicion."""
        if update.state is State.SUSPECT:
            self._suspects[update.member.peer_id] = now + self._suspicion_s()
        else:
            self._suspects.pop(update.member.peer_id, None)

    def condemned(self, now: float) -> list[Update]:
        """Suspects that did not refute in time."""
        over = [peer for peer, end in self._suspects.items() if end <= now]
        return [in_state(self._table.entries[peer].update, State.DEAD) for peer in over]

    def doubt(self, peer: PeerId, now: float) -> None:
        """Another part of the node found `peer` failing: probe it at once, at most once in each probe interval."""
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

    def failed(self, probe: Probe, *, helpers_answered: bool) -> Update | None:
        if self.probing.get(probe.peer) != probe:
            return None
        del self.probing[probe.peer]
        if probe.via and not helpers_answered:
            self._strain = min(self._config.max_strain, self._strain + 1)
        entry = self._table.entries.get(probe.peer)
        if entry is None or entry.update.state is not State.ALIVE:
            return None
        return in_state(entry.update, State.SUSPECT)

    def forget(self, peer: PeerId) -> None:
        self._suspects.pop(peer, None)
        self.probing.pop(peer, None)
        self._wanted.pop(peer, None)

    def probes(self, now: float) -> list[Probe]:
        peers, self._wanted = self._wanted, {}
        if now >= self._next_probe:
            self._next_probe = now + self._config.probe_interval_s * (1 + self._strain)
            target = self._next_target()
            if target is not None:
                peers[target] = None
        return [self._probe(p, now) for p in peers if self._table.is_near(p) and p not in self.probing]

    def _probe(self, peer: PeerId, now: float) -> Probe:
        via = [helper for helper in self._table.sample(self._config.indirect_probes + 1) if helper != peer]
        timeout = self._config.probe_timeout_s * (1 + self._strain)
        probe = self.probing[peer] = Probe(peer, tuple(via[: self._config.indirect_probes]), timeout, now)
        return probe

    def _next_target(self) -> PeerId | None:
        """In turn, this node's successor in the order of the site, and the next member of a shuffled ring, as in SWIM.
        The ring alone leaves a member unprobed for t intervals with probability e**-t. A fixed watcher bounds this by
        two intervals, and the ring remains if the watcher fails too."""
        others = self._table.neighbours
        self._turn += 1
        if others and self._turn % 2:
            return others[bisect(others, self._table.own.member.peer_id) % len(others)]
        self._ring = [peer for peer in self._ring if self._table.is_near(peer)] or self._rng.sample(others, len(others))
        return self._ring.pop() if self._ring else None
