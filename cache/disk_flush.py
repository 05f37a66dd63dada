"""Write-back of the disk store: pieces are written and become durable, and the bytes of removed ones are given back.

All that may wait for the disk is done in threads. *Writes* put queued pieces into the page cache, as soon as they come.
A *flush* makes them durable. The order of its steps matters: data is synced before the rows that name it are written,
and rows are deleted before their data. So a row never names bytes that are not its own. Each job takes a batch of the
table on the loop, is carried out in a thread, and its outcome is applied on the loop. Writes run one at a time, and so
do flushes, but a write does not wait for a flush: their batches have no piece in common, and files that are written to
are neither renamed nor cut.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from dataclasses import dataclass, field

import trio

from cache.disk_index import DiskIndex, StoredRun, key_of
from cache.disk_room import Room
from cache.disk_scan import Scan
from cache.disk_table import Entry, PieceTable
from cache.files import CHANGE, READ, WRITE, Identity, identity_of, opened, punch, write_at
from cache.recovery import TRASH, FileKey
from cache.runs import Run, slot_of
from cache.sealed import seal
from cache.store import READ_HERE, Askers
from protocol.ids import Piece

FLUSH_S = 1.0
"""A kill loses at most the puts of this time. Shorter means more syncs, which wear an eMMC."""
FLUSH_PIECES = 64
"""Puts after which a flush does not wait for FLUSH_S: 32 MiB of blocks."""
MAX_UNSYNCED_PIECES = 256
"""Beyond this many, a put waits for the disk."""
MAX_QUEUED_BYTES = 16 << 20
"""Beyond this many bytes that are not written yet, a put waits for the disk: else a slow disk would fill the memory."""
GATHERED_BYTES, GATHER_S = 4 << 20, 0.05
"""The queue is written once it has so many bytes, or this time after its first piece: a hand-over to the thread costs
as much processor time as the write of a block."""
MAKE_ROOM_ROUNDS = 3
"""A put declines if other puts took its room in this many flushes."""
REFERENCES_AT_ONCE = 1024
"""References written with other changes, 10 ms of the loop; the others follow."""


@dataclass(slots=True)
class WriteOutcome:
    """Of each file, its identity before and after the writes; entries that could not be written are `failed`."""

    identities: dict[FileKey, tuple[Identity, Identity]] = field(default_factory=dict)
    failed: set[Piece] = field(default_factory=set)
    problems: list[OSError] = field(default_factory=list)


def write_all(batch: dict[FileKey, list[Entry]], paths: dict[FileKey, str]) -> WriteOutcome:
    """Runs in a thread."""
    outcome = WriteOutcome()
    for key, entries in batch.items():
        left = list(entries)
        try:
            with opened(_with_folder(paths[key]), WRITE) as fd:
                before = identity_of(os.fstat(fd))
                while left:
                    data = left[0].data
                    assert data is not None
                    write_at(fd, data, left[0].offset)
                    left.pop(0)
                outcome.identities[key] = before, identity_of(os.fstat(fd))
        except OSError as error:
            outcome.problems.append(error)
            outcome.failed |= {entry.piece for entry in left}
    return outcome


def _with_folder(path: str) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of one flush. Files in `trash` are unlinked; in other files, the `removed` pieces become holes."""

    added: list[tuple[Entry, Run]]
    removed: dict[Piece, int]
    rows: list[tuple[Run, StoredRun]]
    outdated: list[StoredRun]
    paths: dict[FileKey, str]
    trash: dict[FileKey, str]


@dataclass(slots=True)
class Outcome:
    unsynced: set[FileKey] = field(default_factory=set)
    committed: bool = False
    problems: list[tuple[str, Exception]] = field(default_factory=list)


def carry_out(index: DiskIndex, batch: Batch) -> Outcome:
    """Runs in a thread."""
    outcome = Outcome()
    for key in {entry.key for entry, _ in batch.added}:
        try:
            with opened(batch.paths[key], READ) as fd:
                os.fdatasync(fd)
        except OSError as error:
            outcome.unsynced.add(key)
            outcome.problems.append(("cannot sync a file", error))
    synced = [(entry, run) for entry, run in batch.added if entry.key not in outcome.unsynced]
    rows = dict(batch.rows)
    for entry, run in synced:
        content = rows[run].content
        content[entry.piece.shard] = content.get(entry.piece.shard, 0) | entry.bit
    try:
        removed = [key_of(piece) for piece in batch.removed]
        index.apply(removed, [entry.stored for entry, _ in synced], [*batch.outdated, *rows.values()])
        outcome.committed = True
    except sqlite3.Error as error:
        outcome.problems.append(("cannot write the index", error))
    _give_back(batch, outcome)
    return outcome


