"""Waiting for a socket to have something to read, with few wake-ups.

A slow link would wake its reader for every packet. If more bytes are sure to arrive, SO_RCVLOWAT (socket(7)) lets the
kernel wake the reader only once many have arrived. The end or an error of the connection wakes it in any case.
"""

from __future__ import annotations

import socket

import trio

GATHERED_BYTES, GATHER_S = 64 << 10, 0.25
"""A reader of a body wakes once this many bytes arrived, or after this time: a part of a body is of no use. The time is
far shorter than any silence that ends a request."""
RECORD_BYTES = 16384
"""Most bytes of one TLS record (RFC 8446, 5.1). OpenSSL may hold up to that many bytes, which the socket lacks."""


class Readable:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._mark = 1

    async def wait(self, coming: int = 0) -> None:
        """`coming`: bytes that the peer surely sends if the connection lasts. May return before any has arrived."""
        mark = max(1, min(GATHERED_BYTES, coming - RECORD_BYTES))
        if mark != self._mark:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._mark = mark
        if mark == 1:
            await trio.lowlevel.wait_readable(self._sock)
        else:
            with trio.move_on_after(GATHER_S):
                await trio.lowlevel.wait_readable(self._sock)
