"""The memory tier: pieces under a budget of bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import trio

from cache.pieces import Bitmaps, check_bytes
from cache.segments import SegmentedPolicy
from cache.store import READ_HERE, Askers, Held, Holdings, StoreStatistics
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
        self._policy = SegmentedPolicy[Piece](timer, budget_bytes)
        self._held: dict[Piece, Held] = {}
        self._pieces = Bitmaps()

    def resize(self, budget_bytes: int) -> None:
        """Pieces that do not fit any more are evicted at once."""
        self._policy.budget_bytes = budget_bytes
        self._remove_all(self._policy.victims(0))

    async def get(self, piece: Piece) -> Held | None:
        await trio.lowlevel.checkpoint()
        return self.get_nowait(piece)

    def get_nowait(self, piece: Piece) -> Held | None:
        held = self._held.get(piece)
        if held is not None:
            self._policy.refer(piece)
        return held

    async def put(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        check_bytes(piece, data, record)
        await trio.lowlevel.checkpoint()
        return self.put_nowait(piece, data, record, proof, kept_for=kept_for)

    def put_nowait(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        check_bytes(piece, data, record)
        if piece in self._held:
            if not kept_for:
                self.claim(piece)
            return True
        held = Held(sole(data), record, proof)
        need = _bytes_held(held)
        if kept_for:
            self._policy.wanted(need)
        if need > self._policy.room(kept_for):
            return False
        if not kept_for:
            self._remove_all(self._policy.turnover(need))
        self._remove_all(self._policy.victims(need, kept_for, entries=1))
        self._policy.add(piece, need, kept_for)
        self._held[piece] = held
        self._pieces.add(piece)
        return True

    def claim(self, piece: Piece) -> None:
        if piece in self._held:
            self._policy.claim(piece)

    def is_used_here(self, piece: Piece) -> bool:
        return piece in self._held and not self._policy.kept_for(piece)

    async def discard(self, piece: Piece) -> None:
        await trio.lowlevel.checkpoint()
        self.discard_nowait(piece)

    def discard_nowait(self, piece: Piece) -> None:
        if piece in self._held:
            self._remove_all([piece])

    def _remove_all(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._policy.remove(piece)
            del self._held[piece]
            self._pieces.remove(piece)

    def holds(self, piece: Piece) -> bool:
        return piece in self._held

    def holdings(self, digest: Digest) -> Holdings:
        return self._pieces.holdings(digest)

    async def signed_by(self, signer: PeerId, digest: Digest) -> dict[Piece, Record]:
        await trio.lowlevel.checkpoint()
        records = {piece: self._held[piece].record for piece in self._pieces.pieces(digest)}
        return {piece: record for piece, record in records.items() if record.signer == signer}

    def objects(self) -> Iterable[Digest]:
        return self._pieces.objects()

    def statistics(self) -> StoreStatistics:
        policy = self._policy
        return StoreStatistics(
            policy.bytes, policy.budget_bytes, len(self._held), probation_bytes=policy.probation_bytes
        )
