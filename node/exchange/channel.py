"""A byte channel on a non-blocking socket: TLS 1.3, followed by plain TCP if both sides want it.

`ssl.SSLSocket` reads and writes the socket itself and reports when it would block; only then does trio wait for the
socket. That is twice as fast as trio.SSLStream, which copies every byte through memory BIOs and Python buffers.
"""

from __future__ import annotations

import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from node.exchange.link_speed import LinkSpeed
from node.runtime.sockets import RECORD_BYTES, Readable
from protocol.errors import NotAdmittedError, PeerUnavailableError
from protocol.ids import Buffer

UNSENT_BYTES = 64 << 10
"""Most bytes that the kernel holds unsent: on a slow link, a `Waiting` queues behind no more than these."""
CONGESTION_CONTROL = b"reno"
"""On a LAN, cubic performs the same. BBR, the default of some machines, lost a fifth of its packets when ten nodes sent
to each other at once."""


@dataclass(slots=True)
class Traffic:
    """Counts of bytes of frames; all channels with one peer share them."""

    sent: int = 0
    received: int = 0


class Channel(ABC):
    """One task may read while one other writes.

    Every method raises PeerUnavailableError when the connection is closed (by either side) or fails. A write that is
    cancelled halfway leaves half a frame, so it closes the channel. There is no closing handshake: frames carry their
    lengths, so the reader notices a stream that was cut.
    """

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        """`sock`: connected and non-blocking. `stall_s`: the longest time in which a peer may accept no byte."""
        self.traffic = Traffic()
        self.received_at = trio.current_time()
        """When a byte last arrived."""
        self._stall_s = stall_s
        self._sock = sock
        self._readable = Readable(sock)
        self._closed = False

    def receive_nowait(self, view: memoryview) -> int:
        """Read the bytes that have arrived into `view`, up to its length. Returns their number, 0 for none."""
        if self._closed:
            raise PeerUnavailableError("connection closed")
        try:
            received = self._receive(view)
        except OSError as error:
            raise PeerUnavailableError(f"connection lost: {error}") from error
        if received:
            self.traffic.received += received
            self.received_at = trio.current_time()
        return received

    @abstractmethod
    def _receive(self, view: memoryview) -> int:
        """`receive_nowait`, but OSError is not translated. Raises PeerUnavailableError at the end of the stream."""

    async def send_all(self, *buffers: Buffer) -> bool:
        """For one writer at a time. Also raises PeerUnavailableError if the peer accepts no byte for `stall_s`. Returns
        whether it had to wait; if not, it passed no checkpoint."""
        waited = False
        views = self._portions([memoryview(buffer) for buffer in buffers if buffer])
        try:
            while views:
                try:
                    sent = self._send(views)
                except (BlockingIOError, ssl.SSLWantWriteError):
                    waited = True
                    await self.wait_taken()
                except OSError as error:
                    raise PeerUnavailableError(f"connection lost: {error}") from error
                else:
                    self.traffic.sent += sent
                    while views and sent >= len(views[0]):
                        sent -= len(views.pop(0))
                    if sent:
                        views[0] = views[0][sent:]
        except BaseException:
            self.close()
            raise
        return waited

    def _portions(self, views: list[memoryview]) -> list[memoryview]:
        """The same bytes, in the portions in which they should be written."""
        return views

    @abstractmethod
    def _send(self, views: list[memoryview]) -> int:
        """Write some of the first bytes. Returns their number. Raises OSError, also if the write would block."""

    async def wait_taken(self) -> None:
        """Wait until the kernel holds fewer than UNSENT_BYTES that are not on the wire."""
        with trio.move_on_after(self._stall_s):
            try:
                await trio.lowlevel.wait_writable(self._sock)
            except (trio.ClosedResourceError, ValueError, OSError) as error:
                raise PeerUnavailableError("connection closed") from error
            return
        raise PeerUnavailableError(f"peer accepted no bytes for {self._stall_s} s")

    async def wait_readable(self, coming: int = 0) -> None:
        """May return before any byte has arrived. `coming`: see `Readable.wait`."""
        try:
            await self._readable.wait(coming)
        except (trio.ClosedResourceError, ValueError, OSError) as error:
            raise PeerUnavailableError("connection closed") from error

    def tell_speed(self, links: LinkSpeed) -> None:
        """To be called after a body was written."""
        if not self._closed:
            links.sent(self._sock)

    def close(self) -> None:
        """Close at once. Tasks that wait for this channel get PeerUnavailableError. A second call does nothing."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class PlainChannel(Channel):
    def _receive(self, view: memoryview) -> int:
        try:
            received = self._sock.recv_into(view)
        except BlockingIOError:
            return 0
        if not received:
            raise PeerUnavailableError("the peer closed the connection")
        return received

    def _send(self, views: list[memoryview]) -> int:
        return self._sock.sendmsg(views)


class TlsChannel(Channel):
    _sock: ssl.SSLSocket

    @classmethod
    async def open(cls, sock: socket.socket, context: ssl.SSLContext, stall_s: float) -> TlsChannel:
        """Take over the connected socket `sock` and do the TLS handshake. The caller sets the deadline.

        Raises NotAdmittedError if the other side has no certificate of this cluster, else PeerUnavailableError.
        A client learns only by its first read whether the server accepted its certificate (RFC 8446, section 4.4.4).
        """
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            with suppress(OSError):  # a kernel that lacks it keeps its default
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL)
            server = context.protocol == ssl.PROTOCOL_TLS_SERVER
            tls = context.wrap_socket(sock, server_side=server, do_handshake_on_connect=False)
        except OSError as error:
            sock.close()
            raise PeerUnavailableError(f"connection lost: {error}") from error
        channel = cls(tls, stall_s)
        try:
            await channel._carry_out(tls.do_handshake, "TLS handshake")
        except BaseException:
            channel.close()
            raise
        return channel

    async def _carry_out(self, step: Callable[[], object], name: str) -> None:
        while True:
            try:
                step()
            except ssl.SSLWantReadError:
                await self.wait_readable()
            except ssl.SSLWantWriteError:
                await self.wait_taken()
            except ssl.SSLCertVerificationError as error:
                raise NotAdmittedError(f"certificate of another cluster ({error.verify_message})") from error
            except (OSError, ValueError) as error:
                if getattr(error, "reason", "") == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
                    raise NotAdmittedError("showed no certificate") from error
                raise PeerUnavailableError(f"{name} failed: {error}") from error
            else:
                return

    async def to_plain(self) -> PlainChannel:
        """End TLS on both sides (close_notify); the returned channel continues the connection in the clear.

        This channel can then only be closed. The caller sets the deadline. OpenSSL reads record by record, so bytes
        that the peer sends behind its close_notify are still in the socket.
        """
        await self._carry_out(self._sock.unwrap, "the end of TLS")
        self._closed = True
        sock = socket.socket(fileno=self._sock.detach())
        sock.setblocking(False)
        plain = PlainChannel(sock, self._stall_s)
        plain.traffic = self.traffic
        return plain

    def peer_certificate(self) -> bytes:
        """The peer's certificate in DER; empty if it sent none."""
        return self._sock.getpeercert(binary_form=True) or b""

    def _receive(self, view: memoryview) -> int:
        """OpenSSL returns one record (16 KiB) at a time, and may hold one when the socket is no longer readable. So
        this method reads until OpenSSL has no more. Only then may the caller wait for the socket."""
        length, received = len(view), 0
        try:
            while received < length:
                # Not `recv_into`: it is this method and some tests of its arguments, for each record.
                size = self._sock.read(length - received, view[received:] if received else view)
                if not size:
                    break
                received += int(size)
        except ssl.SSLWantReadError:
            return received
        except OSError:
            # SSLWantWriteError too: only the answer to a key update could cause it, and no member sends key updates.
            if not received:
                raise
        if not received:
            raise PeerUnavailableError("the peer closed the connection")
        return received

    def _portions(self, views: list[memoryview]) -> list[memoryview]:
        """A head shares a record with the beginning of its body: a small record costs as much as a full one, and wakes
        the reader too early."""
        if len(views) < 2 or len(views[0]) >= RECORD_BYTES:
            return views
        head, body = views
        cut = RECORD_BYTES - len(head)
        first = memoryview(b"".join((head, body[:cut])))
        return [first, body[cut:]] if cut < len(body) else [first]

    def _send(self, views: list[memoryview]) -> int:
        """After a write that would block, OpenSSL requires a retry with the same bytes; `send_all` does so."""
        return self._sock.send(views[0])
