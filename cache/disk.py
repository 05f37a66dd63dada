"""The disk tier: sparse files under a hard budget of bytes. Layout and durability: docs/FORMATS.md, "Disk store".

The loop holds all state (`cache/disk_table.py`) and writes pieces into the page cache; work that waits for the disk is
done in a thread (`cache/disk_flush.py`). Until a flush has given the bytes back to the file system, a removed piece
stays charged to the budget and its slot is not written again.

A *sealed* object is a file that may be served without hashing: this process verified each of its blocks when it read or
wrote them, and no other process has changed the file since then. A changed identity voids this.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import trio

from cache.disk_flush import FLUSH_PIECES, WriteBack
from cache.disk_table import Entry, File, PieceTable, Room
from cache.files import READ, WRITE, identity_of, opened, read_at, write_at
from cache.pieces import MAX_ENTRIES, check_bytes
from cache.recovery import Folder, open_folder, space
from cache.segments import SegmentedPolicy
from cache.store import READ_HERE, Askers, Held, Holdings, StoreStatistics
from protocol.ids import Buffer, Digest, ObjectRef, PeerId, Piece
from protocol.records import Record
from protocol.shard_proofs import ShardProof

logger = logging.getLogger(__name__)

REMOVED_AT_ONCE = 1024
"""Pieces removed in one turn of the loop, 10 ms."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""A read that fails with one of these shows nothing about the piece."""


class _LeasedFile(io.FileIO):
    """While it is open, no byte of the file is given back to the file system."""

    def __init__(self, file: File) -> None:
        super().__init__(os.open(file.path, READ), "rb")
        self._file = file
        file.leases += 1

    def close(self) -> None:
        if not self.closed:
            self._file.leases -= 1
        super().close()


