"""The unix socket of the control API: its file, and the users that may connect.

The socket's file exists exactly as long as a daemon listens on it. A daemon that ended uncleanly leaves a file on which
nothing listens: this file is replaced. Any other file, and the socket of a running daemon, makes the start fail. Only
the file's owner and group may connect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import trio

from protocol.errors import BadInputError

log = logging.getLogger(__name__)

SOCKET_MODE = 0o660
MAX_SOCKET_PATH = 107
"""Bytes of sockaddr_un.sun_path, without its end mark."""
_BACKLOG = 16


@contextlib.contextmanager
def control_socket(path: Path) -> Iterator[trio.SocketListener]:
    """Listen at `path`, and remove the file afterwards. Raises BadInputError if that is not possible."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _clear_stale(path)
            sock.bind(str(path))
            path.chmod(SOCKET_MODE)  # before `listen`: until then no client can connect
            sock.listen(_BACKLOG)
        except OSError as error:
            raise BadInputError(f"control.socket: cannot listen on {path}: {error.strerror or error}") from error
        made = path.stat()
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), made):  # otherwise another daemon has replaced the file
                    path.unlink()


def _clear_stale(path: Path) -> None:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise BadInputError(f"control.socket: {path} is longer than the {MAX_SOCKET_PATH} bytes of a socket's path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadInputError(f"control.socket: {path} exists and is not a socket: remove it, or choose another path")
        if _answers(path):
            raise BadInputError(f"control.socket: another daemon answers on {path}: stop it, or choose another path")
        log.info("replacing the control socket of a daemon that has ended", extra={"path": path})
        path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its backlog is full, so a process listens
        return True
