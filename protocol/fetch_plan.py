"""Reading one coded block: which keepers to ask for which shards, when an answer is late, and when to ask another.

A plan receives events and returns the requests still to be made. It ends when k distinct shards have arrived, or when
no keeper is left to ask. It asks k keepers, and a spare for a late one, as in "On-demand Container Loading in AWS
Lambda" (USENIX ATC'23), section 3.2. When to stop waiting: Dean and Barroso, "The Tail at Scale" (CACM 2013).

**Clocks.** A keeper that lacks its shard answers `Waiting` while the block comes from the upstream. This time is not
its own: its clock stands still until it reports that its answer is ready, or until another keeper's shard shows that
the block has reached the site. A peer's usual time is measured by the same clock. A peer that answers other requests
meanwhile is working, and this request waits for its turn: its clock restarts with each answer, within TURN_FACTOR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from protocol.ids import PeerId

COLD_FLOOR_S = 1.5
"""Before the first shard arrives, no answer is late earlier. This suffices to notice a dead peer, and a burst of blocks
that arrived from the upstream together takes as long to pass on."""
WARM_FLOOR_S = 0.03
"""The same after the first shard: more than the loops of two busy nodes take."""
SETTLE_S = 2.0
"""After the first shard, the others reach their keepers within this time, one after another over the home's link."""
LAST_FACTOR = 2.0
"""The last missing shard is late after this many times the time of the slowest other: they share the same links."""
TURN_FACTOR = 2.0
"""A peer that answers other requests is late at the latest after this many times the wait for a silent peer."""
PATIENCE_FACTOR, PATIENCE_S = 2.0, 0.5
"""A late peer is given up FACTOR times its wait and this later: then another is asked, even without spare budget."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `peer` for shard `want`; `exact`: another shard would not help."""

    peer: PeerId
    want: int
    exact: bool = False


@dataclass(slots=True)
class _Asked:
    """A request under way; its clock runs from `since`, which is infinite while the clock stands still."""

    want: int
    asked_at: float
    since: float
    was_cold: bool = False
    late: bool = False
    given_up: bool = False


