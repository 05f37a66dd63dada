"""The client's side of the control socket.

http.client and not httpx, because p2pctl is started anew for every command and httpx takes most of its time to import.
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
"""A document: the doctor's slowest probe takes 5 s."""
POST_S = 60.0
"""gc of a large cache waits for the disk."""
PULL_SILENCE_S = 300.0
"""Between two lines of a pull."""
MAX_LINE = 1 << 20
MAX_DOCUMENT = 256 << 20
"""A `why` of an image of a million blocks has about 200 MB."""


class DaemonUnreachableError(ShoalError):
    """Nobody answers on the control socket; the text says why, as far as can be seen, and what to do."""


class DaemonRefusedError(ShoalError):
    """The daemon answered with an error, whose text this is."""


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path, timeout: float, descriptor: int | None = None) -> None:
        """`descriptor` goes with the first bytes that are sent."""
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
    """One connection for each request. Every method raises DaemonUnreachableError or DaemonRefusedError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, path: str, **query: str) -> bytes:
        """The JSON document, as the daemon gave it."""
        return b"".join(self._ask("GET", path, query, ANSWER_S, MAX_DOCUMENT))

    def post(self, path: str, *, body: bytes | None = None, **query: str) -> bytes:
        """The JSON document that answers."""
        return b"".join(self._ask("POST", path, query, POST_S, MAX_DOCUMENT, body))

    def stream(self, path: str, *, descriptor: int | None = None, **query: str) -> Generator[bytes, None, None]:
        """POST, and the JSON lines of the answer as they come. An open file may go with it."""
        return self._ask("POST", path, query, PULL_SILENCE_S, MAX_LINE, None, descriptor)

    def _ask(
        self, method: str, path: str, query: dict[str, str], timeout: float, longest: int,
        body: bytes | None = None, descriptor: int | None = None,
    ) -> Generator[bytes, None, None]:  # fmt: skip
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
    """Of the daemon's `{"error": text}`, or of its HTTP server's `{"errors": [{"message": text}]}`."""
    text = f"p2pd answers {response.status}"
    with suppress(ValueError, KeyError, IndexError, TypeError):
        document = json.loads(response.read(MAX_LINE))
        text = str(document["error"] if "error" in document else document["errors"][0]["message"])
    return text


def explain(path: Path, error: Exception) -> str:
    """Why nobody answers on this socket, and what to do: one line."""
    if isinstance(error, FileNotFoundError):
        return f"no control socket at {path}: p2pd is not running or has another control.socket: systemctl status p2pd"
    if isinstance(error, PermissionError):
        return f"no permission for {path}{_owner(path)}: join that group, or use sudo"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens on {path}: p2pd ended without removing it: systemctl status p2pd"
    if isinstance(error, (ConnectionError, HTTPException)):
        return f"p2pd went away while it answered on {path}: systemctl status p2pd"
    return f"cannot use {path}: {error}: is it p2pd's control socket? systemctl status p2pd"


def _owner(path: Path) -> str:
    try:
        found = os.stat(path)
        group = grp.getgrgid(found.st_gid).gr_name
    except (OSError, KeyError):
        return ""
    return f" (mode {stat.S_IMODE(found.st_mode):04o}, group {group})"