class DiskStore:
    """A BlockStore of sparse files, made by `open`; see the module's docstring."""

    def __init__(self, folder: Folder, policy: SegmentedPolicy, timer: Callable[[], float]) -> None:
        self._folder, self._timer = folder, timer
        self._table = PieceTable(folder, policy)
        self._room = Room(self._table, timer)
        self._write_back = WriteBack(self._table, self._room)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        directory: Path,
        budget_bytes: int,
        *,
        free_share: float = 0.0,
        free_bytes: int = 0,
        pinned: frozenset[Digest] = frozenset(),
        timer: Callable[[], float] = time.monotonic,
    ) -> AsyncIterator[DiskStore]:
        """Open or make the folder; leaving the context makes all pieces durable. At least `free_share` of the file
        system, and `free_bytes`, are left free; blocks of the `pinned` objects are not evicted. A disk that is full,
        fails or is read-only yields a store without budget, which holds nothing. Raises BadInputError if the folder
        cannot be used, if another process uses it, or if its index is of another version."""
        folder, rows = await trio.to_thread.run_sync(open_folder, directory)
        try:
            policy = SegmentedPolicy(timer, budget_bytes, max_entries=MAX_ENTRIES, pinned=pinned)
            store = cls(folder, policy, timer)
            store.resize(budget_bytes, free_share=free_share, free_bytes=free_bytes)
            store._table.adopt(rows)
            del rows  # it is large
            await store.flush()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store._write_back.run)
                try:
                    yield store
                finally:
                    nursery.cancel_scope.cancel()
                    with trio.CancelScope(shield=True):
                        await store.flush(references=True)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(folder.close)

    async def flush(self, *, references: bool = False) -> None:
        """Make held pieces durable and give back removed ones; with `references` even if these are the only change."""
        await self._write_back.flush(references=references)

    async def get(self, piece: Piece) -> Held | None:
        await trio.lowlevel.checkpoint()
        entry = self._table.entries.get(piece)
        if entry is None:
            return None
        data = bytearray(entry.length)
        try:
            problem = await self._read(entry, data)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            if error.errno in _EXHAUSTED:
                self._folder.warn_once("cannot read a piece", error)
                return None
        if self._table.entries.get(piece) is not entry:  # evicted meanwhile: the bytes read may be those of its hole
            return Held(data, entry.record, entry.proof) if problem is None else None
        if problem is not None:
            shard = f" {piece.shard}" if piece.shard else ""
            logger.warning("disk: %s #%d%s: %s: discarded", piece.block.digest, piece.block.index, shard, problem)
            self._table.remove(entry)
            return None
        self._table.refer(entry)
        return Held(data, entry.record, entry.proof)

    async def _read(self, entry: Entry, data: bytearray) -> str | None:
        """Fill `data`; returns a text if the bytes are wrong, else None. Raises OSError."""
        file = entry.file
        with opened(file.path, READ) as fd:
            identity = identity_of(os.fstat(fd))
            file.note(identity)
            complete = await read_at(fd, data, entry.offset)
        if not complete:
            return "its file is too short"
        if sha256(data).digest() != entry.sha256:
            return "its bytes are not those that were put"
        if file.identity == identity:
            file.checked |= 1 << entry.piece.block.index
        return None

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
        if self._table.has(piece, kept_for):
            return True
        if self._table.is_derivable(piece) or not await self._write_back.make_room(piece, space(len(data)), kept_for):
            return False
        if self._table.has(piece, kept_for):
            return True
        return not self._table.is_derivable(piece) and self._store(piece, data, record, proof, kept_for)

    def _store(self, piece: Piece, data: Buffer, record: Record, proof: ShardProof | None, kept_for: Askers) -> bool:
        statement = record if piece.shard is None else proof
        sha = statement.sha256 if statement is not None else sha256(data).digest()
        return self._write(self._table.entry(piece, record, sha, kept_for, proof=proof), data)

    def put_nowait(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        """`put`, which also declines where it would have to wait for room."""
        check_bytes(piece, data, record)
        if self._table.has(piece, kept_for):
            return True
        if self._table.is_derivable(piece) or not self._write_back.has_room(piece, space(len(data)), kept_for):
            return False
        return self._store(piece, data, record, proof, kept_for)

    def _write(self, entry: Entry, data: Buffer) -> bool:
        file = entry.file
        try:
            if not file.pieces:
                os.makedirs(os.path.dirname(file.path), exist_ok=True)
            with opened(file.path, WRITE) as fd:
                file.note(identity_of(os.fstat(fd)))
                write_at(fd, data, entry.offset)
                file.identity = identity_of(os.fstat(fd))
        except OSError as error:
            self._folder.warn_once("cannot store a piece", error)
            self._table.retire(entry)  # a part of it may have been written
            return False
        file.checked |= 1 << entry.piece.block.index
        self._room.spend(entry.space)
        self._table.add_written(entry)
        if len(self._table.unsynced) >= FLUSH_PIECES:
            self._write_back.hurry()
        return True

    def claim(self, piece: Piece) -> None:
        self._table.has(piece, READ_HERE)

    def is_used_here(self, piece: Piece) -> bool:
        return piece in self._table.entries and not self._table.entries[piece].kept_for

    async def discard(self, piece: Piece) -> None:
        await trio.lowlevel.checkpoint()
        if piece in self._table.entries:
            self._table.remove(self._table.entries[piece])

    async def drop_object(self, digest: Digest) -> None:
        for piece in self._table.bitmaps.pieces(digest):
            await self.discard(piece)

    def holds(self, piece: Piece) -> bool:
        return piece in self._table.entries

    def holdings(self, digest: Digest) -> Holdings:
        return self._table.bitmaps.holdings(digest)

    def signed_by(self, signer: PeerId) -> list[tuple[Piece, Record]]:
        return [(piece, e.record) for piece, e in self._table.entries.items() if e.record.signer == signer]

    def objects(self) -> Iterable[Digest]:
        return self._table.bitmaps.objects()

    def statistics(self) -> StoreStatistics:
        table, policy = self._table, self._table.policy
        figures = table.charged, policy.budget_bytes, len(table.entries), policy.pinned_bytes
        return StoreStatistics(*figures, probation_bytes=policy.probation_bytes)

    def resize(self, budget_bytes: int, *, free_share: float = 0.0, free_bytes: int = 0) -> None:
        """The bounds of `open`, from the next flush on: pieces beyond them are evicted then."""
        self._room.resize(budget_bytes, free_share, free_bytes)

    def pin(self, digest: Digest) -> None:
        """From now on no whole block of the object is evicted, whether it is held or will be."""
        pieces = self._table.bitmaps.pieces(digest)
        for piece in pieces:
            if piece.shard is None:
                self.claim(piece)
        self._table.policy.pin(digest, pieces)

    def unpin(self, digest: Digest) -> None:
        self._table.policy.unpin(digest, self._table.bitmaps.pieces(digest))

    def is_pinned(self, digest: Digest) -> bool:
        return self._table.policy.is_pinned(digest)

    def unused(self, seconds: float) -> list[Piece]:
        """Pieces that are not pinned and were not used for `seconds`."""
        before = int((time.time() - seconds) * 1000)
        keeps = self._table.policy.keeps
        return [piece for piece, entry in self._table.entries.items() if entry.used < before and not keeps(piece)]

    def beyond(self, target_bytes: int) -> list[Piece]:
        """The pieces that would be evicted so that at most `target_bytes` are held; too few if more is pinned."""
        policy = self._table.policy
        return policy.victims(policy.budget_bytes - target_bytes) if policy.bytes > target_bytes else []

    async def remove(self, pieces: Iterable[Piece], *, dry_run: bool = False) -> tuple[int, int]:
        """Remove those of `pieces` that are still held, not pinned and not being sent. Returns their number and the
        bytes of disk that they take."""
        count = freed = 0
        for number, piece in enumerate(pieces):
            if number % REMOVED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            entry = self._table.entries.get(piece)
            if entry is None or entry.file.leases or self._table.policy.keeps(piece):
                continue
            count, freed = count + 1, freed + entry.space
            if not dry_run:
                self._table.remove(entry)
        await self.flush()
        return count, freed

    def seal(self, ref: ObjectRef) -> bool:
        """The caller just checked the object's digest, over bytes read from or put to this store. True if from now on
        its file may be served without hashing: all blocks are held, and the file has not changed since their checks."""
        file = self._table.files.get((ref.digest, None))
        whole = (1 << ref.block_count) - 1
        if file is None or not whole or file.checked != whole or self._table.bitmaps.bitmap(ref.digest) != whole:
            return False
        try:
            identity = identity_of(os.stat(file.path, follow_symlinks=False))
        except OSError:
            return False
        file.sealed = file.note(identity) and identity.size == ref.size
        self._write_back.hurry()  # flush soon, so that a kill loses no part of a whole object
        return file.sealed

    def open_sealed(self, digest: Digest) -> BinaryIO | None:
        """The whole object's file, if it is sealed and unchanged. Its bytes stay in place until it is closed."""
        file = self._table.files.get((digest, None))
        if file is None or not file.sealed:
            return None
        try:
            leased = _LeasedFile(file)
        except OSError:
            file.sealed = False
            return None
        if not file.note(identity_of(os.fstat(leased.fileno()))):
            leased.close()
            return None
        self._table.refer_object(file, self._timer())
        return leased
