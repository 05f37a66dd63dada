"""An HTTP client for benchmarks with low CPU use, and the processor time of the server that it reads from.

The client sends prepared bytes, and receives into one buffer over a blocking socket, so that it costs far less than the
servers that are measured.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.image import MANIFEST

HOST = "127.0.0.1"
SLOW_TURN = 256 << 10
"""Most bytes that a paced client receives at a time."""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    port: int
    base: str
    """The path in front of `/blobs/` and `/manifests/`."""
    pid: int = 0
    host: str = HOST

    def request(self, tail: str, method: str = "GET", headers: str = "") -> bytes:
        lines = f"{method} {self.base}/{tail} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nUser-Agent: bench\r\n"
        return f"{lines}Accept: {MANIFEST}, */*\r\n{headers}\r\n".encode()

    def cpu_s(self) -> float:
        """Processor time of the process and its children, kernel included, to the precision of a scheduler tick."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in (self.pid, *children)]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


class Client:
    """A client with one connection, kept alive."""

    def __init__(self, server: Server) -> None:
        self._sock = socket.create_connection((server.host, server.port))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 20, 0))
        self._buffer = bytearray(1 << 20)
        self._view = memoryview(self._buffer)

    def close(self) -> None:
        self._sock.close()

    def send(self, request: bytes) -> None:
        self._sock.send(request)

    def receive(self, length: int) -> None:
        """Receive a small answer of `length` bytes, head included."""
        got = 0
        while got < length:
            size = self._sock.recv_into(self._view[got:])
            assert size, "the server closed"
            got += size
        assert got == length
        assert self._buffer.startswith(b"HTTP/1.1 200"), self._buffer[:200]

    def ask(self, request: bytes) -> tuple[int, int]:
        """Send a request, and read the answer's head. Returns the bytes of the head and of the body."""
        self._sock.sendall(request)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            peeked = head + self._sock.recv(16384, socket.MSG_PEEK)
            assert len(peeked) > len(head), "the server closed"
            end = peeked.find(b"\r\n\r\n")
            head += self._sock.recv((end + 4 if end >= 0 else len(peeked)) - len(head))
        assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 206")), head
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        return len(head), int(fields[b"content-length"])

    def drop(self, length: int, pause: Callable[[int], None] | None = None) -> None:
        """Receive `length` bytes, and discard them. `pause` is called with the size of each part."""
        turn = SLOW_TURN if pause else len(self._buffer)
        while length:
            size = self._sock.recv_into(self._buffer, min(length, turn))
            assert size, "the server closed"
            length -= size
            if pause:
                pause(size)

    def sha256(self, length: int) -> str:
        hasher = hashlib.sha256()
        while length:
            size = self._sock.recv_into(self._buffer, min(length, len(self._buffer)))
            assert size, "the server closed"
            hasher.update(self._view[:size])
            length -= size
        return hasher.hexdigest()
