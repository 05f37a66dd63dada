"""HTTP/1.1 for httpx, on h11 and non-blocking sockets: a body's bytes are received where they are to stay.

httpx decides (redirects, headers, proxies), and this moves the bytes: through httpx's own transport each of them
passes six layers of Python, in portions of 64 KiB at most. Here h11 reads the head, and what Content-Length announces
goes from the socket straight into the caller's buffer (`Body.recv_into`). Other framings are left to h11.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import h11
import httpx
import trio

from node.runtime.sockets import Readable

MAX_HEAD = 100 << 10
RECEIVE_BYTES = 16 << 10
IDLE_S = 5.0
"""httpx's default: registries and their load balancers keep connections for longer."""

_PORTS = {"http": 80, "https": 443}
_T = TypeVar("_T")
_Origin = tuple[str, str, int]
"""Scheme, host and port."""


@contextmanager
def _within(seconds: float | None, error: type[httpx.TimeoutException]) -> Iterator[None]:
    with trio.move_on_after(float("inf") if seconds is None else seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise error(f"not within {seconds} s")


@contextmanager
def _as(error: type[httpx.TransportError]) -> Iterator[None]:
    """What the system and h11 say, in httpx's words."""
    try:
        yield
    except h11.RemoteProtocolError as found:
        raise httpx.RemoteProtocolError(str(found)) from found
    except h11.LocalProtocolError as found:
        raise httpx.LocalProtocolError(str(found)) from found
    except OSError as found:
        raise error(str(found)) from found


class _Wire:
    """A connected socket, plain or TLS. Raises OSError."""

    def __init__(self, sock: socket.socket, origin: _Origin) -> None:
        sock.setblocking(False)
        self.origin = origin
        self.idle_since = 0.0
        self._sock = sock
        self._readable = Readable(sock)

    async def secure(self, context: ssl.SSLContext) -> None:
        tls = context.wrap_socket(self._sock, server_hostname=self.origin[1], do_handshake_on_connect=False)
        self._sock = tls
        self._readable = Readable(tls)
        await self._do(tls.do_handshake)

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[await self._do(lambda: self._sock.send(rest), writing=True) :]  # noqa: B023

    async def recv_into(self, view: memoryview, coming: int = 0) -> int:
        """Waits for bytes and takes what is there; 0 at the end. `coming` as in `Readable.wait`."""
        return await self._do(lambda: self._received(view), coming)

    def _received(self, view: memoryview) -> int:
        got = self._sock.recv_into(view)
        # OpenSSL hands out one record (16 KiB) at a time, and may hold one that the socket no longer shows.
        while got and isinstance(self._sock, ssl.SSLSocket) and got < len(view):
            try:
                more = self._sock.recv_into(view[got:])
            except ssl.SSLWantReadError:
                break
            if not more:
                break
            got += more
        return got

    async def _do(self, operation: Callable[[], _T], coming: int = 0, *, writing: bool = False) -> _T:
        """`operation` until it does not block any more; `writing` tells for what, where the socket does not."""
        waited = False
        while True:
            try:
                done = operation()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError) as error:
                if isinstance(error, ssl.SSLWantWriteError) or (writing and not isinstance(error, ssl.SSLError)):
                    await trio.lowlevel.wait_writable(self._sock)
                else:
                    await self._readable.wait(coming)
            else:
                if not waited:
                    await trio.lowlevel.checkpoint()
                return done
            waited = True

    def usable(self) -> bool:
        """Whether the other side has kept silent since the last answer, which is not long ago."""
        try:
            socket.socket.recv(self._sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return trio.current_time() - self.idle_since < IDLE_S
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._sock.close()


class Body(httpx.AsyncByteStream):
    """What follows an answer's head, for httpx or by `recv_into`. Raises httpx.TransportError.

    If the end was read when it is closed, its connection serves the next request.
    """

    def __init__(
        self, wire: _Wire, parser: h11.Connection, length: int | None, read_s: float | None,
        release: Callable[[_Wire, bool], None],
    ) -> None:  # fmt: skip
        """`length`: what the head announced; None where h11 is to find the end. `release`: takes the wire back."""
        self._wire, self._parser, self._read_s = wire, parser, read_s
        self._release: Callable[[_Wire, bool], None] | None = release
        self._held = _came_with_head(parser) if length else b""
        self._left = length - len(self._held) if length else length

    async def recv_into(self, view: memoryview) -> int:
        """Waits for bytes and takes what is there, up to the length of `view`; how many, 0 at the body's end."""
        if self._left is None and not self._held:
            self._held = await self._next_parsed()
        if self._held:
            count = min(len(view), len(self._held))
            view[:count], self._held = self._held[:count], self._held[count:]
            return count
        if not self._left:
            return 0
        with _as(httpx.ReadError), _within(self._read_s, httpx.ReadTimeout):
            count = await self._wire.recv_into(view[: self._left], min(len(view), self._left))
        if not count:
            raise httpx.RemoteProtocolError("the body ended early")
        self._left -= count
        return count

    async def _next_parsed(self) -> bytes:
        with _as(httpx.ReadError):
            event = await _next_event(self._wire, self._parser, self._read_s)
        if isinstance(event, h11.Data):
            return bytes(event.data)
        self._left = 0
        return b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        buffer = bytearray(RECEIVE_BYTES)
        while count := await self.recv_into(memoryview(buffer)):
            yield bytes(buffer[:count])

    async def aclose(self) -> None:
        if self._release is not None:
            whole = self._left == 0 and not self._held and not self._parser.trailing_data[0]
            self._release(self._wire, whole and self._parser.our_state is h11.DONE)
            self._release = None


class DirectTransport(httpx.AsyncBaseTransport):
    """At most `connections` at once, idle ones included. An answer's extension `body` is its `Body`."""

    def __init__(self, context: ssl.SSLContext, connections: int) -> None:
        self._context = context
        self._slots = trio.Semaphore(connections)
        self._idle: deque[_Wire] = deque()
        """In the order in which they became idle."""
        self._retired = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions["timeout"]
        with _within(timeout["pool"], httpx.PoolTimeout):
            await self._slots.acquire()
        wire: _Wire | None = None
        try:
            wire = self._reused(_origin(request.url)) or await self._connected(request.url, timeout["connect"])
            return await self._asked(wire, request, timeout)
        except BaseException:
            self._release(wire, False)
            raise

    async def _asked(self, wire: _Wire, request: httpx.Request, timeout: dict[str, float | None]) -> httpx.Response:
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        with _as(httpx.WriteError), _within(timeout["write"], httpx.WriteTimeout):
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            events = (head, h11.Data(data=await request.aread()), h11.EndOfMessage())
            await wire.send(b"".join(parser.send(event) or b"" for event in events))
        with _as(httpx.ReadError):
            event = await _next_event(wire, parser, timeout["read"])
            while isinstance(event, h11.InformationalResponse):
                event = await _next_event(wire, parser, timeout["read"])
        answer = cast(h11.Response, event)
        body = Body(wire, parser, _announced(request.method, answer), timeout["read"], self._release)
        return httpx.Response(
            answer.status_code, headers=list(answer.headers.raw_items()), stream=body, extensions={"body": body}
        )

    def _reused(self, origin: _Origin) -> _Wire | None:
        for wire in [wire for wire in reversed(self._idle) if wire.origin == origin]:
            self._idle.remove(wire)
            if wire.usable():
                return wire
            wire.close()
        return None

    async def _connected(self, url: httpx.URL, connect_s: float | None) -> _Wire:
        while len(self._idle) > self._slots.value:
            self._idle.popleft().close()
        scheme, host, port = origin = _origin(url)
        with _as(httpx.ConnectError), _within(connect_s, httpx.ConnectTimeout):
            try:
                stream = await trio.open_tcp_stream(host, port)
                wire = _Wire(socket.socket(fileno=stream.socket.detach()), origin)
                if scheme == "https":
                    await _secured(wire, self._context)
            except OSError:
                raise  # also a certificate that is not right, which is a ValueError too
            except ValueError as error:
                raise httpx.ConnectError("a host name that cannot be asked for") from error
        return wire

    def _release(self, wire: _Wire | None, reusable: bool) -> None:
        self._slots.release()
        if wire is not None and reusable and not self._retired:
            wire.idle_since = trio.current_time()
            self._idle.append(wire)
        elif wire is not None:
            wire.close()

    def retire(self) -> None:
        """From now on no connection is kept when its answer is over; requests are served as before."""
        self._retired = True
        while self._idle:
            self._idle.pop().close()

    async def aclose(self) -> None:
        self.retire()


def _came_with_head(parser: h11.Connection) -> bytes:
    event = parser.next_event()
    return bytes(event.data) if isinstance(event, h11.Data) else b""


async def _secured(wire: _Wire, context: ssl.SSLContext) -> None:
    try:
        await wire.secure(context)
    except BaseException:
        wire.close()
        raise


async def _next_event(wire: _Wire, parser: h11.Connection, read_s: float | None) -> h11.Event:
    while (event := parser.next_event()) is h11.NEED_DATA:
        buffer = bytearray(RECEIVE_BYTES)
        with _within(read_s, httpx.ReadTimeout):
            count = await wire.recv_into(memoryview(buffer))
        parser.receive_data(bytes(buffer[:count]))
    return cast(h11.Event, event)


def _origin(url: httpx.URL) -> _Origin:
    if url.scheme not in _PORTS:
        raise httpx.UnsupportedProtocol(f"not http or https: {url.scheme}")
    return url.scheme, url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]


def _announced(method: str, answer: h11.Response) -> int | None:
    """The length of the body that follows; None where h11 is to find its end."""
    if method == "HEAD" or answer.status_code in (204, 304):
        return 0
    fields = dict(answer.headers)
    if b"transfer-encoding" in fields or b"content-length" not in fields:
        return None
    return int(fields[b"content-length"])
