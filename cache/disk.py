"""The disk tier: sparse files under a hard budget of bytes. Layout and durability: docs/FORMATS.md, "Disk store".

The loop holds all state and writes pieces into the page cache; `flush`, one at a time, does in a thread what waits for
the disk. A removed piece stays charged to the budget until a flush has deleted its row and then given its bytes back,
so a row never names bytes that are not its own, and its slot is not written again before that.

A *sealed* object is a file that may be served without hashing: each of its blocks was right in this process, read or
written, and the file's identity is the one noted before the first of these. Any difference takes all of that back.
"""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import logging
import math
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from sys import intern
from typing import BinaryIO

import trio

from cache.disk_flush import Batch, Entry, File, Outcome, carry_out
from cache.disk_index import DiskIndex, Stored, key_of, open_index
from cache.files import READ, WRITE, identity_of, opened, read_at, write_at
from cache.pieces import CORRELATED_S, MAX_ENTRIES, Bitmaps, check_bytes, eviction_policy, length_of
from cache.pinned import PinnedPolicy
from cache.recovery import can_punch, reconcile, relative_path, space
from cache.store import Buffer, Held, Holdings, StoreStatistics
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, BlockId, Digest, ObjectRef, PeerId, Piece, Shard
from protocol.records import Record

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
"""A kill loses at most what was put within this time. Shorter means more syncs, which wear an eMMC."""

FLUSH_PIECES = 64
"""Pieces put after which a flush does not wait for FLUSH_S: 64 MiB of blocks."""

MAX_UNSYNCED_PIECES = 256
"""A put waits for the disk beyond this many; else the kernel would make the whole loop wait once its memory is full."""

EVICTION_SHARE = 64
"""A full store evicts this part of its budget at once (at most MAX_EVICTION): not every put then waits for a flush."""

MAX_EVICTION = 64 << 20
REMOVED_AT_ONCE = 1024
"""Pieces removed in one turn of the loop, 10 ms."""
SPARE_AGE_S = 1.0
"""How old an answer of statvfs may be."""

MAX_REFERENCES = 1024
"""Blocks referenced when a sealed object is opened (3 ms); of a larger object the next ones the next time."""

MAKE_ROOM_ROUNDS = 3
"""A put that finds its room taken by other puts, flush after flush, declines."""

_WITHOUT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""A folder whose disk fails so is gone on without: nobody can mend that in a configuration."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""A read that fails so says nothing about the piece."""

TRASH = "trash"
"""Where emptied files wait, under new names, for the thread that unlinks them."""

MAX_TOLD = 64
"""Kinds of trouble that are told."""


class _LeasedFile(io.FileIO):
    """While it is open, no byte of the file is given back."""

    def __init__(self, file: File) -> None:
        super().__init__(os.open(file.path, READ), "rb")
        self._file = file
        file.leases += 1

    def close(self) -> None:
        if not self.closed:
            self._file.leases -= 1
        super().close()


@dataclass(frozen=True, slots=True)
class _Folder:
    """A store's folder, opened. Closing `lock` lets another process have it. In one not `usable` nothing is stored."""

    path: Path
    lock: int
    index: DiskIndex
    punching: bool
    usable: bool = True

    def close(self) -> None:
        self.index.close()
        os.close(self.lock)