@dataclass(eq=False)
class ShardPlan:
    """`order` has the keepers, the best to ask first; the rank of a keeper is the index of its shard. `late_after_s`:
    the time after which a peer's answer is an outlier; `answered_at`: when a peer last answered any request;
    `patience_s`: added to the time until a late peer is given up. `now` is monotonic seconds."""

    keepers: Sequence[PeerId]
    order: Sequence[PeerId]
    k: int
    late_after_s: Callable[[PeerId], float]
    answered_at: Callable[[PeerId], float] = lambda peer: -math.inf
    patience_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        self._rank = {peer: rank for rank, peer in enumerate(self.keepers)}
        self._left = list(self.order)
        self._asked: dict[PeerId, _Asked] = {}
        self._have: dict[int, PeerId] = {}
        self._slowest_s = 0.0
        self.retries = 0

    @property
    def done(self) -> bool:
        return len(self._have) >= self.k

    @property
    def stuck(self) -> bool:
        """No peer is left that could bring the missing shards."""
        return not self.done and not self._asked and not self._left

    @property
    def has_spare(self) -> bool:
        return bool(self._left)

    @property
    def beaten(self) -> list[PeerId]:
        """Peers that are late and have not answered."""
        return [peer for peer, asked in self._asked.items() if asked.late]

    def start(self, all_at_once: bool, now: float) -> list[Ask]:
        """The first requests, to k keepers or to all."""
        return self._next(len(self._left) if all_at_once else self.k, now)

    def heard(self, peer: PeerId, ready: bool, now: float) -> None:
        """A `Waiting` arrived. `ready`: the answer waits for its turn on the connection; else it does not exist yet."""
        asked = self._asked.get(peer)
        if asked is not None and not self._have:
            asked.since = min(asked.since, now) if ready else math.inf
            asked.was_cold |= not ready

    def took_s(self, peer: PeerId, now: float) -> float | None:
        """Time that the peer has taken by its own clock; None if this stands still, or the peer is not asked."""
        asked = self._asked.get(peer)
        return None if asked is None or asked.since > now else now - asked.since

    @property
    def given_up(self) -> list[PeerId]:
        return [peer for peer, asked in self._asked.items() if asked.given_up]

    @property
    def waited_for(self) -> list[PeerId]:
        return [peer for peer, asked in self._asked.items() if not asked.given_up]

    @property
    def cold(self) -> list[tuple[PeerId, float]]:
        """Peers whose clock stands still, with the time at which they were asked."""
        return [
            (peer, asked.asked_at)
            for peer, asked in self._asked.items()
            if asked.since == math.inf and not asked.given_up
        ]

    def was_cold(self, peer: PeerId) -> bool:
        """Whether the peer, which has not answered yet, ever reported that it lacked its shard."""
        return self._asked[peer].was_cold

    def give_up(self, peer: PeerId, now: float) -> list[Ask]:
        """Stop waiting for the peer; returns the requests that replace it."""
        self._asked[peer].given_up = True
        self.retries += 1
        return self._top_up(now)

    def got(self, peer: PeerId, index: int, now: float) -> list[Ask]:
        """A good shard arrived. If it is a duplicate, the peer is asked once more, for exactly its own shard."""
        answered = self._asked.pop(peer)
        want = answered.want
        if index not in self._have:
            self._slowest_s = max(self._slowest_s, now - min(now, answered.since))
            for asked in self._asked.values():
                asked.since = min(asked.since, now + SETTLE_S)
            self._have[index] = peer
            return []
        self.retries += 1
        if want not in self._have and want != index and all(want != asked.want for asked in self._asked.values()):
            self._asked[peer] = _Asked(want, now, now)
            return [Ask(peer, want, exact=True)]
        return self._top_up(now)

    def failed(self, peer: PeerId, now: float) -> list[Ask]:
        """The peer will not bring its shard: ask the next one, even without spare budget."""
        self._asked.pop(peer, None)
        self.retries += 1
        return self._top_up(now)

    def next_check(self) -> float:
        """When to call `overdue`, unless an event happens first; infinity for never."""
        return min((at for _, _, at in self._deadlines()), default=math.inf)

    def overdue(self, now: float) -> tuple[list[PeerId], list[Ask]]:
        """Peers that just became late, for each of which a spare may be asked; and requests to replace others."""
        late: list[PeerId] = []
        for peer, asked, at in list(self._deadlines()):
            if at > now:
                continue
            if asked.late:
                asked.given_up = True
                self.retries += 1
            else:
                asked.late = True
                late.append(peer)
        return late, self._top_up(now)

    def spare(self, now: float) -> list[Ask]:
        """The request for one more shard, if a keeper is left to ask."""
        return self._next(1, now)

    def _deadlines(self) -> Iterator[tuple[PeerId, _Asked, float]]:
        floor = WARM_FLOOR_S if self._have else COLD_FLOOR_S
        bound = LAST_FACTOR * self._slowest_s if len(self._have) == self.k - 1 and self._have else math.inf
        for peer, asked in self._asked.items():
            if not asked.given_up:
                after = max(floor, self._slowest_s, min(bound, self.late_after_s(peer)))
                since = max(asked.since, min(self.answered_at(peer), asked.since + (TURN_FACTOR - 1) * after))
                after += PATIENCE_FACTOR * after + self.patience_s if asked.late else 0.0
                yield peer, asked, since + after

    def _top_up(self, now: float) -> list[Ask]:
        under_way = sum(not asked.given_up for asked in self._asked.values())
        return self._next(self.k - len(self._have) - under_way, now)

    def _next(self, count: int, now: float) -> list[Ask]:
        asks = []
        for _ in range(max(0, count)):
            if not self._left:
                break
            peer = self._left.pop(0)
            self._asked[peer] = _Asked(self._rank[peer], now, now)
            asks.append(Ask(peer, self._rank[peer]))
        return asks