def _give_back(batch: Batch, outcome: Outcome) -> None:
    holes: dict[FileKey, list[tuple[int, int]]] = {}
    for piece, taken in batch.removed.items():
        key = piece.block.digest, piece.shard
        if key not in batch.trash:
            holes.setdefault(key, []).append((piece.block.index * slot_of(piece.shard), taken))
    for key, ranges in holes.items():
        try:
            with opened(batch.paths[key], CHANGE) as fd:
                for start, length in _merged(sorted(ranges)):
                    punch(fd, start, length)
        except FileNotFoundError:
            continue  # another program removed the file before
        except OSError as error:
            outcome.problems.append(("cannot give back disk space", error))
    for path in batch.trash.values():
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue  # another program removed the file before
        except OSError as error:
            outcome.problems.append(("cannot remove a file", error))


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one range."""
    merged: list[tuple[int, int]] = []
    for start, length in ranges:
        if merged and sum(merged[-1]) == start:
            merged[-1] = merged[-1][0], merged[-1][1] + length
        else:
            merged.append((start, length))
    return merged


class WriteBack:
    """`stuck`: the last flush could not write the index; puts that would have to wait for the next one decline."""

    def __init__(self, table: PieceTable, room: Room) -> None:
        self._table, self._room = table, room
        self._emptied = itertools.count()
        self._flushing, self._writing = trio.Lock(), trio.Lock()
        self._wanted, self._queued, self._written = trio.Event(), trio.Event(), trio.Event()
        self._enough = trio.Event()
        """Set once the queue need not gather more."""
        self.stuck = False

    def hurry(self) -> None:
        """Flush soon."""
        self._wanted.set()

    async def run_flushes(self) -> None:
        """Flush when it is due, until cancelled."""
        while True:
            await self._wait_due()
            if not self._room.has(0):
                before = self._table.policy.bytes
                self._room.evict(0)
                if self._table.policy.bytes < before:
                    self.hurry()  # there may be more
            await self.flush()

    async def run_writes(self) -> None:
        """Write what is queued, until cancelled: many pieces at once, unless somebody waits for one."""
        while True:
            await self._queued.wait()
            with trio.move_on_after(GATHER_S):
                await self._enough.wait()
            self._queued, self._enough = trio.Event(), trio.Event()
            await self.write()

    def enqueued(self, need: int) -> None:
        """A piece of this space was queued."""
        self._room.spend(need)
        self._queued.set()
        if self._table.queued_bytes >= GATHERED_BYTES:
            self._enough.set()
        if len(self._table.unsynced) >= FLUSH_PIECES:
            self.hurry()

    async def wait_written(self, entry: Entry) -> bool:
        """Wait until a queued piece is written, or not held any more; False if it could not be written."""
        self._enough.set()
        while self._table.unsynced.get(entry.piece) is entry and entry.data is not None:
            await self._written.wait()
        return not entry.failed

    def has_room(self, piece: Piece, need: int, kept_for: Askers) -> bool:
        """`make_room`, but False if it would have to wait."""
        asked, kept_for = bool(kept_for), READ_HERE if self._table.keeps(piece) else kept_for
        if self._must_wait(piece, need) or not self._room.may_have(need, kept_for) or not self._room.has(need):
            return False
        if asked:
            self._table.policy.wanted(need)
        if not kept_for:
            self._room.turn_over(need)
        return True

    def _must_wait(self, piece: Piece, need: int) -> bool:
        return (
            piece in self._table.removed
            or len(self._table.unsynced) >= MAX_UNSYNCED_PIECES
            or (self._table.queued_bytes > 0 and self._table.queued_bytes + need > MAX_QUEUED_BYTES)
        )

    async def make_room(self, piece: Piece, need: int, kept_for: Askers) -> bool:
        """Whether `piece` may now be written to its slot: no older bytes are there, and the room for it is free."""
        table = self._table
        if kept_for:
            table.policy.wanted(need)
        kept_for = READ_HERE if table.keeps(piece) else kept_for
        stuck = self.stuck and len(table.unsynced) >= MAX_UNSYNCED_PIECES
        if stuck or not self._room.may_have(need, kept_for):
            return False
        if not kept_for:
            self._room.turn_over(need)
        while table.queued_bytes and table.queued_bytes + need > MAX_QUEUED_BYTES:
            await self._written.wait()
        if self._must_wait(piece, need):
            await self.flush()
        for _ in range(MAKE_ROOM_ROUNDS):
            if self._room.has(need):
                break
            self._room.evict(need, kept_for)
            await self.flush()
            self._room.recheck()
        return self._room.has(need) and not self._must_wait(piece, need)

    async def _wait_due(self) -> None:
        with trio.move_on_after(FLUSH_S):
            await self._wanted.wait()
        self._wanted = trio.Event()

    async def write(self) -> None:
        """Write all that is queued."""
        async with self._writing:
            table, batch = self._table, dict[FileKey, list[Entry]]()
            if not table.queue:
                self._wake()
                return
            for entry in table.queue.values():
                batch.setdefault(entry.key, []).append(entry)
            table.queue, table.queued_bytes = {}, 0
            table.writing = set(batch)
            with trio.CancelScope(shield=True):  # the batch has left the queue: it must be carried out
                outcome = await trio.to_thread.run_sync(write_all, batch, {key: table.path(key) for key in batch})
            self._apply_writes(batch, outcome)

    def _apply_writes(self, batch: dict[FileKey, list[Entry]], outcome: WriteOutcome) -> None:
        table = self._table
        table.writing = set()
        for error in outcome.problems:
            table.folder.warn_once("cannot store a piece", error)
        for (digest, shard), entries in batch.items():
            file = table.files[digest] if shard is None else None
            if file is not None and (identities := outcome.identities.get((digest, shard))) is not None:
                file.note(identities[0])
                file.identity = identities[1]
            if file is not None:
                file.writes += 1
            for entry in entries:
                entry.data, entry.failed = None, entry.piece in outcome.failed
                if table.unsynced.get(entry.piece) is not entry:
                    continue
                if entry.failed:
                    table.remove(entry.piece)  # a part of it may have been written
                elif file is not None:
                    file.checked |= 1 << entry.piece.block.index
            if file is not None and file.seal_size:
                seal(table, file, file.seal_size)
                self.hurry()
        self._wake()

    def _wake(self) -> None:
        written, self._written = self._written, trio.Event()
        written.set()

    async def run_scan(self, scan: Scan, over: trio.Event) -> None:
        """Compare the files that were not compared when the store was opened."""
        while not scan.is_over:
            await trio.to_thread.run_sync(scan.list_next)
            async with self._flushing, self._writing:
                files = scan.files()
                with trio.CancelScope(shield=True):
                    scan.apply(files, await trio.to_thread.run_sync(scan.reconcile, files))
        scan.report()
        over.set()

    async def flush(self, *, references: bool = False) -> None:
        """Write and sync what is held, and give back what was removed; with `references` even if these are the only
        change."""
        async with self._flushing:
            await self.write()
            table = self._table
            if table.unsynced or table.removed or table.changed or table.outdated or references:
                batch = self.batch(None if references else REFERENCES_AT_ONCE)
                with trio.CancelScope(shield=True):  # the batch has moved files: it must be carried out
                    outcome = await trio.to_thread.run_sync(carry_out, table.folder.index, batch)
                self.apply(batch, outcome)

    def batch(self, references: int | None) -> Batch:
        table = self._table
        removed = {piece: taken for piece, taken in table.removed.items() if not table.is_busy(piece)}
        added = [(entry, entry.run) for entry in table.unsynced.values() if entry.data is None]
        table.changed |= {run for _, run in added}
        rows = table.take_rows(references)
        outdated, table.outdated = table.outdated, []
        keys = {(piece.block.digest, piece.shard) for piece in removed}
        paths = {key: table.path(key) for key in keys | {entry.key for entry, _ in added}}
        return Batch(added, removed, rows, outdated, paths, self._clear_files(keys))

    def _clear_files(self, keys: set[FileKey]) -> dict[FileKey, str]:
        """Rename the files without pieces, so that new files can have their names."""
        table, trash = self._table, dict[FileKey, str]()
        for digest, shard in keys:
            if table.runs.holds_any(digest, shard):
                continue
            trash[digest, shard] = f"{table.folder.path}/{TRASH}/{next(self._emptied)}"
            if shard is None:
                table.files.pop(digest, None)
            try:
                os.rename(table.path((digest, shard)), trash[digest, shard])
            except FileNotFoundError:
                continue  # another program removed the file before, or nothing was written
            except OSError as error:
                table.folder.warn_once("cannot remove a file", error)
        return trash

    def apply(self, batch: Batch, outcome: Outcome) -> None:
        table = self._table
        self._room.recheck()
        self.stuck = not outcome.committed
        for action, error in outcome.problems:
            table.folder.warn_once(action, error)
        for piece, taken in batch.removed.items():
            del table.removed[piece]
            table.removed_bytes -= taken
        if not outcome.committed:
            table.changed |= {run for run, _ in batch.rows}
            table.outdated += batch.outdated
        for entry, _ in batch.added:
            if table.unsynced.get(entry.piece) is not entry:
                continue
            if entry.key in outcome.unsynced:
                table.remove(entry.piece)
            elif outcome.committed:
                del table.unsynced[entry.piece]
