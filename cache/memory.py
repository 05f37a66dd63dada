"""The memory tier: pieces under a budget of bytes, evicted by LRU-K."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import trio

from cache.lru_k import LRUKCache
from cache.pieces import UNBOUNDED, Bitmaps, check_bytes, eviction_policy
from cache.store import Held, Holdings, StoreStatistics
from protocol.ids import Buffer, Digest, PeerId, Piece
from protocol.records import Record
from protocol.shard_proofs import ShardProof

ENTRY_BYTES = 1024
"""Charged for the record, the key and the policy's state of each piece."""


def _owner(data: Buffer) -> Buffer:
    """The buffer that stays allocated while `data` lives."""
    return data.obj if isinstance(data, memoryview) and isinstance(data.obj, bytes | bytearray) else data


def sole(data: Buffer) -> Buffer:
    """`data` itself, or a copy if it is a view of a larger buffer, all of which it would keep allocated."""
    if not isinstance(data, memoryview):
        return data
    owner = _owner(data)
    return data if owner is not data and len(owner) == data.nbytes and data.contiguous else bytes(data)


def _bytes_held(held: Held) -> int:
    return sys.getsizeof(_owner(held.data)) + ENTRY_BYTES


class MemoryStore:
    """A BlockStore. Its bytes cannot change outside this process, so a read needs no hash. The budget counts the memory
    that the process really holds: whole buffers, and ENTRY_BYTES for each piece."""

    def __init__(self, budget_bytes: int, timer: Callable[[], float]) -> None:
        self._cache: LRUKCache[Piece, Held] = eviction_policy(_bytes_held, timer)
        self._budget = budget_bytes
        self._pieces = Bitmaps()
        self._records: dict[Piece, Record] = {}

    def resize(self, budget_bytes: int) -> None:
        """Pieces that do not fit any more are evicted at once."""
        self._budget = budget_bytes
        self._evict(0)

    async def get(self, piece: Piece) -> Held | None:
        await trio.lowlevel.checkpoint()
        return self._cache.get(piece)

    async def put(self, piece: Piece, data: Buffer, record: Record, proof: ShardProof | None = None) -> bool:
        check_bytes(piece, data, record)
        await trio.lowlevel.checkpoint()
        if piece in self._pieces:
            return True
        held = Held(sole(data), record, proof)
        need = _bytes_held(held)
        if need > self._budget:
            return False
        self._evict(need)
        self._cache[piece] = held
        self._pieces.add(piece)
        self._records[piece] = record
        return True

    async def discard(self, piece: Piece) -> None:
        await trio.lowlevel.checkpoint()
        if piece in self._pieces:
            self._remove(piece)

    def _evict(self, need: int) -> None:
        for victim in self._cache.victims(need + UNBOUNDED - self._budget):
            self._remove(victim)

    def _remove(self, piece: Piece) -> None:
        del self._cache[piece]
        self._pieces.remove(piece)
        del self._records[piece]

    def holds(self, piece: Piece) -> bool:
        return piece in self._pieces

    def holdings(self, digest: Digest) -> Holdings:
        return self._pieces.holdings(digest)

    def signed_by(self, signer: PeerId) -> list[tuple[Piece, Record]]:
        return [(piece, record) for piece, record in self._records.items() if record.signer == signer]

    def objects(self) -> Iterable[Digest]:
        return self._pieces.objects()

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(int(self._cache.currsize), self._budget, len(self._cache))
