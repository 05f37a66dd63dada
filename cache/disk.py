"""The disk tier: sparse files under a hard budget of bytes. Layout and durability: docs/FORMATS.md, "Disk store".

The loop holds the state (`cache/disk_table.py`): for most pieces that is a bit. What waits for the disk, or hashes, is
done in threads: reads here, writes and syncs in `cache/disk_flush.py`. A piece that was put is served from memory until
it is written. Until a flush has given the bytes back to the file system, a removed piece stays charged to the budget,
and its slot is not written again.
"""

from __future__ import annotations

import errno
import gc
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import trio

from cache.disk_flush import WriteBack, carry_out
from cache.disk_read import read, stamp_of
from cache.disk_room import Room
from cache.disk_scan import AT_ONCE, Scan
from cache.disk_table import MAX_RUNS, Entry, PieceTable
from cache.files import Identity
from cache.pieces import check_bytes
from cache.recovery import open_folder
from cache.runs import Run, piece_length, space
from cache.sealed import open_sealed, seal
from cache.segments import PINNED, SegmentedPolicy
from cache.store import READ_HERE, Askers, Held, Holdings, StoreStatistics
from protocol.ids import Buffer, Digest, ObjectRef, PeerId, Piece
from protocol.records import Record
from protocol.shard_proofs import ShardProof

logger = logging.getLogger(__name__)

REMOVED_AT_ONCE = 1024
"""Pieces removed in one turn of the loop, 10 ms, and between two flushes."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""A read that fails with one of these shows nothing about the piece."""


def _open_table(
    directory: Path, policy: SegmentedPolicy[Run], pinned: frozenset[Digest], limit: Callable[[PieceTable], Room]
) -> tuple[PieceTable, Room, Scan]:
    """The table of the folder, within its bounds, and what is left of the comparison with its files. Runs in a thread.
    Raises BadInputError."""
    folder, rows = open_folder(directory)
    collecting = gc.isenabled()
    gc.disable()  # the table has half a million objects for 1 TB, none of which is garbage
    try:
        table = PieceTable(folder, policy, set(pinned))
        room = limit(table)
        table.adopt(rows)
        scan = Scan(table)
        scan.run(AT_ONCE)
        write_back = WriteBack(table, room)
        while table.removed or table.changed or table.outdated or not room.has(0):
            before = table.charged
            room.evict(0, exactly=True)
            batch = write_back.batch(0)
            write_back.apply(batch, carry_out(folder.index, batch))
            if write_back.stuck or table.charged >= before:
                break
    except BaseException:
        folder.close()
        raise
    finally:
        if collecting:
            gc.enable()
    return table, room, scan


def is_derivable(table: PieceTable, piece: Piece) -> bool:
    """Whether the piece is a shard of a block that is held whole."""
    return piece.shard is not None and table.runs.find(Piece(piece.block)) is not None


