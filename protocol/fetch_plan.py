"""Reading a coded stripe: which keepers to ask for which shards, when an answer is late, and when to ask another.

A plan receives events and returns the requests still to be made. It ends when k distinct shards of each block have
arrived, or when no keeper is left to ask. It asks k keepers for the shards of all blocks, and a spare for those of a
late one, as in "On-demand Container Loading in AWS Lambda" (USENIX ATC'23), section 3.2. When to stop waiting: Dean and
Barroso, "The Tail at Scale" (CACM 2013).

**Clocks.** A keeper that lacks its shards answers `Waiting` while the blocks come from the upstream. This time is not
its own: its clock stands still until it reports that its answer is ready, or until another keeper's shard shows that
the block has reached the site. A peer's usual time for a shard is measured by the same clock. A peer that answers other
requests meanwhile is working, and this request waits for its turn: its clock restarts with each answer, within
TURN_FACTOR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

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
    """Ask `peer` for its shard, number `want`, of these blocks."""

    peer: PeerId
    want: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class _Asked:
    """Shards that a peer owes; its clock runs from `since`, which is infinite while the clock stands still."""

    asked_at: float
    since: float
    missing: set[int]
    tried: set[int] = field(default_factory=set)
    was_cold: bool = False
    late: bool = False
    given_up: bool = False


@dataclass(eq=False)
class StripePlan:
    """`order` has the keepers, the best to ask first; the rank of a keeper is the number of its shard. `blocks` are
    the indices of the wanted blocks. `late_after_s`: the time after which a peer's shard is an outlier; `answered_at`:
    when a peer last answered any request; `patience_s`: added to the time until a late peer is given up. `now` is
    monotonic seconds."""

    keepers: Sequence[PeerId]
    order: Sequence[PeerId]
    k: int
    blocks: Sequence[int]
    late_after_s: Callable[[PeerId], float]
    answered_at: Callable[[PeerId], float] = lambda peer: -math.inf
    patience_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        self._rank = {peer: rank for rank, peer in enumerate(self.keepers)}
        self._asked: dict[PeerId, _Asked] = {}
        self.incomplete = dict.fromkeys(self.blocks, self.k)
        """The shards that each incomplete block lacks."""
        self._warm: set[int] = set()
        """The blocks of which a shard has arrived."""
        self._slowest_s = 0.0
        self.retries = 0

    @property
    def done(self) -> bool:
        return not self.incomplete

    @property
    def stuck(self) -> bool:
        """No peer is left that could bring the missing shards."""
        return not self.done and not any(self._owed(asked) for asked in self._asked.values()) and not self.has_spare

    @property
    def has_spare(self) -> bool:
        return next(self._untried(self.incomplete), None) is not None

    @property
    def beaten(self) -> list[PeerId]:
        """Peers that are late and still owe shards."""
        return [peer for peer, asked in self._asked.items() if asked.late and asked.missing]

    @property
    def given_up(self) -> list[PeerId]:
        return [peer for peer, asked in self._asked.items() if asked.given_up]

    @property
    def waited_for(self) -> list[PeerId]:
        return [peer for peer, asked in self._asked.items() if not asked.given_up and self._owed(asked)]

    @property
    def cold(self) -> list[tuple[PeerId, float]]:
        """Peers whose clock stands still, with the time at which they were asked or last sent a shard."""
        return [
            (peer, asked.asked_at)
            for peer, asked in self._asked.items()
            if asked.since == math.inf and not asked.given_up and self._owed(asked)
        ]

    def was_cold(self, peer: PeerId) -> bool:
        """Whether the peer ever reported that it lacked shards."""
        return self._asked[peer].was_cold

    def start(self, all_at_once: bool, now: float) -> list[Ask]:
        """The first requests, to k keepers or to all."""
        return self._next(self.blocks, len(self.order) if all_at_once else self.k, now)

    def heard(self, peer: PeerId, ready: bool, now: float) -> None:
        """A `Waiting` arrived. `ready`: an answer waits for its turn on the connection; else it does not exist yet."""
        asked = self._asked.get(peer)
        if asked is not None and asked.missing and not self._is_warm(asked):
            asked.since = min(asked.since, now) if ready else math.inf
            asked.was_cold |= not ready

    def took_s(self, peer: PeerId, now: float) -> float | None:
        """Time that the peer has taken by its own clock; None if this stands still, or the peer owes nothing."""
        asked = self._asked.get(peer)
        return None if asked is None or not asked.missing or asked.since > now else now - asked.since

    def got(self, peer: PeerId, block: int, now: float) -> bool:
        """The peer's shard of a block arrived. Returns whether it is the last that the block lacked."""
        answered = self._asked[peer]
        answered.missing.discard(block)
        if block in self.incomplete:
            self._slowest_s = max(self._slowest_s, now - min(now, answered.since))
        if block not in self._warm:
            self._warm.add(block)
            for asked in self._asked.values():
                if block in asked.missing:
                    asked.since = min(asked.since, now + SETTLE_S)
        if answered.missing:
            # The next shard of its answer follows at once, unless its block is not in the site yet.
            is_cold = answered.was_cold and not self._is_warm(answered)
            answered.since, answered.asked_at = (math.inf if is_cold else now), now
        if block not in self.incomplete:
            return False
        self.incomplete[block] -= 1
        if self.incomplete[block]:
            return False
        del self.incomplete[block]
        return True

    def failed(self, peer: PeerId, now: float, *blocks: int) -> list[Ask]:
        """The peer will not bring the shards of these blocks, or none of those that it owes: ask others, even without
        spare budget."""
        missing = self._asked[peer].missing
        missing.difference_update(blocks or tuple(missing))
        self.retries += 1
        return self._top_up(now)

    def give_up(self, peer: PeerId, now: float) -> list[Ask]:
        """Stop waiting for the peer; returns the requests that replace it."""
        self._asked[peer].given_up = True
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

    def spare(self, late: PeerId, now: float) -> list[Ask]:
        """A request for one more shard of each block for which the late peer's is missing, if a keeper is left."""
        return self._next(self._owed(self._asked[late]), 1, now)

    def one_more(self, block: int, now: float) -> list[Ask]:
        """A request for one more shard of a block, if a keeper is left."""
        return self._next((block,), 1, now)

    def _owed(self, asked: _Asked) -> list[int]:
        """The incomplete blocks for which a peer owes a shard."""
        return [block for block in self.incomplete if block in asked.missing]

    def _is_warm(self, asked: _Asked) -> bool:
        """Whether the site has an incomplete block for which the peer owes a shard."""
        return any(block in self._warm for block in self._owed(asked))

    def _deadlines(self) -> Iterator[tuple[PeerId, _Asked, float]]:
        for peer, asked in self._asked.items():
            if asked.given_up or not (owed := self._owed(asked)):
                continue
            warm = [block for block in owed if block in self._warm]
            floor = WARM_FLOOR_S if warm else COLD_FLOOR_S
            last = warm and all(self.incomplete[block] == 1 and self.k > 1 for block in warm)
            bound = LAST_FACTOR * self._slowest_s if last else math.inf
            after = max(floor, self._slowest_s, min(bound, self.late_after_s(peer)))
            since = max(asked.since, min(self.answered_at(peer), asked.since + (TURN_FACTOR - 1) * after))
            after += PATIENCE_FACTOR * after + self.patience_s if asked.late else 0.0
            yield peer, asked, since + after

    def _top_up(self, now: float) -> list[Ask]:
        asks: list[Ask] = []
        while True:
            coming = dict.fromkeys(self.incomplete, 0)
            for asked in self._asked.values():
                for block in () if asked.given_up else self._owed(asked):
                    coming[block] += 1
            short = [block for block, left in self.incomplete.items() if coming[block] < left]
            more = self._next(short, 1, now) if short else []
            if not more:
                return asks
            asks += more

    def _untried(self, blocks: Collection[int]) -> Iterator[tuple[PeerId, tuple[int, ...]]]:
        """The keepers that were not yet asked for all of these blocks, each with those for which it may be asked."""
        for peer in self.order:
            asked = self._asked.get(peer)
            new = tuple(block for block in blocks if asked is None or block not in asked.tried)
            if new and not (asked and (asked.given_up or asked.late)):
                yield peer, new

    def _next(self, blocks: Collection[int], count: int, now: float) -> list[Ask]:
        asks = []
        for peer, new in list(self._untried(blocks))[: max(0, count)]:
            asked = self._asked.get(peer)
            if asked is None or not asked.missing:
                asked = self._asked[peer] = _Asked(now, now, set(), asked.tried if asked else set())
            asked.missing.update(new)
            asked.tried.update(new)
            asks.append(Ask(peer, self._rank[peer], new))
        return asks
