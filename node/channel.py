"""A byte channel over TLS 1.3 on a non-blocking socket.

`ssl.SSLSocket` reads and writes the socket itself and says when it would block; trio only waits for it then. That is
twice as fast as trio.SSLStream, which carries every byte through memory BIOs and Python buffers.
"""

from __future__ import annotations

import ctypes
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass

import trio

from protocol.errors import PeerUnavailableError

Buffer = bytes | bytearray | memoryview

_TCP_NOTSENT_LOWAT = 25
"""linux/tcp.h; the socket module does not name it."""
UNSENT_BYTES = 128 << 10
"""What the kernel may hold of ours that is not on the wire: on a slow link a `Waiting` stands behind no more."""

CONGESTION_CONTROL = b"reno"
"""On a LAN, where cubic does the same. BBR, where that is the machine's default, lost a fifth of its packets when ten
nodes sent to each other at once."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_REUSED_BYTES = 4 << 20
_KEPT_FREE_BYTES = 16 << 20


def tune_allocator() -> None:
    """Let glibc reuse block buffers; does nothing under another C library.

    By default freed buffers soon go back to the kernel, and fresh ones cost a page fault for every 4 KiB: 150 µs for a
    shard of 256 KiB whose sixteen like were freed, against 6 µs so (600 µs for a block). Up to 4 MiB now come from the
    heap, of which 16 MiB may stay unused: more would show in the resident memory of an idle node.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)


@dataclass(slots=True)
class Traffic:
    """Bytes of frames, counted as they pass; shared by all channels with one peer."""

    sent: int = 0
    received: int = 0


class TlsChannel:
    """One task may read while one other writes.

    Every method raises PeerUnavailableError when the connection is closed (by either side) or fails. A write that is
    cancelled in the middle leaves half a frame, so it closes the channel. There is no closing handshake: frames have
    lengths, so a cut is seen.
    """

    def __init__(self, tls: ssl.SSLSocket, stall_s: float) -> None:
        """`tls`: connected and non-blocking. `stall_s`: how long a peer may take nothing of what is written to it."""
        self.traffic = Traffic()
        self._tls = tls
        self._stall_s = stall_s
        self._closed = False

    @classmethod
    async def open(
        cls, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, stall_s: float
    ) -> TlsChannel:
        """Takes over the connected socket `sock` and shakes hands; the deadline is the caller's.

        A client learns only with its first read whether the server accepted its certificate (RFC 8446, section 4.4.4).
        """
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            with suppress(OSError):  # a kernel without it: its default then
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL)
            tls = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
        except OSError as error:
            sock.close()
            raise PeerUnavailableError(f"connection lost: {error}") from error
        channel = cls(tls, stall_s)
        try:
            await channel._handshake()
        except BaseException:
            channel.close()
            raise
        return channel

    async def _handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._wait_readable()
            except ssl.SSLWantWriteError:
                await self._wait_writable()
            except (OSError, ValueError) as error:
                raise PeerUnavailableError(f"TLS handshake failed: {error}") from error
            else:
                return

    def peer_certificate(self) -> bytes:
        """The peer's certificate, DER; empty where it gave none."""
        return self._tls.getpeercert(binary_form=True) or b""

    async def recv_into(self, view: memoryview) -> int:
        """Waits for bytes and takes what is there, up to the length of `view`; returns how many, 0 at the end.

        OpenSSL hands out one record (16 KiB) at a time and may hold one that the socket no longer shows as readable,
        so it is asked until it has no more, and the socket is waited for only then.
        """
        waited = False
        while True:
            received, ended = self._read_ready(view)
            if received or ended:
                self.traffic.received += received
                if not waited:
                    await trio.lowlevel.checkpoint()
                return received
            waited = True
            await self._wait_readable()

    def _read_ready(self, view: memoryview) -> tuple[int, bool]:
        """Bytes read, and whether that was the end."""
        received = 0
        try:
            while received < len(view):
                size = self._tls.recv_into(view[received:])
                if not size:
                    return received, True
                received += size
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            # SSLWantWriteError too: only a key update that we answer could ask for it, and no member sends any.
            if not received:
                raise PeerUnavailableError(f"connection lost: {error}") from error
        return received, False

    async def send_all(self, *buffers: Buffer) -> None:
        """One writer at a time. Raises PeerUnavailableError also when the peer takes nothing for `stall_s`."""
        waited = False
        try:
            for buffer in buffers:
                waited |= await self._send(memoryview(buffer))
                self.traffic.sent += len(buffer)
        except BaseException:
            self.close()
            raise
        if not waited:
            await trio.lowlevel.checkpoint()

    async def _send(self, view: memoryview) -> bool:
        """Whether it had to wait. OpenSSL wants a write that would block again with the same bytes: so it gets them."""
        sent, waited = 0, False
        while sent < len(view):
            try:
                sent += self._tls.send(view[sent:])
            except ssl.SSLWantWriteError:
                waited = True
                with trio.move_on_after(self._stall_s) as stall:
                    await self._wait_writable()
                if stall.cancelled_caught:
                    raise PeerUnavailableError(f"peer takes no bytes for {self._stall_s} s") from None
            except OSError as error:
                raise PeerUnavailableError(f"connection lost: {error}") from error
        return waited

    async def _wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._tls)
        except (trio.ClosedResourceError, ValueError, OSError) as error:
            raise PeerUnavailableError("connection closed") from error

    async def _wait_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._tls)
        except (trio.ClosedResourceError, ValueError, OSError) as error:
            raise PeerUnavailableError("connection closed") from error

    def close(self) -> None:
        """At once; wakes tasks that wait for this channel with PeerUnavailableError. May be repeated."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._tls)
            self._tls.close()
