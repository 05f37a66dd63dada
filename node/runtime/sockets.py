"""Reading and writing sockets in few system calls."""

from __future__ import annotations

import socket

import trio

GATHERED_BYTES, GATHER_S = 64 << 10, 0.25
"""So much of a body, or what came in so long, is worth waking up for: nothing can be done with it before it is whole.
The time is far below any silence that ends a request."""


RECORD_BYTES = 16384
"""What a record of TLS carries at most (RFC 8446, 5.1). OpenSSL may hold nearly one, which the socket then does not."""


class Readable:
    """Waits until a socket has something to read, or much where much is sure to come: a slow link would wake its
    reader for every packet (SO_RCVLOWAT, socket(7); the end and errors of a connection wake it whatever the mark)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._mark = 1

    async def wait(self, coming: int = 0) -> None:
        """`coming`: how many more bytes the peer surely sends, if the connection lasts. May return with none there."""
        mark = max(1, min(GATHERED_BYTES, coming - RECORD_BYTES))
        if mark != self._mark:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._mark = mark
        if mark == 1:
            await trio.lowlevel.wait_readable(self._sock)
        else:
            with trio.move_on_after(GATHER_S):
                await trio.lowlevel.wait_readable(self._sock)
