"""Writing to a client's socket without copying, as fast as the client reads: buffers by writev, files by sendfile."""

from __future__ import annotations

import contextlib
import os
import socket

import trio

from protocol.errors import UnavailableError
from protocol.ids import Buffer

JOINED_BYTES = 64 << 10
"""Up to this size, a copy of the body behind its head is cheaper than a separate entry in a system call."""
SENDFILE_BYTES = 1 << 20
"""Most bytes of one sendfile call. Other tasks run between the calls: a fast client does not hold up the loop."""
SLOW_S = 500e-6
"""Once a client took longer than this to make room, its whole send buffer is used, not only trio's 16 KiB of it
(TCP_NOTSENT_LOWAT): fewer wake-ups. For a fast client short waits cost less: its bytes stay in the CPU's cache."""


class ClientLeftError(Exception):
    """The client closed, reset or stopped reading. That is normal, and nothing more can be sent to it."""


class Output:
    """`stall_s`: a client that reads nothing for this time counts as gone."""

    def __init__(self, stream: trio.SocketStream, stall_s: float) -> None:
        self._stream = stream
        self._stall_s = stall_s
        self._slow = False
        self.waits_since: float | None = None
        """When the wait began, if this waits for the client to read."""

    async def write(self, *parts: Buffer) -> None:
        """Write all of `parts`. More than JOINED_BYTES are not copied."""
        length = sum(map(len, parts))
        rest = [memoryview(part) for part in ([b"".join(parts)] if length <= JOINED_BYTES else parts)]
        while rest:
            try:
                sent = os.writev(self._stream.socket.fileno(), rest)
            except BlockingIOError:
                await self._room()
            except OSError as error:
                raise ClientLeftError("while a body was sent") from error
            else:
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if sent:
                    rest[0] = rest[0][sent:]
        if length > JOINED_BYTES:
            await trio.lowlevel.checkpoint()

    async def sendfile(self, source: int, start: int, stop: int) -> None:
        """Send the bytes [start, stop) of the descriptor `source`. Raises UnavailableError if the file is shorter."""
        target = self._stream.socket
        while start < stop:
            size = min(SENDFILE_BYTES, stop - start)
            try:
                sent = os.sendfile(target.fileno(), source, start, size)
            except BlockingIOError:
                await self._room()
                continue
            except ConnectionError as error:
                raise ClientLeftError("while a file was sent") from error
            if not sent:
                raise UnavailableError(f"the file ends at {start}, not {stop}")
            start += sent
            if sent == size:
                await trio.lowlevel.checkpoint()
            elif start < stop:  # the socket is full: another call would only report that
                await self._room()

    async def _room(self) -> None:
        self.waits_since = since = trio.current_time()
        try:
            with trio.move_on_after(self._stall_s) as stalled:
                await trio.lowlevel.wait_writable(self._stream.socket)
        finally:
            self.waits_since = None
        if stalled.cancelled_caught:
            raise ClientLeftError(f"the client read nothing for {self._stall_s:.0f} s")
        if trio.current_time() - since > SLOW_S and not self._slow:
            self._slow = True
            with contextlib.suppress(OSError):  # a unix socket has no such option
                self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, (1 << 31) - 1)
