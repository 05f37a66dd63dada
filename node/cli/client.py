"""The client's side of the control socket.

It uses http.client: p2pctl starts anew for each command, and importing httpx would take most of that command's time.
"""

from __future__ import annotations

import grp
import json
import os
import socket
import stat
from collections.abc import Generator
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from protocol.errors import ShoalError

ANSWER_S = 20.0
"""Longest wait for a document: the doctor's slowest probe takes 5 s."""
POST_S = 60.0
"""Longest wait for a change: gc of a large cache waits for the disk."""
PULL_SILENCE_S = 300.0
"""Longest time between two lines of a stream."""
MAX_LINE = 1 << 20
MAX_DOCUMENT = 256 << 20
"""The answer to `why` for an image of a million blocks is about 200 MB long."""


class DaemonUnreachableError(ShoalError):
    """No daemon answers on the control socket; the text names the cause, if it is visible, and the remedy."""


class DaemonRefusedError(ShoalError):
    """The daemon answered with this error."""


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path, timeout: float, descriptor: int | None = None) -> None:
        """`descriptor` is sent with the first bytes."""
        super().__init__("p2pd", timeout=timeout)
        self._path = path
        self._descriptor = descriptor

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def send(self, data: Any) -> None:
        if self._descriptor is not None and isinstance(data, bytes):
            if self.sock is None:
                self.connect()
            sent = socket.send_fds(self.sock, [data], [self._descriptor])
            self._descriptor, data = None, data[sent:]
        super().send(data)


class ControlClient:
    """One connection for each request. Answers are JSON documents, unparsed.

    Every method raises DaemonUnreachableError or DaemonRefusedError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, path: str, **query: str) -> bytes:
        return b"".join(self._ask("GET", path, query, timeout=ANSWER_S))

    def post(self, path: str, *, body: bytes | None = None, **query: str) -> bytes:
        return b"".join(self._ask("POST", path, query, timeout=POST_S, body=body))

    def stream(self, path: str, *, descriptor: int | None = None, **query: str) -> Generator[bytes, None, None]:
        """POST; yields the JSON lines of the answer as they arrive. `descriptor` is an open file to send."""
        return self._ask("POST", path, query, timeout=PULL_SILENCE_S, longest=MAX_LINE, descriptor=descriptor)

    def _ask(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        *,
        timeout: float,
        longest: int = MAX_DOCUMENT,
        body: bytes | None = None,
        descriptor: int | None = None,
    ) -> Generator[bytes, None, None]:
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            with closing(_UnixConnection(self.path, timeout, descriptor)) as connection:
                connection.request(method, target, body)
                response = connection.getresponse()
                if response.status != 200:
                    raise DaemonRefusedError(_error_text(response))
                while line := response.readline(longest):
                    yield line
        except TimeoutError as error:
            hint = "is it stopped or overloaded? systemctl status p2pd"
            raise DaemonUnreachableError(f"p2pd does not answer on {self.path} for {timeout:.0f} s: {hint}") from error
        except (OSError, HTTPException) as error:
            raise DaemonUnreachableError(explain(self.path, error)) from error


def _error_text(response: HTTPResponse) -> str:
    """The daemon sends `{"error": text}`, and its HTTP server `{"errors": [{"message": text}]}`."""
    text = f"p2pd answers {response.status}"
    with suppress(ValueError, KeyError, IndexError, TypeError):
        document = json.loads(response.read(MAX_LINE))
        text = str(document["error"] if "error" in document else document["errors"][0]["message"])
    return text


def explain(path: Path, error: Exception) -> str:
    """One line: why no daemon answers on this socket, and the remedy."""
    if isinstance(error, FileNotFoundError):
        return f"no control socket at {path}: p2pd is not running or has another control.socket: systemctl status p2pd"
    if isinstance(error, PermissionError):
        return f"no permission for {path}{_owner(path)}: join that group, or use sudo"
    if isinstance(error, ConnectionRefusedError):
        return f"no process listens on {path}: p2pd ended without removing it: systemctl status p2pd"
    if isinstance(error, (ConnectionError, HTTPException)):
        return f"p2pd closed the connection while it answered on {path}: systemctl status p2pd"
    return f"cannot use {path}: {error}: is it p2pd's control socket? systemctl status p2pd"


def _owner(path: Path) -> str:
    try:
        status = os.stat(path)
        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        return ""
    return f" (mode {stat.S_IMODE(status.st_mode):04o}, group {group})"
