"""Bringing a disk store's folder and its index to agreement, before the store serves from it.

After an unclean stop there are bytes that no row names (they are given back) and rows whose bytes are gone (they are
dropped). Whether the bytes of a row are right is not asked here: every read hashes them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path

from cache.disk_index import Stored
from cache.files import CHANGE, WRITE, opened, punch
from cache.pieces import length_of
from protocol.ids import BLOCK_SIZE, Digest, Piece, Shard, shard_length

logger = logging.getLogger(__name__)

PAGE = 4096
"""Space is given out and given back in multiples of this: the file system's block."""

_METADATA = 1.1
"""Where nothing can be punched, a file may take this much more than its pieces (its block maps) and be kept."""

_NAME = re.compile(r"(?:[0-9a-f]{64}|[0-9a-f]{128})(?:\.\d{1,3}\.\d{1,3}\.\d{1,3})?", re.ASCII)


def space(length: int) -> int:
    """Bytes of disk that `length` bytes take."""
    return -(-length // PAGE) * PAGE


def relative_path(digest: Digest, shard: Shard | None) -> str:
    suffix = "" if shard is None else f".{shard.k}.{shard.m}.{shard.index}"
    return f"objects/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}{suffix}"


def offset_of(piece: Piece) -> int:
    """Where the piece begins in its file. Slots start on a page, so that giving one back leaves its neighbours."""
    slot = BLOCK_SIZE if piece.shard is None else space(shard_length(BLOCK_SIZE, piece.shard.k))
    return piece.block.index * slot


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
    """The pieces whose bytes are there. What else is in the folder's files is given back. Raises OSError."""
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
        logger.warning(
            "%s: %d pieces are forgotten, since their bytes are not there; %d files of no piece are removed",
            directory, len(rows) - len(present), len(unnamed),
        )  # fmt: skip
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
    """Drop rows beyond the file's end or in a hole; give back what lies between and behind the others."""
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
