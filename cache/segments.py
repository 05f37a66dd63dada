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

from cache.pieces import UNBOUNDED
from cache.probation import NOTHING, Load, Probation, Segment
from cache.store import READ_HERE, Askers
from protocol.ids import Digest, Piece

RESERVE = 8
"""1 / RESERVE of the room that pins leave is for pieces on probation. With less, keepers forget blocks while an image
is pulled; with more, a site reads more from the registry in the long run (docs/SIMULATIONS.md)."""


class SegmentedPolicy:
    """Holds the sizes of pieces and names victims. `budget_bytes`, which may be changed, is for all segments together;
    so is `max_entries`. The caller keeps these bounds: it asks for victims, and removes them."""

    def __init__(
        self,
        timer: Callable[[], float],
        budget_bytes: int,
        *,
        max_entries: int = UNBOUNDED,
        pinned: frozenset[Digest] = frozenset(),
    ) -> None:
        self.budget_bytes, self._max_entries = budget_bytes, max_entries
        self._pinned, self._pins, self.pinned_bytes = set(pinned), dict[Piece, int](), 0
        self._used_here, self._probation = Segment(timer), Probation(timer)
        self._wanted = NOTHING
        """What members asked this node to keep, whether it was stored or not."""

    @property
    def bytes(self) -> int:
        return self._load.bytes

    @property
    def probation_bytes(self) -> int:
        return self._probation.load.bytes

    @property
    def _load(self) -> Load:
        return self._pinned_load + self._used_here.load + self._probation.load

    @property
    def _pinned_load(self) -> Load:
        return Load(self.pinned_bytes, len(self._pins))

    def is_pinned(self, digest: Digest) -> bool:
        return digest in self._pinned

    def keeps(self, piece: Piece) -> bool:
        """Whether the piece is never evicted. A shard of a pinned object may be: it can be derived from the whole
        block, which a pin has fetched."""
        return piece.shard is None and piece.block.digest in self._pinned

    def kept_for(self, piece: Piece) -> Askers:
        """The members that a held piece is kept for, or READ_HERE."""
        return self._probation.kept_for(piece) if piece in self._probation else READ_HERE

    def wanted(self, size: int) -> None:
        """A member asks this node to keep a piece of `size` bytes."""
        self._wanted += Load(size, 1)

    def add(self, piece: Piece, size: int, kept_for: Askers) -> None:
        if self.keeps(piece):
            self._pins[piece] = size
            self.pinned_bytes += size
        elif kept_for:
            self._probation.keep(piece, size, kept_for)
        else:
            self._used_here.add(piece, size)

    def remove(self, piece: Piece) -> None:
        if piece in self._pins:
            self.pinned_bytes -= self._pins.pop(piece)
        else:
            self._segment(piece).remove(piece)

    def refer(self, piece: Piece) -> None:
        if piece not in self._pins:
            self._segment(piece).refer(piece)

    def _segment(self, piece: Piece) -> Segment:
        return self._probation if piece in self._probation else self._used_here

    def claim(self, piece: Piece) -> bool:
        """A client of this node used a held piece. Returns whether it was on probation before."""
        if piece not in self._probation:
            return False
        self._used_here.add(piece, self._probation.remove(piece))
        return True

    def pin(self, digest: Digest, pieces: list[Piece]) -> None:
        """`pieces` are the pieces of the object that are held."""
        self._pinned.add(digest)
        for piece in pieces:
            if piece.shard is None and piece not in self._pins:
                self._pins[piece] = size = self._segment(piece).remove(piece)
                self.pinned_bytes += size

    def unpin(self, digest: Digest, pieces: list[Piece]) -> None:
        self._pinned.discard(digest)
        for piece in pieces:
            if piece in self._pins:
                size = self._pins.pop(piece)
                self.pinned_bytes -= size
                self._used_here.add(piece, size)

    def room(self, kept_for: Askers) -> int:
        """Bytes that all pieces for this purpose may take together."""
        left = self._left(self.budget_bytes)
        return (left - self._used_here.load if kept_for else left).bytes

    def _left(self, budget_bytes: int) -> Load:
        return Load(budget_bytes, self._max_entries) - self._pinned_load

    def turnover(self, need: int, spare: int = 0, budget_bytes: int | None = None) -> list[Piece]:
        """Pieces used here that make place for a new one of `need` bytes, because all others have no more room than
        what the reserve leaves; with `spare` bytes more, if any. Not for pieces on probation. A budget that is smaller
        for the time being may be given."""
        left = self._left(self.budget_bytes if budget_bytes is None else budget_bytes)
        limit = left - left.part(1, RESERVE).at_most(self._wanted)
        after = self._used_here.load + Load(need, 1)
        if after.fits(limit):
            return []
        # The reserve may have grown by much since the last call. It is given up step by step: two pieces for each new.
        over = (after - limit).at_most(Load(2 * need, 2))
        return self._used_here.victims(Load(over.bytes + spare, over.entries))

    def victims(self, need: int, kept_for: Askers = READ_HERE, entries: int = 0) -> list[Piece]:
        """Pieces to remove, in order, so that `need` more bytes and `entries` more pieces fit, as far as pins allow,
        and for pieces that are `kept_for` members, as far as pieces on probation suffice."""
        more = Load(need, entries)
        short = self._load + more - Load(self.budget_bytes, self._max_entries)
        if short.fits(NOTHING):
            return []
        room = self._left(self.budget_bytes) - self._used_here.load
        chosen = self._probation.choose(short, room, more if kept_for else NOTHING, kept_for)
        if kept_for:
            return chosen
        return chosen + self._used_here.victims(short - self._probation.load)
