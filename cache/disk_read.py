"""Reading one piece from the disk, in a thread: its row, its bytes, and their hash."""

from __future__ import annotations

import os
from hashlib import sha256

from cache.disk_index import DiskIndex, Stored
from cache.disk_table import Entry, PieceTable
from cache.files import READ, Identity, identity_of, opened, read_all
from cache.runs import piece_length, slot_of
from cache.store import Held
from protocol.ids import Piece


def stamp_of(table: PieceTable, piece: Piece) -> int | None:
    """It stays the same while this process does not write to the file of a whole block, None while it does. A write
    changes the file's identity."""
    digest = piece.block.digest
    if piece.shard is not None or (digest, None) in table.writing:
        return None
    file = table.files.get(digest)
    return file.writes if file is not None else 0


def read(
    index: DiskIndex, piece: Piece, size: int, path: str, entry: Entry | None
) -> tuple[Held | str, Identity | None]:
    """The piece of an object of `size` bytes, or a text if its bytes are wrong, and the identity of its file. Runs in a
    thread. Raises OSError and sqlite3.Error."""
    stored: Stored | None = entry.stored if entry is not None else index.piece(piece)
    if stored is None or stored.record.size != size:
        return "its row is missing", None
    data = bytearray(piece_length(size, piece.block.index, piece.shard))
    with opened(path, READ) as fd:
        identity = identity_of(os.fstat(fd))
        complete = read_all(fd, memoryview(data), piece.block.index * slot_of(piece.shard))
    if not complete:
        return "its file is too short", identity
    if sha256(data).digest() != (stored.sha256 if piece.shard else stored.record.sha256):
        return "its bytes are not those that were put", identity
    return Held(data, stored.record, stored.proof), identity
