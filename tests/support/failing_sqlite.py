"""SQLite on a failing disk: counts the system calls that SQLite makes on its files, and fails chosen ones with EIO.

SQLite allows its system calls to be replaced (sqlite3_vfs.xSetSystemCall). The call itself fails, so that SQLite reacts
as on a real failing disk: it rolls back, or leaves that to the next reader. Syncs and memory maps never fail here.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_INT, _SIZE, _TEXT, _AT = ctypes.c_int, ctypes.c_ssize_t, ctypes.c_char_p, ctypes.c_void_p
_CALLS = {
    "open": (_INT, _TEXT, _INT, _INT),
    "ftruncate": (_INT, _INT, ctypes.c_int64),
    "unlink": (_INT, _TEXT),
    "read": (_SIZE, _INT, _AT, _SIZE),
    "pread64": (_SIZE, _INT, _AT, _SIZE, ctypes.c_int64),
    "write": (_SIZE, _INT, _AT, _SIZE),
    "pwrite64": (_SIZE, _INT, _AT, _SIZE, ctypes.c_int64),
}
"""The types of each call's result and arguments."""


class _Vfs(ctypes.Structure):
    """struct sqlite3_vfs, https://www.sqlite.org/c3ref/vfs.html. Unused members have no exact type."""

    _fields_ = [
        ("version", _INT),
        ("sizes", _INT * 2),
        ("names", _AT * 3),
        ("methods", _AT * 13),
        ("set_call", ctypes.CFUNCTYPE(_INT, _AT, _TEXT, _AT)),
        ("get_call", ctypes.CFUNCTYPE(_AT, _AT, _TEXT)),
    ]


@dataclass(slots=True)
class Calls:
    """`made` counts the calls. Call number `first` fails, and if `on` is set, all later calls too."""

    first: int = -1
    on: bool = False
    made: int = 0

    def fails(self) -> bool:
        self.made += 1
        return self.first >= 0 and (self.made - 1 == self.first or (self.on and self.made > self.first))

    def heal(self) -> None:
        self.first = -1


@contextmanager
def failing(calls: Calls) -> Iterator[None]:
    """While the context lasts, `calls` decides which calls of SQLite in this process fail."""
    library = ctypes.CDLL("libsqlite3.so.0")
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = library.sqlite3_vfs_find(b"unix")
    replaced = {name: _replace(vfs, name, types, calls) for name, types in _CALLS.items()}
    try:
        yield
    finally:
        for name in replaced:
            vfs.contents.set_call(vfs, name.encode(), None)


def _replace(vfs: Any, name: str, types: tuple[Any, ...], calls: Calls) -> object:
    """Returns the C callback, which must live as long as SQLite may call it."""
    kind = ctypes.CFUNCTYPE(*types, use_errno=True)
    real: Callable[..., int] = kind(vfs.contents.get_call(vfs, name.encode()))

    def call(*arguments: object) -> int:
        if calls.fails():
            ctypes.set_errno(errno.EIO)
            return -1
        return real(*arguments)

    made = kind(call)
    assert vfs.contents.set_call(vfs, name.encode(), made) == 0, name
    return made
