"""A disk store's folder: its layout, and opening it: files and index must agree before the store serves them.

After an unclean stop there are bytes that no row names, which are given back, and rows whose bytes are missing, which
are dropped. Whether the bytes of a row are right is not checked here: every read hashes them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cache.disk_index import DiskIndex, Stored, key_of, open_index
from cache.files import CHANGE, READ, WRITE, opened, punch
from cache.pieces import length_of
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, Digest, Piece, Shard, shard_length

logger = logging.getLogger(__name__)

_UNUSABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""With one of these the node runs without the folder: they are failures of the disk, which no configuration repairs."""
TRASH = "trash"
"""Where emptied files wait, under new names, for the thread that unlinks them."""
MAX_WARNINGS = 64
"""Different problems that are logged."""
PAGE = 4096
"""Space is taken and given back in multiples of this: the file system's block."""
_METADATA = 1.1
"""If files cannot have holes, a file that takes more than this many times its pieces' space is removed. The excess
allows for its block maps."""
_NAME = re.compile(r"(?:[0-9a-f]{64}|[0-9a-f]{128})(?:\.\d{1,3}\.\d{1,3}\.\d{1,3})?", re.ASCII)


def space(length: int) -> int:
    """Bytes of disk that `length` bytes take."""
    return -(-length // PAGE) * PAGE


def relative_path(digest: Digest, shard: Shard | None) -> str:
    suffix = "" if shard is None else f".{shard.k}.{shard.m}.{shard.index}"
    return f"objects/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}{suffix}"


def offset_of(piece: Piece) -> int:
    """Where the piece begins in its file. Slots start on a page, so that giving one back keeps the others."""
    slot = BLOCK_SIZE if piece.shard is None else space(shard_length(BLOCK_SIZE, piece.shard.k))
    return piece.block.index * slot


@dataclass(slots=True, eq=False)
class Folder:
    """An opened folder. Closing `lock` lets another process open it. If it is not `usable`, nothing is stored there."""

    path: Path
    lock: int
    index: DiskIndex
    punching: bool
    usable: bool = True
    _warned: set[str] = field(default_factory=set)

    def warn_once(self, action: str, error: Exception) -> None:
        """Log an error that may recur often, but only once."""
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if f"{action}: {reason}" not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(f"{action}: {reason}")
            logger.warning("disk: %s: %s: %s (logged once)", self.path, action, reason)

    def close(self) -> None:
        self.index.close()
        os.close(self.lock)


def open_folder(directory: Path) -> tuple[Folder, list[Stored]]:
    """The folder, and the rows of the pieces that it holds, the most recently used first. Raises BadInputError."""
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
            if isinstance(error, sqlite3.OperationalError) or getattr(error, "errno", None) in _UNUSABLE:
                return _without_disk(directory, error), []
            raise BadInputError(f"cannot use the folder {directory}: {error}") from error
        undo.pop_all()
    return Folder(directory, lock, index, punching), rows


def _without_disk(directory: Path, error: Exception) -> Folder:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    logger.warning("disk: %s cannot be used (%s): nothing is stored there before the next start", directory, reason)
    return Folder(directory, os.open(os.devnull, READ), open_index(Path(":memory:")), punching=False, usable=False)


def _recover(directory: Path, index: DiskIndex, punching: bool) -> list[Stored]:
    for leftover in (directory / TRASH).iterdir():
        leftover.unlink()
    rows, malformed = index.rows()
    present = reconcile(directory, rows, punching)
    index.apply(malformed + [key_of(row.piece) for row in rows if row.piece not in present], [], [])
    return [row for row in rows if row.piece in present]


def can_punch(directory: Path) -> bool:
    """Whether this file system can give back a part of a file. Raises OSError."""
    probe = directory / "probe"
    try:
        with opened(probe, WRITE) as fd:
            os.pwrite(fd, bytes(PAGE), 0)
            punch(fd, 0, PAGE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def reconcile(directory: Path, rows: Collection[Stored], punching: bool) -> set[Piece]:
    """The pieces whose bytes are in the folder. All other bytes of its files are given back. Raises OSError."""
    named: dict[str, list[Stored]] = {}
    for row in rows:
        named.setdefault(relative_path(row.piece.block.digest, row.piece.shard), []).append(row)
    unnamed = [path for path in _files(directory) if path not in named]
    for path in unnamed:
        os.unlink(directory / path)
    present: set[Piece] = set()
    for path, pieces in named.items():
        try:
            present |= _reconcile_file(directory / path, pieces, punching)
        except OSError as error:
            logger.warning("%s: %s", path, error.strerror)
    if unnamed or len(present) < len(rows):
        text = "%s: %d pieces are forgotten, because their bytes are missing; %d files without pieces are removed"
        logger.warning(text, directory, len(rows) - len(present), len(unnamed))
    return present


def _files(directory: Path) -> list[str]:
    """Paths of the files that a store made, relative to its folder."""
    return [
        os.path.relpath(os.path.join(folder, name), directory)
        for folder, _, names in os.walk(directory / "objects")
        for name in names
        if _NAME.fullmatch(name)
    ]


def _reconcile_file(path: Path, rows: list[Stored], punching: bool) -> set[Piece]:
    """Drop rows beyond the file's end or in a hole; give back the space between and behind the others."""
    present: set[Piece] = set()
    kept_to = end = charged = 0
    with opened(path, CHANGE) as fd:
        status = os.fstat(fd)
        for row in sorted(rows, key=lambda row: row.piece.block.index):
            start, length = offset_of(row.piece), length_of(row.piece, row.record)
            if start + length > status.st_size or not _is_data(fd, start):
                continue
            if punching and start > kept_to:
                punch(fd, kept_to, start - kept_to)
            end, kept_to = start + length, start + space(length)
            charged += space(length)
            present.add(row.piece)
        if status.st_size > end:
            os.ftruncate(fd, end)
        overfull = not punching and os.fstat(fd).st_blocks * 512 > charged * _METADATA
    if overfull or not present:
        os.unlink(path)
        present.clear()
    return present


def _is_data(fd: int, offset: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
