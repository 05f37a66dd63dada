"""HTTP/1.1 for httpx, on h11 and non-blocking sockets: a body's bytes are received directly into their final buffer.

httpx decides (redirects, headers, proxies), and this transport moves the bytes: in httpx's own transport each byte
passes six layers of Python, in portions of 64 KiB at most. Here h11 parses the head, and a body with Content-Length is
received from the socket straight into the caller's buffer (`Body.recv_into`). h11 parses bodies with other framings.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import TypeVar, cast

import h11
import httpx
import trio

from node.config.schema import UpstreamPart
from node.registry.reach import Reach
from node.runtime.fair_places import FairPlaces
from node.runtime.sockets import Readable
from protocol.errors import BadInputError

MAX_REDIRECTS = 5
MAX_REDIRECT_BODY = 16 << 10
"""The bodies of redirects are a short text. A connection whose body is longer is closed."""
TIMEOUT = httpx.Timeout(connect=5.0, read=10.0, write=10.0, pool=30.0)
MAX_HEAD = 100 << 10
RECEIVE_BYTES = 16 << 10
TOKEN_CONNECTIONS = 8
"""Connections to token services, beside those to the registry: a slow token service must not hold up its answers."""
IDLE_S = 5.0
"""How long an idle connection is kept; httpx's default. Registries and load balancers keep them for longer."""

Connect = Callable[[UpstreamPart, Reach], tuple[httpx.AsyncClient, Callable[[], None]]]
"""Makes a client that connects within a reach, and a function that closes the client's idle connections and makes it
keep no more."""
_PORTS = {"http": 80, "https": 443}
_T = TypeVar("_T")
_Origin = tuple[str, str, int]
"""Scheme, host and port."""


@contextmanager
def _as(error: type[httpx.TransportError], late: type[httpx.TimeoutException], seconds: float | None) -> Iterator[None]:
    """Translate errors of the system and of h11 into those of httpx. Raises `late` after `seconds`."""
    try:
        with trio.fail_after(float("inf") if seconds is None else seconds):
            yield
    except trio.TooSlowError as failure:
        raise late(f"not within {seconds} s") from failure
    except h11.RemoteProtocolError as failure:
        raise httpx.RemoteProtocolError(str(failure)) from failure
    except h11.LocalProtocolError as failure:
        raise httpx.LocalProtocolError(str(failure)) from failure
    except OSError as failure:
        raise error(str(failure)) from failure


class Wire:
    """A connected socket, plain or TLS. Raises OSError."""

    def __init__(self, sock: socket.socket, origin: _Origin) -> None:
        sock.setblocking(False)
        self.origin = origin
        self.idle_since = 0.0
        self.read_s: float | None = None
        self._sock = sock
        self._readable = Readable(sock)

    async def secure(self, context: ssl.SSLContext) -> None:
        name = self.origin[1]
        try:
            self._sock = tls = context.wrap_socket(self._sock, server_hostname=name, do_handshake_on_connect=False)
            self._readable = Readable(tls)
            await self._do(tls.do_handshake)
        except BaseException:
            self.close()
            raise

    async def next_event(self, parser: h11.Connection) -> h11.Event:
        while True:
            with _as(httpx.ReadError, httpx.ReadTimeout, self.read_s):
                if (event := parser.next_event()) is not h11.NEED_DATA:
                    return cast(h11.Event, event)
                buffer = bytearray(RECEIVE_BYTES)
                count = await self.recv_into(memoryview(buffer))
                parser.receive_data(bytes(buffer[:count]))

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[await self._do(lambda: self._sock.send(rest), writing=True) :]  # noqa: B023

    async def recv_into(self, view: memoryview, coming: int = 0) -> int:
        """Wait for bytes and store them. Returns their number, 0 at the end. `coming` as in `Readable.wait`."""
        return await self._do(lambda: self._received(view), coming)

    def _received(self, view: memoryview) -> int:
        count = more = self._sock.recv_into(view)
        # OpenSSL returns one record (16 KiB) at a time, and may hold one when the socket is no longer readable.
        with suppress(ssl.SSLWantReadError):
            while more and isinstance(self._sock, ssl.SSLSocket) and count < len(view):
                more = self._sock.recv_into(view[count:])
                count += more
        return count

    async def _do(self, operation: Callable[[], _T], coming: int = 0, *, writing: bool = False) -> _T:
        """Repeat `operation` until it would not block. `writing`: on a plain socket, wait for writability."""
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
        """Whether the server sent nothing (no end either) since the last answer, and that was within IDLE_S."""
        try:
            socket.socket.recv(self._sock, 1, socket.MSG_PEEK)
        except OSError as error:
            return isinstance(error, BlockingIOError) and trio.current_time() - self.idle_since < IDLE_S
        return False

    def close(self) -> None:
        self._sock.close()


