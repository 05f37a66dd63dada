"""A client that reads a blob and discards it: `python -m tests.support.drain HOST PORT PATH [BYTES_PER_SECOND]`.

When the body ends, or at SIGTERM, it prints the number of body bytes that it has read. With a rate it also asks the
kernel for the smallest receive buffer, so that unread bytes stay in the server.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from contextlib import suppress


class _StoppedError(Exception):
    pass


def _stop(*_: object) -> None:
    raise _StoppedError


def _drain(sock: socket.socket, rate: int, count: list[int]) -> None:
    buffer = bytearray(rate // 10 or 1 << 18)
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(4096) or sys.exit("the server sent no answer")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        sys.exit(head.decode("latin-1"))
    count[0] = len(head.partition(b"\r\n\r\n")[2])
    while size := sock.recv_into(buffer):
        count[0] += size
        if rate:
            time.sleep(size / rate)


def main() -> None:
    host, port, path = sys.argv[1:4]
    rate = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    signal.signal(signal.SIGTERM, _stop)
    count = [0]
    with suppress(_StoppedError), socket.socket() as sock:
        if rate:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        _drain(sock, rate, count)
    print(count[0])


if __name__ == "__main__":
    main()
