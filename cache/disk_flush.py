"""What the disk store keeps of each file and piece, and what its flush does with them in a thread."""

from __future__ import annotations

import math
import os
import sqlite3
from dataclasses import dataclass, field

from cache.disk_index import DiskIndex, Stored, key_of
from cache.files import CHANGE, READ, Identity, opened, punch
from cache.recovery import offset_of, space
from protocol.ids import Digest, Piece, Shard
from protocol.records import Record


@dataclass(slots=True, eq=False)
class File:
    """`checked` has a bit for each block that was right in this process since the file's identity was noted."""

    digest: Digest
    shard: Shard | None
    path: str
    pieces: int = 0
    identity: Identity | None = None
    checked: int = 0
    sealed: bool = False
    leases: int = 0
    referenced_at: float = -math.inf
    next_reference: int = 0

    def found(self, identity: Identity) -> bool:
        """Note how the file is before it is used. False: it has changed, which takes back what was known."""
        if identity == self.identity:
            return True
        self.identity, self.checked, self.sealed = identity, 0, False
        return False


@dataclass(slots=True, eq=False)
class Entry:
    piece: Piece
    record: Record
    sha256: bytes
    length: int
    used: int
    file: File

    @property
    def offset(self) -> int:
        return offset_of(self.piece)

    @property
    def space(self) -> int:
        return space(self.length)

    @property
    def stored(self) -> Stored:
        return Stored(self.piece, self.sha256, self.record, self.used)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one flush does: sync and add, delete rows and then their bytes. Of emptied files (`trash`) the whole."""

    added: list[Entry]
    removed: list[Entry]
    used: list[tuple[Piece, int]]
    trash: dict[File, str]


@dataclass(slots=True)
class Outcome:
    unsynced: set[File] = field(default_factory=set)
    committed: bool = False
    problems: list[tuple[str, Exception]] = field(default_factory=list)


def carry_out(index: DiskIndex, batch: Batch) -> Outcome:
    """In a thread. The order is the promise: data before the rows that name it, rows gone before their data."""
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
        index.apply([key_of(entry.piece) for entry in batch.removed], synced, batch.used)
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
            continue  # somebody else removed the file before
        except OSError as error:
            outcome.problems.append(("cannot remove a file", error))
