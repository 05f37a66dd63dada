"""A disk store's folder: its layout, and opening it, and bringing its files and its index to agree.

After an unclean stop there are bytes that no row names, which are given back, and rows whose bytes are missing, which
are dropped. The files are compared folder by folder: a few thousand of them before the store serves, the others by and
by. Whether the bytes of a row are right is not checked here: every read hashes them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cache.disk_index import DiskIndex, StoredRun, open_index
from cache.files import CHANGE, READ, WRITE, opened, punch
from cache.pieces import set_bits
from cache.runs import PAGE, slot_of, space
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, Digest, Shard, shard_length

logger = logging.getLogger(__name__)

_UNUSABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""With one of these the node runs without the folder: they are failures of the disk, which no configuration repairs."""
TRASH = "trash"
"""Where emptied files wait, under new names, for the thread that unlinks them."""
MAX_WARNINGS = 64
"""Different problems that are logged."""
_METADATA = 1.1
"""If files cannot have holes, a file that takes more than this many times its pieces' space is removed. The excess
allows for its block maps."""
_NAME = re.compile(r"([0-9a-f]{64}|[0-9a-f]{128})(?:\.(\d{1,3})\.(\d{1,3})\.(\d{1,3}))?", re.ASCII)

FileKey = tuple[Digest, Shard | None]


def relative_path(digest: Digest, shard: Shard | None) -> str:
    suffix = "" if shard is None else f".{shard.k}.{shard.m}.{shard.index}"
    return f"{prefix_of(digest)}/{digest.hex}{suffix}"


def prefix_of(digest: Digest) -> str:
    """The folder of an object's files, relative to that of the store."""
    return f"objects/{digest.algorithm}/{digest.hex[:2]}"


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


def open_folder(directory: Path) -> tuple[Folder, list[StoredRun]]:
    """The folder, and the runs in its index, the least recently used first. Raises BadInputError."""
    with ExitStack() as undo:
        try:
            (directory / TRASH).mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / "lock", WRITE, 0o600)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            punching = can_punch(directory)
            index = open_index(directory / "index.sqlite")
            undo.callback(index.close)
            for leftover in (directory / TRASH).iterdir():
                leftover.unlink()
            runs, malformed = index.runs()
            index.drop_runs(malformed)
        except BlockingIOError as error:
            raise BadInputError(f"{directory} is in use by another p2pd: give each its own folder") from error
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, sqlite3.OperationalError) or getattr(error, "errno", None) in _UNUSABLE:
                return _without_disk(directory, error), []
            raise BadInputError(f"cannot use the folder {directory}: {error}") from error
        undo.pop_all()
    return Folder(directory, lock, index, punching), runs


def _without_disk(directory: Path, error: Exception) -> Folder:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    logger.warning("disk: %s cannot be used (%s): nothing is stored there before the next start", directory, reason)
    return Folder(directory, os.open(os.devnull, READ), open_index(Path(":memory:")), punching=False, usable=False)


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


@dataclass(frozen=True, slots=True)
class HeldFile:
    """The pieces of a file that should be there: a bit for each block. `short` has the lengths of the pieces that are
    shorter than others, by block."""

    key: FileKey
    bits: int
    short: dict[int, int]


def listed(directory: Path, prefix: str) -> list[FileKey]:
    """The files in a folder of objects that a store made. Raises OSError."""
    try:
        names = os.listdir(directory / prefix)
    except (FileNotFoundError, NotADirectoryError):
        return []
    algorithm = prefix.split("/")[1]
    matches = (_NAME.fullmatch(name) for name in names)
    keys = [
        (Digest(algorithm, m[1]), Shard(int(m[2]), int(m[3]), int(m[4])) if m[2] is not None else None)
        for m in matches
        if m is not None
    ]
    return [key for key in keys if relative_path(*key).startswith(prefix)]


def prefixes(directory: Path) -> list[str]:
    """The folders of objects. Raises OSError."""
    found = []
    for algorithm in ("sha256", "sha512"):
        base = directory / "objects" / algorithm
        if base.is_dir():
            found += [f"objects/{algorithm}/{name}" for name in sorted(os.listdir(base)) if (base / name).is_dir()]
    return found


def reconcile(directory: Path, files: list[HeldFile], *, punching: bool) -> dict[FileKey, list[int]]:
    """Give back all other bytes of files; one without pieces is removed. Returns the blocks that are missing."""
    missing: dict[FileKey, list[int]] = {}
    for file in files:
        path = directory / relative_path(*file.key)
        try:
            lost = _reconcile_file(path, file, punching)
        except OSError as error:
            if file.bits or not isinstance(error, FileNotFoundError):
                logger.warning("%s: %s", path, error.strerror)
            lost = list(set_bits(file.bits))
        if lost:
            missing[file.key] = lost
    return missing


def _reconcile_file(path: Path, file: HeldFile, punching: bool) -> list[int]:
    """Returns the blocks whose pieces lie beyond the file's end or in a hole."""
    if not file.bits:
        os.unlink(path)
        return []
    missing: list[int] = []
    shard = file.key[1]
    slot, full = slot_of(shard), shard_length(BLOCK_SIZE, shard.k if shard else 1)
    kept_to = end = charged = data_to = 0
    with opened(path, CHANGE) as fd:
        size = os.fstat(fd).st_size
        for index in set_bits(file.bits):
            start, length = index * slot, file.short.get(index, full)
            if start >= data_to and start + length <= size:
                data_to = _data_end(fd, start)
            if start >= data_to or start + length > size:
                missing.append(index)
                continue
            if punching and start > kept_to and _has_data(fd, kept_to, start):
                punch(fd, kept_to, start - kept_to)
            end, kept_to = start + length, start + space(length)
            charged += space(length)
        if size > end:
            os.ftruncate(fd, end)
        overfull = not punching and os.fstat(fd).st_blocks * 512 > charged * _METADATA
    if overfull or not end:
        os.unlink(path)
        return list(set_bits(file.bits))
    return missing


def _has_data(fd: int, start: int, stop: int) -> bool:
    try:
        return os.lseek(fd, start, os.SEEK_DATA) < stop
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False


def _data_end(fd: int, offset: int) -> int:
    """The end of the data at `offset`, or `offset` if it is in a hole or at the end of the file."""
    return os.lseek(fd, offset, os.SEEK_HOLE) if _has_data(fd, offset, offset + 1) else offset
