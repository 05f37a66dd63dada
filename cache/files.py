"""File system calls beyond Python's `os`: reads that prefer the page cache, holes, and the identity of a file."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from protocol.ids import Buffer

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_NOT_CACHED = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""The page cache does not hold the bytes, or the file system cannot say so."""
READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
CHANGE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


@contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


class Identity(NamedTuple):
    """It stays the same while no process writes to the file, within the ticks of the kernel's clock (milliseconds)."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def identity_of(status: os.stat_result) -> Identity:
    return Identity(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def punch(fd: int, offset: int, length: int) -> None:
    """Give a range of a file back to the file system; it reads as zeros. Raises OSError. See fallocate(2)."""
    if _LIBC.fallocate64(fd, _KEEP_SIZE_AND_PUNCH_HOLE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def write_at(fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data`. Raises OSError; any part of `data` may be written then."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


async def read_at(fd: int, buffer: bytearray, offset: int) -> bool:
    """Fill `buffer` from `offset` on; False if the file is too short. Raises OSError. Bytes in the page cache are
    copied at once; only the rest is read in a thread."""
    view = memoryview(buffer)
    done = _read_cached(fd, view, offset)
    if done == len(buffer):
        return True
    return await trio.to_thread.run_sync(read_all, fd, view[done:], offset + done)


def _read_cached(fd: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(fd, [view], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in _NOT_CACHED:
            raise
        return 0


def read_all(fd: int, view: memoryview, offset: int) -> bool:
    """Fill `view` from `offset` on; False if the file is too short. May wait for the disk. Raises OSError."""
    while view:
        done = os.preadv(fd, [view], offset)
        if not done:
            return False
        view, offset = view[done:], offset + done
    return True