class DiskStore:
    """A BlockStore of sparse files, made by `open`; see the module's text."""

    def __init__(
        self, folder: _Folder, budget_bytes: int, free_share: float, free_bytes: int, pinned: frozenset[Digest],
        timer: Callable[[], float],
    ) -> None:  # fmt: skip
        self._folder = folder
        self._budget = budget_bytes if folder.usable else 0
        self._floor = free_share, free_bytes
        self._timer = timer
        self._policy = PinnedPolicy(eviction_policy(int, timer), pinned, self._budget)
        self._entries: dict[Piece, Entry] = {}
        self._bitmaps = Bitmaps()
        self._files: dict[tuple[Digest, Shard | None], File] = {}
        self._dirty: dict[Piece, Entry] = {}
        self._removed: dict[Piece, Entry] = {}
        self._removed_bytes = 0
        self._referenced: set[Piece] = set()
        self._last_used = 0
        self._trash = itertools.count()
        self._spare = 0
        self._spare_at = -math.inf
        self._told: set[str] = set()
        self._flushing = trio.Lock()
        self._full = trio.Event()
        self._stuck = False
        """The index took nothing at the last flush; while puts have to wait for it they decline."""

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
        """Open or make the folder; leaving the context makes all of it durable.

        At least `free_share` of the file system, and `free_bytes`, are left free; blocks of the `pinned` objects are
        not evicted. A disk that is full, fails or is read-only gives a store without budget, which holds nothing.
        Raises BadInputError naming the folder where it cannot be used, another process uses it, or another version's
        index is in it.
        """
        folder, rows = await trio.to_thread.run_sync(_open_folder, directory)
        try:
            store = cls(folder, budget_bytes, free_share, free_bytes, pinned, timer)
            store._adopt(rows)
            del rows  # it is large
            await store.flush()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store._flush_often)
                try:
                    yield store
                finally:
                    nursery.cancel_scope.cancel()
                    with trio.CancelScope(shield=True):
                        await store.flush(references=True)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(folder.close)

    def _adopt(self, rows: list[Stored]) -> None:
        """Hold what `rows` name, what is pinned and then the latest used, as far as the budget goes."""
        total, kept = 0, 0
        self._last_used = max((row.used for row in rows), default=0)
        rows = sorted(rows, key=lambda row: not self._policy.keeps(row.piece))
        entries = [self._entry(row.piece, row.record, row.sha256, row.used) for row in rows]
        for entry in entries[:MAX_ENTRIES]:
            total += entry.space
            if total > self._budget:
                break
            kept += 1
        for entry in reversed(entries[:kept]):
            self._add(entry)
        for entry in entries[kept:]:
            self._charge_removed(entry)

    # Reading and writing pieces

    async def get(self, piece: Piece) -> Held | None:
        await trio.lowlevel.checkpoint()
        entry = self._entries.get(piece)
        if entry is None:
            return None
        data = bytearray(entry.length)
        try:
            problem = await self._read(entry, data)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            if error.errno in _EXHAUSTED:
                self._tell("cannot read a piece", error)
                return None
        if self._entries.get(piece) is not entry:  # evicted meanwhile, and what was read may be its hole
            return Held(data, entry.record) if problem is None else None
        if problem is not None:
            logger.warning("disk: %s: %s: discarded", _name(piece), problem)
            self._remove(entry)
            return None
        self._refer(entry)
        return Held(data, entry.record)

    async def _read(self, entry: Entry, data: bytearray) -> str | None:
        """Fill `data`; the answer is what is wrong with it, if anything. Raises OSError."""
        file = entry.file
        with opened(file.path, READ) as fd:
            identity = identity_of(os.fstat(fd))
            file.found(identity)
            complete = await read_at(fd, data, entry.offset)
        if not complete:
            return "its file is too short"
        if sha256(data).digest() != entry.sha256:
            return "its bytes are not those that were put"
        if file.identity == identity:
            file.checked |= 1 << entry.piece.block.index
        return None

    async def put(self, piece: Piece, data: Buffer, record: Record) -> bool:
        check_bytes(piece, data, record)
        await trio.lowlevel.checkpoint()
        if piece in self._entries:
            return True
        if self._derivable(piece) or not await self._make_room(piece, space(len(data))):
            return False
        if piece in self._entries:
            return True
        sha = record.sha256 if piece.shard is None else sha256(data).digest()
        return not self._derivable(piece) and self._write(self._entry(piece, record, sha, self._next_used()), data)

    def _derivable(self, piece: Piece) -> bool:
        """A shard of a block that is held whole."""
        return piece.shard is not None and Piece(piece.block) in self._entries

    def _write(self, entry: Entry, data: Buffer) -> bool:
        file, piece = entry.file, entry.piece
        try:
            if not file.pieces:
                os.makedirs(os.path.dirname(file.path), exist_ok=True)
            with opened(file.path, WRITE) as fd:
                file.found(identity_of(os.fstat(fd)))
                write_at(fd, data, entry.offset)
                file.identity = identity_of(os.fstat(fd))
        except OSError as error:
            self._tell("cannot store a piece", error)
            self._charge_removed(entry)  # a part of it may have been written
            return False
        file.checked |= 1 << piece.block.index
        self._spare -= entry.space
        self._add(entry)
        self._dirty[entry.piece] = entry
        if piece.shard is None and self._folder.punching:
            for shard in self._bitmaps.shards_of(piece.block):
                self._remove(self._entries[shard])
        if len(self._dirty) >= FLUSH_PIECES:
            self._full.set()
        return True

    async def discard(self, piece: Piece) -> None:
        await trio.lowlevel.checkpoint()
        if piece in self._entries:
            self._remove(self._entries[piece])

    async def drop_object(self, digest: Digest) -> None:
        """Discard all pieces of an object."""
        for piece in self._bitmaps.pieces(digest):
            await self.discard(piece)

    # The index in memory

    def _entry(self, piece: Piece, record: Record, sha: bytes, used: int) -> Entry:
        """All that is long is in memory once for all entries."""
        key = piece.block.digest, piece.shard
        file = self._files.get(key)
        if file is None:
            file = self._files[key] = File(*key, f"{self._folder.path}/{relative_path(*key)}")
        record = Record(
            intern(record.digest), record.index, record.length, record.size,
            sha if sha == record.sha256 else record.sha256, PeerId(intern(record.signer)), record.signature,
        )  # fmt: skip
        own = Piece(BlockId(file.digest, piece.block.index), file.shard)
        return Entry(own, record, sha, length_of(own, record), used, file)

    def _next_used(self) -> int:
        """Unix milliseconds, so that it tells how long a piece was not used, but different for each reference."""
        self._last_used = max(self._last_used + 1, int(time.time() * 1000))
        return self._last_used

    def _add(self, entry: Entry) -> None:
        self._policy.add(entry.piece, entry.space)
        self._entries[entry.piece] = entry
        self._bitmaps.add(entry.piece)
        entry.file.pieces += 1

    def _refer(self, entry: Entry) -> None:
        self._policy.refer(entry.piece)
        entry.used = self._next_used()
        self._referenced.add(entry.piece)

    def _remove(self, entry: Entry) -> None:
        """Forget a piece; without holes in files, all of its file. The next flush gives the bytes back."""
        together = [entry] if self._folder.punching else [e for e in self._entries.values() if e.file is entry.file]
        for each in together:
            self._policy.remove(each.piece)
            del self._entries[each.piece]
            self._bitmaps.remove(each.piece)
            self._dirty.pop(each.piece, None)
            self._referenced.discard(each.piece)
            each.file.pieces -= 1
            each.file.sealed = False
            each.file.checked &= ~(1 << each.piece.block.index)
            self._charge_removed(each)

    def _charge_removed(self, entry: Entry) -> None:
        self._removed[entry.piece] = entry
        self._removed_bytes += entry.space

    def holds(self, piece: Piece) -> bool:
        return piece in self._entries

    def holdings(self, digest: Digest) -> Holdings:
        return self._bitmaps.holdings(digest)

    def signed_by(self, signer: PeerId) -> list[tuple[Piece, Record]]:
        return [(piece, entry.record) for piece, entry in self._entries.items() if entry.record.signer == signer]

    def objects(self) -> Iterable[Digest]:
        return self._bitmaps.objects()

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(self._charged, self._budget, len(self._entries), self._policy.kept_bytes)

    # Room

    @property
    def _charged(self) -> int:
        return self._policy.bytes + self._removed_bytes

    async def _make_room(self, piece: Piece, need: int) -> bool:
        """Whether `piece` may now be written to its slot: no older bytes are there, and the room for it is free."""
        if need > self._budget or (self._stuck and len(self._dirty) >= MAX_UNSYNCED_PIECES):
            return False
        if piece in self._removed or len(self._dirty) >= MAX_UNSYNCED_PIECES:
            await self.flush()
        for _ in range(MAKE_ROOM_ROUNDS):
            if self._has_room(need):
                break
            self._evict(need)
            await self.flush()
        return self._has_room(need) and piece not in self._removed and len(self._dirty) < MAX_UNSYNCED_PIECES

    def _has_room(self, need: int) -> bool:
        return self._charged + need <= self._budget and len(self._entries) < MAX_ENTRIES and need <= self._spare_bytes()

    def _spare_bytes(self) -> int:
        """What may be written before the free-disk floor is reached; negative below it."""
        now = self._timer()
        if now - self._spare_at >= SPARE_AGE_S:
            self._spare, self._spare_at = self._read_spare(), now
        return self._spare

    def _read_spare(self) -> int:
        share, least = self._floor
        try:
            disk = os.statvfs(self._folder.path)
        except OSError as error:
            self._tell("cannot tell how much disk is free", error)
            return 0
        return disk.f_bavail * disk.f_frsize - max(int(share * disk.f_blocks * disk.f_frsize), least)

    def _evict(self, need: int) -> None:
        """Remove the policy's victims, until after the next flush `need` fits, and a little more."""
        leased = sum(entry.space for entry in self._removed.values() if entry.file.leases)
        room = self._budget - self._policy.bytes
        wanted = max(
            need + min(self._budget // EVICTION_SHARE, MAX_EVICTION) + leased,
            room + need - self._spare_bytes() - (self._removed_bytes - leased),
            room + (len(self._entries) >= MAX_ENTRIES),
        )
        served = sum(file.pieces * BLOCK_SIZE for file in self._files.values() if file.leases)
        for victim in self._policy.victims(min(wanted + served, self._budget)):
            if self._budget - self._policy.bytes >= wanted:
                break
            entry = self._entries.get(victim)
            if entry is not None and not entry.file.leases:
                self._remove(entry)

    # What its owner wants kept, and wants gone

    def resize(self, budget_bytes: int, *, free_share: float = 0.0, free_bytes: int = 0) -> None:
        """The bounds of `open`, from the next flush on: what does not fit then is evicted."""
        self._budget = self._policy.budget_bytes = budget_bytes if self._folder.usable else 0
        self._floor, self._spare_at = (free_share, free_bytes), -math.inf

    def pin(self, digest: Digest) -> None:
        """From now on no whole block of the object is evicted, whether it is held or will be."""
        self._policy.pin(digest, self._bitmaps.pieces(digest))

    def unpin(self, digest: Digest) -> None:
        self._policy.unpin(digest, self._bitmaps.pieces(digest))

    def is_pinned(self, digest: Digest) -> bool:
        return self._policy.is_pinned(digest)

    def unused(self, seconds: float) -> list[Piece]:
        """Pieces that are not pinned and were not used for so long."""
        before = int((time.time() - seconds) * 1000)
        return [p for p, entry in self._entries.items() if entry.used < before and not self._policy.keeps(p)]

    def beyond(self, target_bytes: int) -> list[Piece]:
        """The pieces that would be evicted so that at most `target_bytes` are held; not enough where more is pinned."""
        return self._policy.victims(self._budget - target_bytes) if self._policy.bytes > target_bytes else []

    async def remove(self, pieces: Iterable[Piece], *, dry_run: bool = False) -> tuple[int, int]:
        """Of those that are still held and not being sent; their number and the bytes of disk that they take."""
        count = freed = 0
        for number, piece in enumerate(pieces):
            if number % REMOVED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            entry = self._entries.get(piece)
            if entry is None or entry.file.leases or self._policy.keeps(piece):
                continue
            count, freed = count + 1, freed + entry.space
            if not dry_run:
                self._remove(entry)
        await self.flush()
        return count, freed

    # Durability

    async def _flush_often(self) -> None:
        while True:
            with trio.move_on_after(FLUSH_S):
                await self._full.wait()
            self._full = trio.Event()
            if not self._has_room(0):
                self._evict(0)
            await self.flush()

    async def flush(self, *, references: bool = False) -> None:
        """Make durable what is held, and give back what was removed; with `references` also if that is all there is."""
        async with self._flushing:
            if self._dirty or self._removed or references:
                batch = self._batch()
                with trio.CancelScope(shield=True):  # the batch has moved files: it must be carried out
                    outcome = await trio.to_thread.run_sync(carry_out, self._folder.index, batch)
                self._settle(batch, outcome)

    def _batch(self) -> Batch:
        removed = [entry for entry in self._removed.values() if not entry.file.leases]
        used = [(piece, self._entries[piece].used) for piece in self._referenced if piece not in self._dirty]
        self._referenced.clear()
        return Batch(list(self._dirty.values()), removed, used, self._clear_files(removed))

    def _clear_files(self, removed: list[Entry]) -> dict[File, str]:
        """Move the files that hold nothing any more out of the way of new ones."""
        trash: dict[File, str] = {}
        for entry in removed:
            if entry.file.pieces or entry.file in trash:
                continue
            trash[entry.file] = f"{self._folder.path}/{TRASH}/{next(self._trash)}"
            self._files.pop((entry.file.digest, entry.file.shard), None)
            try:
                os.rename(entry.file.path, trash[entry.file])
            except OSError as error:
                self._tell("cannot remove a file", error)
        return trash

    def _settle(self, batch: Batch, outcome: Outcome) -> None:
        self._spare_at = -math.inf
        self._stuck = not outcome.committed
        for what, error in outcome.problems:
            self._tell(what, error)
        for entry in batch.removed:
            del self._removed[entry.piece]
            self._removed_bytes -= entry.space
        for entry in batch.added:
            if self._dirty.get(entry.piece) is not entry:
                continue
            if entry.file in outcome.unsynced:
                self._remove(entry)
            elif outcome.committed:
                del self._dirty[entry.piece]

    def _tell(self, what: str, error: Exception) -> None:
        """Log once what goes wrong again and again."""
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if f"{what}: {reason}" not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(f"{what}: {reason}")
            logger.warning("disk: %s: %s: %s (told once)", self._folder.path, what, reason)

    # Sealed objects

    def seal(self, ref: ObjectRef) -> bool:
        """The caller just checked the object's digest, over bytes read from or put to this store.

        True if from now on its file may be served as it is: all blocks are held, and the file has not changed since
        they were checked one by one.
        """
        file = self._files.get((ref.digest, None))
        whole = (1 << ref.block_count) - 1
        if file is None or not whole or file.checked != whole or self._bitmaps.bitmap(ref.digest) != whole:
            return False
        try:
            identity = identity_of(os.stat(file.path, follow_symlinks=False))
        except OSError:
            return False
        file.sealed = file.found(identity) and identity.size == ref.size
        self._full.set()  # a whole object is made durable now: a kill from here on loses nothing of it
        return file.sealed

    def open_sealed(self, digest: Digest) -> BinaryIO | None:
        """The whole object's file, if it is sealed and unchanged. Its bytes stay in place until it is closed."""
        file = self._files.get((digest, None))
        if file is None or not file.sealed:
            return None
        try:
            opened_file = _LeasedFile(file)
        except OSError:
            file.sealed = False
            return None
        if not file.found(identity_of(os.fstat(opened_file.fileno()))):
            opened_file.close()
            return None
        self._refer_all(digest, file)
        return opened_file

    def _refer_all(self, digest: Digest, file: File) -> None:
        """Reference the object's blocks, MAX_REFERENCES in one go, and no more often than references count."""
        now = self._timer()
        if file.next_reference == 0 and now - file.referenced_at < CORRELATED_S:
            return
        file.referenced_at = now
        stop = min(file.next_reference + MAX_REFERENCES, file.pieces)
        for index in range(file.next_reference, stop):
            self._refer(self._entries[Piece(BlockId(digest, index))])
        file.next_reference = stop if stop < file.pieces else 0


def _name(piece: Piece) -> str:
    return f"{piece.block.digest} #{piece.block.index}" + (f" {piece.shard}" if piece.shard else "")


def _open_folder(directory: Path) -> tuple[_Folder, list[Stored]]:
    """In a thread. What was held is told in the order of its last use, the latest first. Raises BadInputError."""
    with ExitStack() as undo:
        try:
            (directory / TRASH).mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / "lock", WRITE, 0o600)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            punching = can_punch(directory)
            index = open_index(directory / "index.sqlite")
            undo.callback(index.close)
            rows = _recover(directory, index, punching)
        except BlockingIOError as error:
            raise BadInputError(f"{directory} is in use by another p2pd: give each its own folder") from error
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, sqlite3.OperationalError) or getattr(error, "errno", None) in _WITHOUT:
                return _without_disk(directory, error), []
            raise BadInputError(f"cannot use the folder {directory}: {error}") from error
        undo.pop_all()
    return _Folder(directory, lock, index, punching), rows


def _without_disk(directory: Path, error: Exception) -> _Folder:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    logger.warning("disk: %s cannot be used (%s): nothing is stored there before the next start", directory, reason)
    return _Folder(directory, os.open(os.devnull, READ), open_index(Path(":memory:")), punching=False, usable=False)


def _recover(directory: Path, index: DiskIndex, punching: bool) -> list[Stored]:
    for leftover in (directory / TRASH).iterdir():
        leftover.unlink()
    rows, malformed = index.rows()
    present = reconcile(directory, rows, punching)
    lost = [key_of(row.piece) for row in rows if row.piece not in present]
    index.apply(malformed + lost, [], [])
    return [row for row in rows if row.piece in present]
