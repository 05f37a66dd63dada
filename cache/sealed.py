"""Sealed objects of the disk store: files that may be served without hashing.

This process verified each block of such a file when it read or wrote it, and no other process has changed the file
since then. A changed identity voids this.
"""

from __future__ import annotations

import io
import os
from typing import BinaryIO

from cache.disk_table import File, PieceTable
from cache.files import READ, identity_of
from cache.pieces import CORRELATED_S
from cache.runs import RUN_BLOCKS
from protocol.ids import BLOCK_SIZE, Digest

MAX_REFERENCES = 1024
"""Runs referenced at one opening of a sealed object (10 ms); the next opening of a larger object continues there."""


class _LeasedFile(io.FileIO):
    """While it is open, no byte of the file is given back to the file system."""

    def __init__(self, table: PieceTable, file: File) -> None:
        super().__init__(os.open(table.path((file.digest, None)), READ), "rb")
        self._table, self._file = table, file
        file.leases += 1
        table.leased.add(file)

    def close(self) -> None:
        if not self.closed:
            self._file.leases -= 1
            if not self._file.leases:
                self._table.leased.discard(self._file)
        super().close()


def seal(table: PieceTable, file: File, size: int) -> bool:
    """Seal an object of `size` bytes if all its blocks are held and checked. If some still wait for their write, it is
    sealed after that."""
    whole = (1 << -(-size // BLOCK_SIZE)) - 1
    if not whole or table.runs.bitmap(file.digest) != whole:
        return False
    queued = sum(
        1 << piece.block.index
        for piece, entry in table.unsynced.items()
        if entry.data is not None and entry.key == (file.digest, None)
    )
    file.seal_size = size if queued and file.checked | queued == whole else 0
    if queued or file.checked != whole:
        return False
    try:
        identity = identity_of(os.stat(table.path((file.digest, None)), follow_symlinks=False))
    except OSError:
        return False
    file.sealed = file.note(identity) and identity.size == size
    return file.sealed


def open_sealed(table: PieceTable, digest: Digest, now: float) -> BinaryIO | None:
    """The whole object's file, if it is sealed and unchanged. Its bytes stay in place until it is closed. `now` in
    seconds."""
    file = table.files.get(digest)
    if file is None or not file.sealed or (digest, None) in table.writing:
        return None
    try:
        leased = _LeasedFile(table, file)
    except OSError:
        file.sealed = False
        return None
    if not file.note(identity_of(os.fstat(leased.fileno()))):
        leased.close()
        return None
    _refer(table, file, now)
    return leased


def _refer(table: PieceTable, file: File, now: float) -> None:
    """Reference the runs of a whole object, which a client uses, MAX_REFERENCES per call, and no more often than
    references count."""
    if file.next_reference == 0 and now - file.referenced_at < CORRELATED_S:
        return
    file.referenced_at = now
    last = (table.runs.bitmap(file.digest).bit_length() - 1) // RUN_BLOCKS
    stop = min(file.next_reference + MAX_REFERENCES, last + 1)
    for number in range(file.next_reference, stop):
        table.claim_range(file.digest, number)
        for run in table.runs.at(file.digest, number):
            if run.blocks:
                table.refer(run)
    file.next_reference = stop if stop <= last else 0
