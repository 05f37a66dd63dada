"""Write-back of the disk store: pieces become durable, and the bytes of removed ones go back to the file system.

The order of the steps matters: data is synced before the rows that name it are written, and rows are deleted before
their data. So a row never names bytes that are not its own. Flushes run one at a time; each takes a `Batch` of the
table on the loop, carries it out in a thread, and applies the `Outcome` on the loop.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from dataclasses import dataclass, field

import trio

from cache.disk_index import DiskIndex, Stored, key_of
from cache.disk_table import Entry, File, PieceTable, Room
from cache.files import CHANGE, READ, opened, punch
from cache.recovery import TRASH
from cache.store import READ_HERE, Askers
from protocol.ids import Piece

FLUSH_S = 1.0
"""A kill loses at most the puts of this time. Shorter means more syncs, which wear an eMMC."""
FLUSH_PIECES = 64
"""Puts after which a flush does not wait for FLUSH_S: 32 MiB of blocks."""

MAX_UNSYNCED_PIECES = 256
"""Beyond this many, a put waits for the disk; else the kernel would stop the whole loop once its memory is full."""
MAKE_ROOM_ROUNDS = 3
"""A put declines if other puts took its room in this many flushes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of one flush. Files in `trash` are unlinked; in other files, the `removed` pieces become holes."""

    added: list[Entry]
    removed: list[Entry]
    referenced: list[Stored]
    trash: dict[File, str]


@dataclass(slots=True)
class Outcome:
    unsynced: set[File] = field(default_factory=set)
    committed: bool = False
    problems: list[tuple[str, Exception]] = field(default_factory=list)


def carry_out(index: DiskIndex, batch: Batch) -> Outcome:
    """Runs in a thread."""
    outcome = Outcome()
    for file in {entry.file for entry in batch.added}:
        try:
            with opened(file.path, READ) as fd:
                os.fdatasync(fd)
        except OSError as error:
            outcome.unsynced.add(file)
            outcome.problems.append(("cannot sync a file", error))
    synced = [entry.stored for entry in batch.added if entry.file not in outcome.unsynced]
    try:
        index.apply([key_of(entry.piece) for entry in batch.removed], synced, batch.referenced)
        outcome.committed = True
    except sqlite3.Error as error:
        outcome.problems.append(("cannot write the index", error))
    _give_back(batch, outcome)
    return outcome


def _give_back(batch: Batch, outcome: Outcome) -> None:
    for entry in batch.removed:
        if entry.file in batch.trash:
            continue
        try:
            with opened(entry.file.path, CHANGE) as fd:
                punch(fd, entry.offset, entry.space)
        except OSError as error:
            outcome.problems.append(("cannot give back disk space", error))
    for path in batch.trash.values():
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue  # another program removed the file before
        except OSError as error:
            outcome.problems.append(("cannot remove a file", error))


class WriteBack:
    """`stuck`: the last flush could not write the index; puts that would have to wait for the next one decline."""

    def __init__(self, table: PieceTable, room: Room) -> None:
        self._table, self._room = table, room
        self._emptied = itertools.count()
        self._flushing = trio.Lock()
        self._wanted = trio.Event()
        self.stuck = False

    def hurry(self) -> None:
        """Flush soon."""
        self._wanted.set()

    async def run(self) -> None:
        """Flush when it is due, until cancelled."""
        while True:
            await self._wait_due()
            if not self._room.has(0):
                self._room.evict(0)
            await self.flush()

    async def make_room(self, piece: Piece, need: int, kept_for: Askers) -> bool:
        """Whether `piece` may now be written to its slot: no older bytes are there, and the room for it is free."""
        table = self._table
        if kept_for:
            table.policy.wanted(need)
        kept_for = READ_HERE if table.policy.keeps(piece) else kept_for
        stuck = self.stuck and len(table.unsynced) >= MAX_UNSYNCED_PIECES
        if stuck or not self._room.may_have(need, kept_for):
            return False
        if not kept_for:
            self._room.turn_over(need)
        if piece in table.removed or len(table.unsynced) >= MAX_UNSYNCED_PIECES:
            await self.flush()
        for _ in range(MAKE_ROOM_ROUNDS):
            if self._room.has(need):
                break
            self._room.evict(need, kept_for)
            await self.flush()
        return self._room.has(need) and piece not in table.removed and len(table.unsynced) < MAX_UNSYNCED_PIECES

    def has_room(self, piece: Piece, need: int, kept_for: Askers) -> bool:
        """`make_room`, but False if it would have to wait for a flush."""
        table, asked = self._table, bool(kept_for)
        kept_for = READ_HERE if table.policy.keeps(piece) else kept_for
        if piece in table.removed or len(table.unsynced) >= MAX_UNSYNCED_PIECES or not self._room.has(need):
            return False
        if not self._room.may_have(need, kept_for):
            return False
        if asked:
            table.policy.wanted(need)
        if not kept_for:
            self._room.turn_over(need)
        return True

    async def _wait_due(self) -> None:
        with trio.move_on_after(FLUSH_S):
            await self._wanted.wait()
        self._wanted = trio.Event()

    async def flush(self, *, references: bool = False) -> None:
        async with self._flushing:
            if self._table.unsynced or self._table.removed or self._table.claimed or references:
                batch = self._batch()
                with trio.CancelScope(shield=True):  # the batch has moved files: it must be carried out
                    outcome = await trio.to_thread.run_sync(carry_out, self._table.folder.index, batch)
                self._apply(batch, outcome)

    def _batch(self) -> Batch:
        removed = [entry for entry in self._table.removed.values() if not entry.file.leases]
        referenced = self._table.take_references()
        return Batch(list(self._table.unsynced.values()), removed, referenced, self._clear_files(removed))

    def _clear_files(self, removed: list[Entry]) -> dict[File, str]:
        """Rename the files without pieces, so that new files can have their names."""
        folder, trash = self._table.folder, dict[File, str]()
        for entry in removed:
            if entry.file.pieces or entry.file in trash:
                continue
            trash[entry.file] = f"{folder.path}/{TRASH}/{next(self._emptied)}"
            self._table.files.pop((entry.file.digest, entry.file.shard), None)
            try:
                os.rename(entry.file.path, trash[entry.file])
            except OSError as error:
                folder.warn_once("cannot remove a file", error)
        return trash

    def _apply(self, batch: Batch, outcome: Outcome) -> None:
        table = self._table
        self._room.recheck()
        self.stuck = not outcome.committed
        for action, error in outcome.problems:
            table.folder.warn_once(action, error)
        for entry in batch.removed:
            del table.removed[entry.piece]
            table.removed_bytes -= entry.space
        for entry in batch.added:
            if table.unsynced.get(entry.piece) is not entry:
                continue
            if entry.file in outcome.unsynced:
                table.remove(entry)
            elif outcome.committed:
                del table.unsynced[entry.piece]
