"""The values of SWIM membership: its timings, the I/O that it asks for, and the changes that it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from protocol.ids import PeerId
from protocol.members import Member


@dataclass(frozen=True, slots=True)
class SwimConfig:
    """Each knob trades detection time against traffic or false alarms; N is the number of members of the site.

    - `probe_interval_s`: each node probes one member in each. Halving it halves detection and doubles idle traffic.
    - `probe_timeout_s`: for the ping, and again for the indirect one; above the round trip of a busy board.
    - `parallel_probes`: bounds the pings that other members' doubts can cause.
    - `indirect_probes`: helpers asked when a ping fails. More of them forgive more loss.
    - `suspicion_base`: a suspect has `probe_interval_s * (suspicion_base + log10(N))` to refute. Gossip reaches a
      site in about a second, so 2.7 s at 5 nodes and 4.5 s at 300 leave room for the way there and back.
    - `gossip_interval_s`, `gossip_fanout`: while there is news, each interval sends it to this many members.
    - `piggyback`: statements and suspicions in one message; bounds it to a few KiB.
    - `retransmit_factor`: each node passes a statement on `retransmit_factor * ceil(log10(N + 1))` times.
    - `sync_interval_s`: between comparisons of whole views, which repair missed gossip; scaled up beyond 32 nodes.
    - `sync_timeout_s`, `parallel_syncs`: bound the work that a list of stale addresses can cause.
    - `retry_interval_s`: each interval tries one dead or departed member again, so that partitions heal.
    - `forget_s`: how long a dead member is remembered.
    - `pause_s`: a tick that is this much later than due means that this node itself was paused.
    - `max_strain`: a node whose helpers are silent too suspects itself, and slows its probes up to 1 + this times.
    - `leave_fanout`: members that a leaving node notifies directly; gossip does the rest.
    """

    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.5
    parallel_probes: int = 16
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
        """If each receiver passes a revocation on to this many members at random, it reaches all in 49 of 50 cases.
        Otherwise the rest receive it with their next sync."""
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
    """Ping `peer` to deliver the piggybacked news; a failure means nothing."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class SyncWith:
    """Compare whole views with `peer`."""

    peer: PeerId
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close all connections to `peer`."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `peer` the revocations."""

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