class DiskStore:
    """A BlockStore of sparse files, made by `open`; see the module's docstring."""

    def __init__(self, table: PieceTable, room: Room, timer: Callable[[], float]) -> None:
        self._table, self._room, self._timer = table, room, timer
        self._folder = table.folder
        self._write_back = WriteBack(table, room)
        self.compared = trio.Event()
        """All files have been compared with the index."""

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

        def limit(table: PieceTable) -> Room:
            room = Room(table, timer)
            room.resize(budget_bytes, free_share, free_bytes)
            return room

        policy = SegmentedPolicy[Run](timer, budget_bytes, max_entries=MAX_RUNS)
        table, room, scan = await trio.to_thread.run_sync(_open_table, directory, policy, pinned, limit)
        store = cls(table, room, timer)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store._write_back.run_writes)
                nursery.start_soon(store._write_back.run_flushes)
                nursery.start_soon(store._write_back.run_scan, scan, store.compared)
                try:
                    yield store
                finally:
                    nursery.cancel_scope.cancel()
                    with trio.CancelScope(shield=True):
                        await store.flush(references=True)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(table.folder.close)

    async def flush(self, *, references: bool = False) -> None:
        """Make held pieces durable and give back removed ones; with `references` even if these are the only change."""
        await self._write_back.flush(references=references)

    async def get(self, piece: Piece) -> Held | None:
        await trio.lowlevel.checkpoint()
        run = self._table.runs.find(piece)
        if run is None:
            return None
        entry = self._table.unsynced.get(piece)
        if entry is not None and entry.data is not None:
            self._table.refer(run)
            return Held(entry.data, entry.record, entry.proof)
        path, stamp = self._table.path((piece.block.digest, piece.shard)), stamp_of(self._table, piece)
        held: Held | str
        identity: Identity | None
        try:
            held, identity = await trio.to_thread.run_sync(read, self._folder.index, piece, run.size, path, entry)
        except OSError as error:
            held, identity = f"cannot be read ({error.strerror})", None
            if error.errno in _EXHAUSTED:
                self._folder.warn_once("cannot read a piece", error)
                return None
        except sqlite3.Error as error:
            held, identity = f"its row cannot be read ({error})", None
        run = self._table.runs.find(piece)
        if run is None or self._table.unsynced.get(piece) not in (None, entry):
            # It was removed meanwhile: the bytes read may be those of its hole.
            return held if isinstance(held, Held) else None
        if isinstance(held, str):
            shard = f" {piece.shard}" if piece.shard else ""
            logger.warning("disk: %s #%d%s: %s: discarded", piece.block.digest, piece.block.index, shard, held)
            self._table.remove(piece)
            return None
        self._table.refer(run)
        if identity is not None and stamp is not None and stamp == stamp_of(self._table, piece):
            file = self._table.files[piece.block.digest]
            file.note(identity)
            file.checked |= 1 << piece.block.index
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
        if self._table.has(piece, kept_for):
            return True
        if is_derivable(self._table, piece) or not await self._write_back.make_room(piece, space(len(data)), kept_for):
            return False
        if self._table.has(piece, kept_for):
            return True
        if is_derivable(self._table, piece):
            return False
        return await self._write_back.wait_written(self._enqueue(piece, data, record, proof, kept_for=kept_for))

    def put_nowait(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        """`put`, which also declines where it would have to wait. The bytes are written later: if that fails, the piece
        is not held any more."""
        check_bytes(piece, data, record)
        if self._table.has(piece, kept_for):
            return True
        if is_derivable(self._table, piece) or not self._write_back.has_room(piece, space(len(data)), kept_for):
            return False
        self._enqueue(piece, data, record, proof, kept_for=kept_for)
        return True

    def _enqueue(
        self, piece: Piece, data: Buffer, record: Record, proof: ShardProof | None, *, kept_for: Askers
    ) -> Entry:
        statement = record if piece.shard is None else proof
        sha = statement.sha256 if statement is not None else sha256(data).digest()
        entry = self._table.hold(piece, data, record, sha256=sha, kept_for=kept_for)
        entry.proof = proof
        self._write_back.enqueued(space(len(data)))
        return entry

    def claim(self, piece: Piece) -> None:
        self._table.has(piece, READ_HERE)

    def is_used_here(self, piece: Piece) -> bool:
        run = self._table.runs.find(piece)
        return run is not None and run.kept_for in (READ_HERE, PINNED)

    async def discard(self, piece: Piece) -> None:
        await trio.lowlevel.checkpoint()
        self._table.remove(piece)

    async def drop_object(self, digest: Digest) -> None:
        for run in self._table.runs.of(digest):
            await trio.lowlevel.checkpoint()
            for piece in run.pieces():
                self._table.remove(piece)

    def holds(self, piece: Piece) -> bool:
        return self._table.runs.find(piece) is not None

    def holdings(self, digest: Digest) -> Holdings:
        return self._table.runs.holdings(digest)

    async def signed_by(self, signer: PeerId, digest: Digest) -> dict[Piece, Record]:
        await trio.lowlevel.checkpoint()
        try:
            stored = await trio.to_thread.run_sync(self._folder.index.signed_by, signer, digest)
        except sqlite3.Error as error:
            self._folder.warn_once("cannot read the index", error)
            stored = []
        table = self._table
        signed = {
            row.piece: row.record for row in stored if table.runs.find(row.piece) and row.piece not in table.unsynced
        }
        entries = [entry for entry in table.unsynced.values() if entry.piece.block.digest == digest]
        return signed | {entry.piece: entry.record for entry in entries if entry.record.signer == signer}

    def objects(self) -> Iterable[Digest]:
        return self._table.runs.objects()

    def statistics(self) -> StoreStatistics:
        table, policy = self._table, self._table.policy
        figures = table.charged, policy.budget_bytes, table.runs.pieces, policy.pinned_bytes
        return StoreStatistics(*figures, probation_bytes=policy.probation_bytes)

    def resize(self, budget_bytes: int, *, free_share: float = 0.0, free_bytes: int = 0) -> None:
        """The bounds of `open`, from the next flush on: pieces beyond them are evicted then."""
        self._room.resize(budget_bytes, free_share, free_bytes)

    def pin(self, digest: Digest) -> None:
        """From now on no whole block of the object is evicted, whether it is held or will be."""
        self._table.pin(digest)

    def unpin(self, digest: Digest) -> None:
        self._table.unpin(digest)

    def is_pinned(self, digest: Digest) -> bool:
        return digest in self._table.pinned

    def unused(self, seconds: float) -> Iterator[Piece]:
        """Pieces that are not pinned and were not used for `seconds`, as they are now."""
        return self._room.unused(int((time.time() - seconds) * 1000))

    def beyond(self, target_bytes: int) -> Iterator[Piece]:
        """The pieces that would be evicted so that at most `target_bytes` are held; too few if more is pinned."""
        return self._room.beyond(target_bytes)

    async def remove(self, pieces: Iterable[Piece], *, dry_run: bool = False) -> tuple[int, int]:
        """Remove those of `pieces` that are still held, not pinned and not being sent. Returns their number and the
        bytes of disk that they take."""
        count = freed = 0
        table = self._table
        for number, piece in enumerate(pieces, 1):
            if number % REMOVED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
                if len(table.removed) >= REMOVED_AT_ONCE:
                    await self.flush()
            run = table.runs.find(piece)
            if run is None or run.kept_for == PINNED or table.is_leased(piece):
                continue
            count, freed = count + 1, freed + space(piece_length(run.size, piece.block.index, piece.shard))
            if not dry_run:
                table.remove(piece)
        await self.flush()
        return count, freed

    def seal(self, ref: ObjectRef) -> bool:
        """The caller just checked the object's digest, over bytes read from or put to this store. True if from now on
        its file may be served without hashing: all blocks are held, and the file has not changed since their checks. If
        some blocks are still being written, that begins when they are."""
        if not self._table.runs.holds_any(ref.digest, None):
            return False
        sealed = seal(self._table, self._table.files[ref.digest], ref.size)
        self._write_back.hurry()  # flush soon, so that a kill loses no part of a whole object
        return sealed

    def open_sealed(self, digest: Digest) -> BinaryIO | None:
        """The whole object's file, if it is sealed and unchanged. Its bytes stay in place until it is closed."""
        return open_sealed(self._table, digest, self._timer())
