"""Parts that the stores share: checks of pieces, the eviction policy's parameters, and bitmaps of held pieces."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from cache.lru_k import LRUKCache
from cache.store import Holdings
from protocol.errors import BadInputError
from protocol.ids import BlockId, Buffer, Digest, Piece, Shard, shard_length
from protocol.records import Record

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_SHARDS = 255
"""k + m is below the size of the code's field, GF(256)."""
CORRELATED_S = 30.0
"""References closer than this count as one: a pull puts a block, reads it back and serves it to the site's other
nodes within seconds, which does not predict later use."""
BURST_S = 600.0
"""How long such references count as one: longer than a site takes to pull an image. Without this bound, a piece in
constant use would look like a piece that was used once."""
REFERENCES = 3
"""The k of LRU-K. The last but one reference is a poor estimate of how often a piece is used; with the one before it,
hit rates are 1 to 2 points higher in caches of up to 1 % of all requested bytes (docs/SIMULATIONS.md)."""
HORIZON_S = 10 * 86400.0
"""How long frequent uses count. Popularity changes: without this bound, large caches lose to LRU."""
UNBOUNDED = 1 << 62
"""Bound of the policy in a store that enforces its budget itself: cachetools' bound cannot be changed."""


def eviction_policy(size_of: Callable[[V], int], timer: Callable[[], float]) -> LRUKCache[K, V]:
    """The policy of memory and disk. `timer` in seconds."""
    return LRUKCache(
        UNBOUNDED, size_of, k=REFERENCES, correlated=CORRELATED_S, burst=BURST_S, horizon=HORIZON_S, timer=timer
    )


def length_of(piece: Piece, record: Record) -> int:
    return record.length if piece.shard is None else shard_length(record.length, piece.shard.k)


def check_piece(piece: Piece, record: Record) -> None:
    """Raises BadInputError unless `piece` is possible and `record` is of its block."""
    ref, shard = record.object, piece.shard
    if ref.block(record.index) != piece.block or record.length != ref.block_length(record.index):
        raise BadInputError(f"record of {record.digest} #{record.index} given with {piece}")
    if shard and not (shard.k >= 1 and shard.m >= 0 and 0 <= shard.index < shard.k + shard.m <= MAX_SHARDS):
        raise BadInputError(f"no such shard: {shard}")


def check_bytes(piece: Piece, data: Buffer, record: Record) -> None:
    """Raises BadInputError unless `data` has the length of this piece and `record` is of its block."""
    check_piece(piece, record)
    if len(data) != length_of(piece, record):
        raise BadInputError(f"{len(data)} bytes are not {piece}")


def set_bits(bits: int) -> Iterator[int]:
    """The indices of the bits that are set, in order; in linear time, which shifts by each index would not be."""
    for place, byte in enumerate(bits.to_bytes((bits.bit_length() + 7) // 8, "little")):
        for bit in range(8) if byte else ():
            if byte >> bit & 1:
                yield 8 * place + bit


class Bitmaps:
    """Which pieces are held: for each object a bitmap of blocks for each shard, and a bitmap for whole blocks."""

    def __init__(self) -> None:
        self._objects: dict[Digest, dict[Shard | None, int]] = {}

    def add(self, piece: Piece) -> None:
        shelves = self._objects.setdefault(piece.block.digest, {})
        shelves[piece.shard] = shelves.get(piece.shard, 0) | 1 << piece.block.index

    def remove(self, piece: Piece) -> None:
        shelves = self._objects[piece.block.digest]
        shelves[piece.shard] &= ~(1 << piece.block.index)
        if not shelves[piece.shard]:
            del shelves[piece.shard]
        if not shelves:
            del self._objects[piece.block.digest]

    def __contains__(self, piece: Piece) -> bool:
        return bool(self.bitmap(piece.block.digest, piece.shard) >> piece.block.index & 1)

    def bitmap(self, digest: Digest, shard: Shard | None = None) -> int:
        return self._objects.get(digest, {}).get(shard, 0)

    def holdings(self, digest: Digest) -> Holdings:
        shelves = self._objects.get(digest, {})
        return Holdings(shelves.get(None, 0), {shard: bits for shard, bits in shelves.items() if shard is not None})

    def shards_of(self, block: BlockId) -> list[Piece]:
        shelves = self._objects.get(block.digest, {})
        return [Piece(block, shard) for shard, bits in shelves.items() if shard is not None and bits >> block.index & 1]

    def pieces(self, digest: Digest) -> list[Piece]:
        return [piece for shard in self._objects.get(digest, {}) for piece in self.pieces_of(digest, shard)]

    def pieces_of(self, digest: Digest, shard: Shard | None) -> list[Piece]:
        return [Piece(BlockId(digest, index), shard) for index in set_bits(self.bitmap(digest, shard))]

    def objects(self) -> Iterable[Digest]:
        return list(self._objects)
