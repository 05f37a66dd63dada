"""How many blocks a node has under way for its clients at a time.

A block is *cold* until it is in the site. Cold blocks share the site's uplink: the more are under way, the later each
of them arrives, and before the first arrive the nodes have nothing to exchange. So few are requested at first, one more
after each that arrived soon, and one less after each that arrived late (additive increase and decrease, as in TCP
Vegas: Brakmo and Peterson, 1995). All blocks share the node's own link: if blocks in the site take long to arrive,
fewer are under way, so that each client's next block arrives in time.

Addresses of clients have equal parts of both, and the reads of an address have equal parts of what it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Set
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)

MOST = 32
"""Blocks under way: enough for four peers at wire speed; also bounds the memory that they take."""
LEAST, FIRST = 4, 8
"""Blocks under way on slow links, and at first."""
TAKEN_S = 5.0
"""A block that takes longer than this from the site to this node makes the window smaller."""
COLD_LEAST, COLD_FIRST = 4, 8
"""Cold blocks among them, at least and at first: enough to keep a slow uplink busy while news of a block spreads."""
RAMP = 2
"""Cold blocks of a client that has received none yet, so that the first client does not take the whole window."""
SOON_S, LATE_S = 1.5, 3.0


class ReadWindow:
    """Shared by all clients of a node. `key` names a block; `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._most = FIRST
        self._cold_most = COLD_FIRST
        self._reads: Counter[str] = Counter()
        """Reads of clients that take their blocks in time, by address."""
        self._under_way: dict[Hashable, float | None] = {}
        """Each with the time at which it reached the site, None before."""
        self._cold: dict[Hashable, float] = {}

    @property
    def clients(self) -> int:
        return self._reads.total()

    @property
    def busy(self) -> bool:
        return bool(self._reads or self._under_way)

    @property
    def addresses(self) -> int:
        return len(self._reads)

    def entered(self, address: str) -> None:
        self._reads[address] += 1

    def left(self, address: str) -> None:
        self._reads[address] -= 1
        if not self._reads[address]:
            del self._reads[address]

    def share(self, address: str, *, joins: bool = False) -> int:
        """Blocks under way that a read of the address may have. `joins`: the read has no part yet."""
        return self._part(self._most, address, joins)

    def _part(self, most: int, address: str, joins: bool) -> int:
        others = self.addresses - (address in self._reads)
        return -(-most // ((others + 1) * max(1, self._reads[address] + joins)))

    def has_room(self, address: str, *, under_way: int, cold: int, warm: int, joins: bool = False) -> bool:
        """Whether a read with `under_way` blocks, `cold` of them cold, and `warm` received may ask for another stripe.
        The stripe may go beyond its part: half a stripe would cost as many requests."""
        # The parts bound the sum. A read that has no part yet must not fill a part that is not its own.
        full = joins and len(self._under_way) >= self._most
        most_cold = min(RAMP + warm, self._part(self._cold_most, address, joins))
        return not full and under_way < self.share(address, joins=joins) and cold < most_cold

    def cold_among(self, keys: Set[_Key]) -> set[_Key]:
        """Those of the keys whose blocks are cold."""
        return {*(keys & self._cold.keys())}

    def began(self, key: Hashable, now: float) -> None:
        self._under_way[key] = None
        self._cold[key] = now

    def warmed(self, key: Hashable, now: float) -> bool:
        """The block reached the site; False if that was reported before."""
        filled = len(self._cold) >= self._cold_most
        began = self._cold.pop(key, None)
        if began is None:
            return False
        self._under_way[key] = now
        if now - began > LATE_S:
            self._cold_most = max(COLD_LEAST, self._cold_most - 1)
        elif filled and now - began < SOON_S:
            self._cold_most = min(MOST, self._cold_most + 1)
        return True

    def ended(self, key: Hashable, now: float) -> None:
        self._cold.pop(key, None)
        warm_since = self._under_way.pop(key, None)
        if warm_since is not None:
            step = 1 if now - warm_since < TAKEN_S else -1
            self._most = max(LEAST, min(MOST, self._most + step))