Release = Callable[[Wire, bool], None]
"""Called with whether the connection can serve another request."""


class Body(httpx.AsyncByteStream):
    """A response's body. If it is closed after its end was read, the connection serves the next request."""

    def __init__(self, wire: Wire, parser: h11.Connection, *, length: int | None, release: Release) -> None:
        """`length` in bytes comes from the head. None: h11 finds the end. `release` gets the wire back."""
        self._wire, self._parser = wire, parser
        self._release: Release | None = release
        first = parser.next_event() if length else None
        self._held = bytes(first.data) if isinstance(first, h11.Data) else b""
        self._left = length - len(self._held) if length else length

    async def recv_into(self, view: memoryview) -> int:
        """Wait for bytes and store at most `len(view)`. Returns their number, 0 at the end. Raises TransportError."""
        if self._left is None and not self._held:
            event = await self._wire.next_event(self._parser)
            self._held, self._left = (bytes(event.data), None) if isinstance(event, h11.Data) else (b"", 0)
        if self._held:
            count = min(len(view), len(self._held))
            view[:count], self._held = self._held[:count], self._held[count:]
            return count
        if not self._left:
            return 0
        with _as(httpx.ReadError, httpx.ReadTimeout, self._wire.read_s):
            count = await self._wire.recv_into(view[: self._left], min(len(view), self._left))
        if not count:
            raise httpx.RemoteProtocolError("the body ended early")
        self._left -= count
        return count

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
    """Has at most `connections`, and TOKEN_CONNECTIONS for requests with the extension `token`, idle ones included. The
    extension `body` of a response is its `Body`."""

    def __init__(self, context: ssl.SSLContext, connections: int, reach: Reach | None = None) -> None:
        """`reach`: None to connect to all addresses."""
        self._context, self._reach = context, reach
        self._slots, self._token_slots = FairPlaces(connections), FairPlaces(TOKEN_CONNECTIONS)
        self._idle: deque[Wire] = deque()
        """In the order in which they became idle."""
        self._retired = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions["timeout"]
        slots = self._token_slots if "token" in request.extensions else self._slots
        with _as(httpx.ConnectError, httpx.PoolTimeout, timeout["pool"]):
            give = await slots.take()
        wire: Wire | None = None
        try:
            wire = self._reused(origin_of(request.url)) or await self.connect(request.url, timeout["connect"])
            wire.read_s = timeout["read"]
            return await self._asked(wire, request, timeout["write"], release=partial(self._release, give))
        except BaseException:
            self._release(give, wire, False)
            raise

    async def _asked(
        self, wire: Wire, request: httpx.Request, write_s: float | None, *, release: Release
    ) -> httpx.Response:
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        with _as(httpx.WriteError, httpx.WriteTimeout, write_s):
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            events = (head, h11.Data(data=await request.aread()), h11.EndOfMessage())
            await wire.send(b"".join(parser.send(event) or b"" for event in events))
        while isinstance(event := await wire.next_event(parser), h11.InformationalResponse):
            pass
        answer = cast(h11.Response, event)
        body = Body(wire, parser, length=_announced(request.method, answer), release=release)
        headers = list(answer.headers.raw_items())
        return httpx.Response(answer.status_code, headers=headers, stream=body, extensions={"body": body})

    def _reused(self, origin: _Origin) -> Wire | None:
        for wire in [wire for wire in reversed(self._idle) if wire.origin == origin]:
            self._idle.remove(wire)
            if wire.usable():
                return wire
            wire.close()
        return None

    async def connect(self, url: httpx.URL, connect_s: float | None) -> Wire:
        while len(self._idle) > self._slots.free:
            self._idle.popleft().close()
        scheme, host, port = origin = origin_of(url)
        with _as(httpx.ConnectError, httpx.ConnectTimeout, connect_s):
            try:
                if self._reach is not None and not self._reach.is_free(host):
                    entries = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                    self._reach.check(host, [str(entry[4][0]) for entry in entries])
                stream = await trio.open_tcp_stream(host, port)
                await self._check_connected(host, stream)
                wire = Wire(socket.socket(fileno=stream.socket.detach()), origin)
                if scheme == "https":
                    await wire.secure(self._context)
            except OSError:
                raise  # a wrong certificate is a ValueError too
            except ValueError as error:
                raise httpx.ConnectError("not a host name") from error
        return wire

    async def _check_connected(self, host: str, stream: trio.SocketStream) -> None:
        """The name may have led elsewhere than when it was looked up. Nothing has been sent yet."""
        try:
            if self._reach is not None:
                self._reach.connected(host, stream.socket.getpeername()[0])
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    def _release(self, give: Callable[[], None], wire: Wire | None, reusable: bool) -> None:
        give()
        if wire is not None and reusable and not self._retired:
            wire.idle_since = trio.current_time()
            self._idle.append(wire)
        elif wire is not None:
            wire.close()

    def retire(self) -> None:
        """From now on, close each connection after its response. Requests are served as before."""
        self._retired = True
        while self._idle:
            self._idle.pop().close()

    async def aclose(self) -> None:
        self.retire()


