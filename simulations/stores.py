"""The stores of simulated nodes. This process keeps equal bytes only once, for all nodes that hold them."""

from __future__ import annotations

import trio

from cache.memory import MemoryStore
from cache.store import READ_HERE, Askers
from cache.tiered import Tiers
from protocol.ids import Buffer, Digest, ObjectRef, Piece
from protocol.records import Record
from protocol.shard_proofs import ShardProof


class SharedBytes:
    """The bytes of all nodes: a thousand nodes that hold an image share one copy."""

    def __init__(self) -> None:
        self._held: dict[tuple[Piece, bytes], bytes] = {}

    def shared(self, piece: Piece, data: Buffer, record: Record) -> Buffer:
        """Returns the shared copy of `data`, or `data` itself if the copy for this record differs from it."""
        held = self._held.get((piece, record.sha256))
        if held is None:
            held = self._held[piece, record.sha256] = bytes(data)
        return held if held == data else data


class SharedStore(MemoryStore):
    def __init__(self, budget_bytes: int, shared: SharedBytes) -> None:
        super().__init__(budget_bytes, trio.current_time)
        self._shared = shared

    def put_nowait(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        return super().put_nowait(piece, self._shared.shared(piece, data, record), record, proof, kept_for=kept_for)


class DiskLike(SharedStore):
    """Stands in for the disk: simulations have no files."""

    def open_sealed(self, digest: Digest) -> None:
        return None

    def seal(self, ref: ObjectRef) -> bool:
        return False

    def is_pinned(self, digest: Digest) -> bool:
        return False

    async def drop_object(self, digest: Digest) -> None:
        return None


def tiers(memory: int, disk: int, shared: SharedBytes) -> Tiers:
    """The tiers of a simulated node. `memory` and `disk` are budgets in bytes."""
    return Tiers(SharedStore(memory, shared), DiskLike(disk, shared), None)
