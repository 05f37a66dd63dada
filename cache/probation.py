"""Pieces that a node keeps only because members asked for them, with an account for each of these members.

No client of this node needs these pieces, so any member can have as many kept as it can ask for. The accounts bound
what it can displace by that. As long as there is room, an account may grow. Once the room is full, an asker beyond its
quota has its own oldest pieces evicted, whoever asks next, and only then the eviction policy chooses.

A member may ask for a piece because another asked it: such a piece is charged to both. A member that names others
falsely stays bounded by its own account, and one that asks through others by its own as well, because honest members
pass its name on. A new piece displaces first what the same two had kept, so that neither harms the other's account.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cache.lru_k import LRUKCache
from cache.pieces import eviction_policy
from cache.store import READ_HERE, Askers
from protocol.ids import PeerId

K = TypeVar("K", bound=Hashable)
"""The unit of eviction: a piece, or a run of them (`cache/runs.py`)."""

LARGEST_QUOTA = 2
"""At most 1 / LARGEST_QUOTA of a full room is for one asker, if there are others."""
SMALLEST_QUOTA = 8
"""At least 1 / SMALLEST_QUOTA of it: in a large site few members ask for much at the same time."""
FAIR_PARTS = 2
"""Between these bounds the quota is so many fair parts: honest members ask for about equal amounts, but not exactly."""


@dataclass(frozen=True, slots=True)
class Load:
    """What pieces take up. A store is bounded in both respects."""

    bytes: int = 0
    entries: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.bytes + other.bytes, self.entries + other.entries)

    def __sub__(self, other: Load) -> Load:
        return Load(self.bytes - other.bytes, self.entries - other.entries)

    def fits(self, limit: Load) -> bool:
        return self.bytes <= limit.bytes and self.entries <= limit.entries

    def at_most(self, limit: Load) -> Load:
        return Load(min(self.bytes, limit.bytes), min(self.entries, limit.entries))

    def part(self, numerator: int, denominator: int) -> Load:
        return Load(self.bytes * numerator // denominator, self.entries * numerator // denominator)


NOTHING = Load()


class Segment(Generic[K]):
    """Units among which LRU-K chooses the victims."""

    def __init__(self, timer: Callable[[], float]) -> None:
        self._policy: LRUKCache[K, int] = eviction_policy(int, timer)

    @property
    def load(self) -> Load:
        return Load(int(self._policy.currsize), len(self._policy))

    def __contains__(self, unit: K) -> bool:
        return unit in self._policy

    def add(self, unit: K, size: int) -> None:
        """Hold a unit, or `size` bytes more of it, which is a reference to it."""
        self._policy[unit] = size + (self._policy.peek(unit) if unit in self._policy else 0)

    def remove(self, unit: K, size: int | None = None) -> int:
        """Forget `size` bytes of the unit, or all of it. Returns the bytes."""
        held = self._policy.peek(unit)
        if size is not None and size < held:
            self._policy.replace(unit, held - size)
            return size
        del self._policy[unit]
        return held

    def refer(self, unit: K) -> None:
        self._policy.get(unit)

    def size(self, unit: K) -> int:
        return self._policy.peek(unit)

    def victims(self, short: Load) -> list[K]:
        """Units to remove, in order, to give up `short`, or all units if they are less."""
        return self._policy.worth(short.bytes, short.entries)


class _Account(Generic[K]):
    """Units kept for one asker, or for one tuple of askers, the least recently used first."""

    __slots__ = ("bytes", "units")

    def __init__(self) -> None:
        self.units: OrderedDict[K, None] = OrderedDict()
        self.bytes = 0

    @property
    def load(self) -> Load:
        return Load(self.bytes, len(self.units))


class Probation(Segment[K]):
    """The segment of the units that are kept for members only, with its accounts."""

    def __init__(self, timer: Callable[[], float]) -> None:
        super().__init__(timer)
        self._kept_for: dict[K, Askers] = {}
        self._by_peer: dict[PeerId, _Account[K]] = {}
        self._by_askers: dict[Askers, _Account[K]] = {}
        self._asking: Counter[PeerId] = Counter()
        """Units by the member that asked this node itself. Whoever it named may be invented."""

    def kept_for(self, unit: K) -> Askers:
        return self._kept_for[unit]

    def load_of(self, asker: PeerId) -> Load:
        account = self._by_peer.get(asker)
        return account.load if account else NOTHING

    def keep(self, unit: K, size: int, kept_for: Askers) -> None:
        """Hold a unit, or `size` bytes more of it, for the members that it is kept for."""
        if unit not in self:
            self._kept_for[unit] = kept_for
            self._asking[kept_for[0]] += 1
        self.add(unit, size)
        accounts = [self._by_peer.setdefault(peer, _Account()) for peer in kept_for]
        for account in (*accounts, self._by_askers.setdefault(kept_for, _Account())):
            account.units[unit] = None
            account.units.move_to_end(unit)
            account.bytes += size

    def remove(self, unit: K, size: int | None = None) -> int:
        kept_for = self._kept_for[unit]
        size = super().remove(unit, size)
        for account in self._accounts(kept_for):
            account.bytes -= size
        if unit not in self:
            self._forget(unit, kept_for)
        return size

    def _forget(self, unit: K, kept_for: Askers) -> None:
        del self._kept_for[unit]
        for account in self._accounts(kept_for):
            del account.units[unit]
        for peer in kept_for:
            if not self._by_peer[peer].units:
                del self._by_peer[peer]
        if not self._by_askers[kept_for].units:
            del self._by_askers[kept_for]
        self._asking[kept_for[0]] -= 1
        if not self._asking[kept_for[0]]:
            del self._asking[kept_for[0]]

    def refer(self, unit: K) -> None:
        super().refer(unit)
        for account in self._accounts(self._kept_for[unit]):
            account.units.move_to_end(unit)

    def _accounts(self, kept_for: Askers) -> list[_Account[K]]:
        return [*(self._by_peer[peer] for peer in kept_for), self._by_askers[kept_for]]

    def quota(self, room: Load) -> Load:
        """The part of a full `room` that is for one asker."""
        parts = min(SMALLEST_QUOTA * FAIR_PARTS, max(LARGEST_QUOTA * FAIR_PARTS, len(self._asking) + 1))
        return room.part(FAIR_PARTS, parts)

    def choose(self, short: Load, room: Load, need: Load = NOTHING, kept_for: Askers = READ_HERE) -> list[K]:
        """Units to remove, in order, to give up `short`, or all units if they are less. `room` is what the segment
        may take in all. If `need` is for more pieces on probation, these are `kept_for` members."""
        quota, chosen, freed = self.quota(room), dict[K, None](), NOTHING
        left: dict[PeerId, Load] = {}

        def name(units: Iterable[K], peer: PeerId | None = None, extra: Load = NOTHING) -> None:
            """Choose from `units` until there are enough, or until `peer` is within the quota."""
            nonlocal freed
            for unit in units:
                within = peer is not None and (left.get(peer, self.load_of(peer)) + extra).fits(quota)
                if within or short.fits(freed):
                    return
                if unit not in chosen:
                    chosen[unit] = None
                    load = Load(self.size(unit), 1)
                    freed += load
                    left.update({other: left.get(other, self.load_of(other)) - load for other in self._kept_for[unit]})

        same = self._by_askers.get(kept_for)
        for peer in reversed(kept_for):
            if same is not None:
                name(same.units, peer, need)
            if peer in self._by_peer:
                name(self._by_peer[peer].units, peer, need)
        beyond = [(account.bytes, peer) for peer, account in self._by_peer.items() if not account.load.fits(quota)]
        for _, peer in sorted(beyond, reverse=True):
            name(self._by_peer[peer].units, peer)
        if not short.fits(freed):
            name(self.victims(short))
        return list(chosen)
