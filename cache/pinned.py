"""The eviction policy, without the pieces that must not be evicted: the whole blocks of pinned objects."""

from __future__ import annotations

from cache.lru_k import LRUKCache
from protocol.ids import Digest, Piece


class PinnedPolicy:
    """Holds the sizes of pieces, and names victims among those that are not pinned. A shard of a pinned object may be
    evicted: it can be derived from the whole block, which a pin has fetched. `budget_bytes`, which may be changed, is
    for pinned and other pieces together; the `policy` has no bound itself."""

    def __init__(self, policy: LRUKCache[Piece, int], pinned: frozenset[Digest], budget_bytes: int) -> None:
        self._policy, self._pinned, self.budget_bytes = policy, set(pinned), budget_bytes
        self._kept: dict[Piece, int] = {}
        self.kept_bytes = 0

    @property
    def bytes(self) -> int:
        return int(self._policy.currsize) + self.kept_bytes

    def is_pinned(self, digest: Digest) -> bool:
        return digest in self._pinned

    def keeps(self, piece: Piece) -> bool:
        return piece.shard is None and piece.block.digest in self._pinned

    def add(self, piece: Piece, size: int) -> None:
        if self.keeps(piece):
            self._kept[piece] = size
            self.kept_bytes += size
        else:
            self._policy[piece] = size

    def remove(self, piece: Piece) -> None:
        if piece in self._kept:
            self.kept_bytes -= self._kept.pop(piece)
        else:
            del self._policy[piece]

    def refer(self, piece: Piece) -> None:
        self._policy.get(piece)

    def victims(self, need: int) -> list[Piece]:
        """Pieces to remove, in order, so that `need` more fits in the budget, as far as pins allow."""
        wanted = min(need + self.kept_bytes, self.budget_bytes)
        return self._policy.victims(wanted + int(self._policy.maxsize) - self.budget_bytes)

    def pin(self, digest: Digest, pieces: list[Piece]) -> None:
        """`pieces` are the pieces of the object that are held."""
        self._pinned.add(digest)
        for piece in pieces:
            if piece.shard is None and piece not in self._kept:
                self._kept[piece] = self._policy.pop(piece)
                self.kept_bytes += self._kept[piece]

    def unpin(self, digest: Digest, pieces: list[Piece]) -> None:
        self._pinned.discard(digest)
        for piece in pieces:
            if piece in self._kept:
                self._policy[piece] = size = self._kept.pop(piece)
                self.kept_bytes -= size