def origin_of(url: httpx.URL) -> _Origin:
    if url.scheme not in _PORTS:
        raise httpx.UnsupportedProtocol(f"not http or https: {url.scheme}")
    return url.scheme, url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]


def _announced(method: str, answer: h11.Response) -> int | None:
    """The length of the body in bytes; None if h11 must find its end."""
    if method == "HEAD" or answer.status_code in (204, 304):
        return 0
    fields = dict(answer.headers)
    if b"transfer-encoding" in fields or b"content-length" not in fields:
        return None
    return int(fields[b"content-length"])


async def send(client: httpx.AsyncClient, request: httpx.Request, reach: Reach, *, follow: bool) -> httpx.Response:
    """The response after redirects, whose body is not read yet. httpx itself would read the whole body of a redirect,
    of any size, and follow it anywhere."""
    history: list[httpx.Response] = []
    while True:
        response = await client.send(request, stream=True, follow_redirects=False)
        response.history = list(history)
        if not follow or response.next_request is None:
            return response
        try:
            await _drain(response)
        finally:
            await response.aclose()
        history.append(response)
        if len(history) > MAX_REDIRECTS:
            raise httpx.TooManyRedirects("too many redirects", request=request)
        reach.check_redirect(request.url, response.next_request.url)
        request = response.next_request


async def _drain(response: httpx.Response) -> None:
    """Read a small body, so that its connection can serve another request."""
    count = 0
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_raw())) as portions:
        async for portion in portions:
            count += len(portion)
            if count > MAX_REDIRECT_BODY:
                return


def client_over(
    transport: httpx.AsyncBaseTransport, context: ssl.SSLContext, connections: int, *, environment: bool = True
) -> httpx.AsyncClient:
    """`environment`: use the proxies that the environment names, through httpx's own transport with this context."""
    return httpx.AsyncClient(
        verify=context,
        mounts={"all://*": transport},  # the least specific pattern: those of proxies go before it
        trust_env=environment,
        timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=connections),
        headers={"User-Agent": "shoal", "Accept-Encoding": "identity"},
    )


def sockets() -> Connect:
    """Clients over real sockets, which trust the system's authorities or those of the upstream's `ca`."""
    default = ssl.create_default_context()

    def connect(part: UpstreamPart, reach: Reach) -> tuple[httpx.AsyncClient, Callable[[], None]]:
        try:
            context = ssl.create_default_context(cafile=part.ca) if part.ca else default
            if part.ca and len(part.urls) > 1:
                context.load_default_certs()  # one URL may be public, and another the site's own
        except (OSError, ssl.SSLError) as error:
            raise BadInputError(f'upstream "{part.name}": ca = "{part.ca}": {error}') from error
        context.set_alpn_protocols(["http/1.1"])
        transport = DirectTransport(context, part.connections, reach)
        return client_over(transport, context, part.connections), transport.retire

    return connect
