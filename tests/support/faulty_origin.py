"""A registry with one generated blob, in a thread of the test's process. A test decides how its bodies break."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from types import MappingProxyType
from typing import Self

_NOISE = Random(9).randbytes(1 << 20)
_MARK = 16
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one GET that covers the blob's byte `at`. `kind`: `reset`, `fin` or `stall` right before that byte, or
    a status such as `429` instead of a body, with the header Retry-After if `retry_after` (seconds) is given."""

    at: int
    kind: str
    retry_after: int | None = None


def content(start: int, stop: int) -> bytes:
    """The blob's bytes [start, stop). No two MiB are equal."""
    size = len(_NOISE)
    first = start // size
    parts = [f"{number:016d}".encode() + _NOISE[_MARK:] for number in range(first, max(first + 1, -(-stop // size)))]
    return b"".join(parts)[start - first * size : stop - first * size]


class FaultyOrigin:
    """A context manager. `asked` has the byte ranges of all GETs. Each of `faults` happens once, in any order."""

    def __init__(self, size: int, *faults: Fault, hashed: bool = True) -> None:
        """Without `hashed` the digest is false, which saves time in tests that never read the whole blob."""
        self.size = size
        self.digest = f"sha256:{hashlib.sha256(content(0, size)).hexdigest() if hashed else 'ab' * 32}"
        self.asked: list[tuple[int, int]] = []
        self.released = threading.Event()
        self._faults = list(faults)
        handler = type("Handler", (_Handler,), {"origin": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def asked_bytes(self) -> int:
        return sum(stop - start for start, stop in self.asked)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fault(self, start: int, stop: int) -> Fault | None:
        for fault in self._faults:
            if start <= fault.at < stop:
                self._faults.remove(fault)
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    origin: FaultyOrigin

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._head(200 if self._is_blob() else 404, self.origin.size if self._is_blob() else 0)

    def do_GET(self) -> None:
        if not self._is_blob():
            return self._head(200 if self.path == "/v2/" else 404, 0)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1) if match else (0, self.origin.size)
        self.origin.asked.append((start, stop))
        fault = self.origin.fault(start, stop)
        if fault and fault.kind.isdigit():
            after = fault.retry_after
            return self._head(int(fault.kind), 0, {} if after is None else {"Retry-After": str(after)})
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{self.origin.size}"} if match else {}
        self._head(206 if match else 200, stop - start, headers)
        self._send(start, fault.at if fault else stop)
        if fault:
            self._break(fault.kind)
        return None

    def _is_blob(self) -> bool:
        return self.path == f"/v2/app/blobs/{self.origin.digest}"

    def _send(self, start: int, stop: int) -> None:
        try:
            for offset in range(start, stop, CHUNK):
                self.connection.sendall(content(offset, min(stop, offset + CHUNK)))
        except OSError:
            self.close_connection = True

    def _break(self, kind: str) -> None:
        self.close_connection = True
        if kind == "stall":
            self.origin.released.wait()
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            self.connection.close()

    def _head(self, status: int, length: int, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
