"""The tiers of one node as one store: memory, disk, and what containerd already holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import BinaryIO, Literal, Protocol

import trio

from cache.store import READ_HERE, Askers, BlockStore, Held, Holdings, StoreStatistics
from protocol.ids import BlockId, Buffer, Digest, ObjectRef, PeerId, Piece, Shard
from protocol.records import Record
from protocol.shard_proofs import ShardProof

Tier = Literal["memory", "disk", "containerd"]
LOOKED_AT_ONCE = 256
"""Objects that containerd's folder is asked for in one turn of the loop: 3 ms."""


class FileStore(BlockStore, Protocol):
    """A store that can hand out a whole object as a file."""

    def open_sealed(self, digest: Digest) -> AbstractContextManager[BinaryIO] | None: ...


class MemoryTier(BlockStore, Protocol):
    """A store that never waits."""

    def get_nowait(self, piece: Piece) -> Held | None: ...

    def put_nowait(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool: ...

    def discard_nowait(self, piece: Piece) -> None: ...


class DiskTier(FileStore, Protocol):
    def put_nowait(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool: ...

    def seal(self, ref: ObjectRef) -> bool: ...

    def is_pinned(self, digest: Digest) -> bool: ...

    async def drop_object(self, digest: Digest) -> None: ...


class ContentTier(FileStore, Protocol):
    def has_object(self, digest: Digest) -> bool: ...


class Tiers:
    """Reads ask memory, disk, containerd in this order. The disk stores what containerd lacks, and pinned objects."""

    def __init__(self, memory: MemoryTier, disk: DiskTier, containerd: ContentTier | None) -> None:
        self._memory, self._disk, self._containerd = memory, disk, containerd
        self.stores: Mapping[Tier, BlockStore] = {"memory": memory, "disk": disk}
        if containerd is not None:
            self.stores = {**self.stores, "containerd": containerd}

    async def get(
        self, piece: Piece, size: int | None = None, *, kept_for: Askers = READ_HERE, to_memory: bool = True
    ) -> tuple[Held, Tier] | None:
        """A piece of an object of `size` bytes. With another size, even under the same digest, it is another object. A
        copy of it is put into memory, for the members that asked, or for a client of this node. This alone ends no
        probation on the disk."""
        for tier, store in self.stores.items():
            # Most reads miss: a miss must not cost a turn of the loop for each tier.
            held = await store.get(piece) if store.holds(piece) else None
            if held is not None and size in (None, held.record.size):
                # What was discarded during the read stays away.
                if to_memory and tier != "memory" and piece.shard is None and store.holds(piece):
                    await self._memory.put(piece, held.data, held.record, kept_for=kept_for)
                return held, tier
        return None

    async def put(
        self, piece: Piece, data: Buffer, record: Record, proof: ShardProof | None = None, *, kept_for: Askers
    ) -> None:
        """Store in each tier that has room, for the members that asked, or READ_HERE for a client of this node. If no
        tier stores it, nothing is lost: the caller has the bytes."""
        await trio.lowlevel.checkpoint()
        if not self.put_nowait(piece, data, record, proof, kept_for=kept_for):
            await self._disk.put(piece, data, record, proof, kept_for=kept_for)

    def get_nowait(self, piece: Piece, size: int | None = None) -> tuple[Held, Tier] | None:
        """`get` from memory only."""
        held = self._memory.get_nowait(piece)
        return (held, "memory") if held is not None and size in (None, held.record.size) else None

    def put_nowait(
        self, piece: Piece, data: Buffer, record: Record, proof: ShardProof | None = None, *, kept_for: Askers
    ) -> bool:
        """`put` as far as it does not have to wait. If the disk would have to, or declines, this is False: the caller
        may await `put`."""
        self._memory.put_nowait(piece, data, record, proof, kept_for=kept_for)
        if piece.shard is None:
            self._drop_shards(piece.block)
        left = self._left_to_containerd(piece.block.digest)
        return left or self._disk.put_nowait(piece, data, record, proof, kept_for=kept_for)

    async def replace(
        self, piece: Piece, data: Buffer, record: Record, proof: ShardProof | None = None, *, kept_for: Askers
    ) -> None:
        """`put` in place of a held piece, if any, that is of an object of another size, or has an untrusted signer or
        maker. On behalf of members, only a piece on probation is replaced: they could choose such a size."""
        if kept_for and any(store.is_used_here(piece) for store in self.stores.values()):
            return
        if self.holds(piece):
            await self.discard(piece)
        await self.put(piece, data, record, proof, kept_for=kept_for)

    def claim(self, piece: Piece) -> None:
        """A client of this node uses the piece."""
        for store in self.stores.values():
            store.claim(piece)

    def _drop_shards(self, block: BlockId) -> None:
        """A block that is held whole makes its shards redundant; the disk does the same."""
        for shard, bits in self._memory.holdings(block.digest).shards.items():
            if bits >> block.index & 1:
                self._memory.discard_nowait(Piece(block, shard))

    async def discard(self, piece: Piece) -> None:
        await self._disk.discard(piece)
        self._memory.discard_nowait(piece)  # in the same step: no read moves the piece into memory between the two

    def holds(self, piece: Piece) -> bool:
        return any(store.holds(piece) for store in self.stores.values())

    def holdings(self, digest: Digest) -> Holdings:
        blocks, shards = 0, dict[Shard, int]()
        for store in self.stores.values():
            held = store.holdings(digest)
            blocks |= held.blocks
            for shard, bits in held.shards.items():
                shards[shard] = shards.get(shard, 0) | bits
        return Holdings(blocks, shards)

    def holds_part(self, digest: Digest) -> bool:
        """Whether a tier holds a piece of the object."""
        holdings = self.holdings(digest)
        return bool(holdings.blocks or holdings.shards)

    async def signed_by(self, signer: PeerId, digest: Digest) -> dict[Piece, Record]:
        signed: dict[Piece, Record] = {}
        for store in self.stores.values():
            signed |= await store.signed_by(signer, digest)
        return signed

    def objects(self) -> Iterator[Digest]:
        """The objects of which a tier holds a piece, as they are now, each once; of the disk's first those that came
        last."""
        seen = set[Digest]()
        for digest in (digest for store in self.stores.values() for digest in store.objects()):
            if digest not in seen:
                seen.add(digest)
                yield digest

    def statistics(self) -> dict[str, StoreStatistics]:
        return {tier: store.statistics() for tier, store in self.stores.items()}

    def seal(self, ref: ObjectRef) -> None:
        """The caller just checked the object's digest over the bytes of these tiers."""
        self._disk.seal(ref)

    def is_pinned(self, digest: Digest) -> bool:
        return self._disk.is_pinned(digest)

    def open_sealed(self, digest: Digest) -> tuple[AbstractContextManager[BinaryIO], Tier] | None:
        file = self._disk.open_sealed(digest)
        if file is not None:
            return file, "disk"
        file = self._containerd.open_sealed(digest) if self._containerd else None
        return (file, "containerd") if file is not None else None

    def _left_to_containerd(self, digest: Digest) -> bool:
        """Whether only containerd stores the object. Pinned objects are on disk too: containerd may remove its copy."""
        return self._containerd is not None and self._containerd.has_object(digest) and not self._disk.is_pinned(digest)

    async def drop_doubles(self) -> None:
        """Remove from disk the objects that containerd has meanwhile stored itself."""
        if self._containerd is None:
            return
        for number, digest in enumerate(self._disk.objects()):
            if number % LOOKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if self._left_to_containerd(digest):
                await self._disk.drop_object(digest)
