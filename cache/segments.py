"""The eviction policy of a store, in three segments: pinned blocks, pieces used here, and pieces on probation.

- Whole blocks of pinned objects are never victims.
- Pieces that clients of this node read are *used here*. They are never victims to make room for a piece that is kept
  for members.
- Pieces that this node keeps only because members asked for them are on *probation* (`cache/probation.py`). They go
  before anything that is used here, and leave probation when a client of this node reads them.

A part of the room that pins leave is reserved for probation: a site fetches each block once only because its members
keep pieces for each other, also when their clients have filled their stores. The reserve grows with what members ask
for, so that a node without members uses all its room itself. When it grows, nothing is evicted for it: from then on,
pieces used here take the place of others used here. Pieces on probation may also take any room that nothing uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from cache.pieces import UNBOUNDED
from cache.probation import NOTHING, K, Load, Probation, Segment
from cache.store import READ_HERE, Askers
from protocol.ids import PeerId

RESERVE = 8
"""1 / RESERVE of the room that pins leave is for pieces on probation. With less, keepers forget blocks while an image
is pulled; with more, a site reads more from the registry in the long run (docs/SIMULATIONS.md)."""
PINNED: Askers = (PeerId("pinned"),)
"""Instead of askers: the unit is never evicted."""


class SegmentedPolicy(Generic[K]):
    """Holds the sizes of units and names victims. `budget_bytes`, which may be changed, is for all segments together;
    so is `max_entries`. The caller keeps these bounds: it asks for victims, and removes them. If a unit has parts, the
    last victim has to give up only as much as is short."""

    def __init__(self, timer: Callable[[], float], budget_bytes: int, *, max_entries: int = UNBOUNDED) -> None:
        self.budget_bytes, self._max_entries = budget_bytes, max_entries
        self._pins, self.pinned_bytes = dict[K, int](), 0
        self._used_here, self._probation = Segment[K](timer), Probation[K](timer)
        self._wanted = NOTHING
        """What members asked this node to keep, whether it was stored or not."""

    @property
    def load(self) -> Load:
        return self._pinned_load + self._used_here.load + self._probation.load

    @property
    def bytes(self) -> int:
        return self.load.bytes

    @property
    def probation_bytes(self) -> int:
        return self._probation.load.bytes

    @property
    def _pinned_load(self) -> Load:
        return Load(self.pinned_bytes, len(self._pins))

    def kept_for(self, unit: K) -> Askers:
        """The members that a held unit is kept for, or READ_HERE."""
        return self._probation.kept_for(unit) if unit in self._probation else READ_HERE

    def wanted(self, size: int) -> None:
        """A member asks this node to keep a piece of `size` bytes."""
        self._wanted += Load(size, 1)

    def add(self, unit: K, size: int, kept_for: Askers) -> None:
        """Hold a unit, or `size` more bytes of it. This is a reference to it. All of a unit is kept for the same
        members, or it is used here, or PINNED."""
        if kept_for == PINNED:
            self._pins[unit] = self._pins.get(unit, 0) + size
            self.pinned_bytes += size
        elif kept_for:
            self._probation.keep(unit, size, kept_for)
        else:
            self._used_here.add(unit, size)

    def size(self, unit: K) -> int:
        """Bytes of a held unit."""
        return self._pins[unit] if unit in self._pins else self._segment(unit).size(unit)

    def remove(self, unit: K, size: int | None = None) -> None:
        """Forget `size` bytes of a unit, or all of it."""
        if unit not in self._pins:
            self._segment(unit).remove(unit, size)
            return
        size = self._pins[unit] if size is None else size
        self.pinned_bytes -= size
        self._pins[unit] -= size
        if not self._pins[unit]:
            del self._pins[unit]

    def refer(self, unit: K) -> None:
        if unit not in self._pins:
            self._segment(unit).refer(unit)

    def _segment(self, unit: K) -> Segment[K]:
        return self._probation if unit in self._probation else self._used_here

    def claim(self, unit: K) -> bool:
        """A client of this node used a held unit. Returns whether it was on probation before."""
        if unit not in self._probation:
            return False
        self._used_here.add(unit, self._probation.remove(unit))
        return True

    def room(self, kept_for: Askers) -> int:
        """Bytes that all pieces for this purpose may take together."""
        left = self._left(self.budget_bytes)
        return (left - self._used_here.load if kept_for else left).bytes

    def _left(self, budget_bytes: int) -> Load:
        return Load(budget_bytes, self._max_entries) - self._pinned_load

    def turnover(self, need: int, spare: int = 0, budget_bytes: int | None = None) -> list[K]:
        """Units used here that make place for a new piece of `need` bytes, because all others have no more room than
        what the reserve leaves; with `spare` bytes more, if any. Not for pieces on probation. A budget that is smaller
        for the time being may be given."""
        over = self.excess(need, budget_bytes)
        return self._used_here.victims(Load(over.bytes + spare, over.entries)) if over != NOTHING else []

    def excess(self, need: int, budget_bytes: int | None = None) -> Load:
        """What `turnover` frees without `spare`."""
        left = self._left(self.budget_bytes if budget_bytes is None else budget_bytes)
        limit = left - left.part(1, RESERVE).at_most(self._wanted)
        after = self._used_here.load + Load(need, 1)
        if after.fits(limit):
            return NOTHING
        # The reserve may have grown by much since the last call. It is given up step by step: two pieces for each new.
        return (after - limit).at_most(Load(2 * need, 2))

    def victims(self, need: int, kept_for: Askers = READ_HERE, entries: int = 0) -> list[K]:
        """Units to remove, in order, so that `need` more bytes and `entries` more units fit, as far as pins allow,
        and for pieces that are `kept_for` members, as far as pieces on probation suffice."""
        more = Load(need, entries)
        short = self.load + more - Load(self.budget_bytes, self._max_entries)
        if short.fits(NOTHING):
            return []
        room = self._left(self.budget_bytes) - self._used_here.load
        chosen = self._probation.choose(short, room, more if kept_for else NOTHING, kept_for)
        if kept_for:
            return chosen
        return chosen + self._used_here.victims(short - self._probation.load)
