"""A small HTTP/1.1 server on trio and h11: for the mirror (TCP), the control socket (unix) and /metrics.

A handler maps a `Request` to a `Response`, and works for the connection's `Client` (node/runtime/fair_places.py). The
server keeps every bound of `Limits`, sends bodies without copying them (node/web/output.py) and closes body generators
whatever happens; the handler never sees clients that leave or send garbage. When a body breaks off, the connection ends
with FIN, never with a reset: after a FIN clients resume with a Range request, after a reset they fail the pull.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from functools import lru_cache, partial
from typing import BinaryIO, cast
from urllib.parse import parse_qsl, unquote

import h11
import trio

from node.runtime.fair_places import Client, Demand, host_of, working_for
from node.web.connections import OpenConnections, Phase
from node.web.output import JOINED_BYTES, ClientLeftError, Output
from protocol.errors import ShoalError
from protocol.ids import Buffer

log = logging.getLogger(__name__)

MAX_QUERY_FIELDS = 32
"""The distribution specification defines four."""
RECEIVE_BYTES = 16 << 10
LINGER_S = 2.0
"""How long a connection that this server ends is drained: closing a socket with unread input would send a reset."""
LINGER_BYTES = 1 << 20

_BODILESS, _MALFORMED = (204, 304), (400, 413, 431, 501, 505)
_CLOEXEC = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the resources that clients may use. Times in seconds."""

    connections: int = 1024
    """Beyond it another connection makes way (node/web/connections.py), or the new one is answered 503."""
    head_bytes: int = 32 << 10
    """Request line and headers. Kubelet's registry tokens reach several KiB."""
    body_bytes: int = 1 << 20
    idle_s: float = 120.0
    """Above the 90 s after which Go's clients drop an idle connection, so that they never race with this server."""
    request_s: float = 20.0
    """Longest time from a request's first byte to its last."""
    write_stall_s: float = 60.0
    """A client that reads no byte of a body for this time counts as gone."""
    grace_s: float = 10.0
    """How long running bodies may still take after `stop`."""
    methods: tuple[str, ...] = ("GET", "HEAD", "POST")
    """Another method reaches the handler without its body, which stays unread, so the connection ends after it."""
    descriptors: int = 0
    """Most open files that a request may bring, over a unix socket (SCM_RIGHTS). Further ones are closed."""


@dataclass(frozen=True, slots=True)
class Request:
    """`path` is percent-decoded; header names are lower-case; the last of repeated query fields counts.

    `descriptors` are open until the response is sent; the server closes them.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FileBody:
    """The bytes [start, stop) of a file, sent by sendfile. The server enters `file` and leaves it."""

    file: AbstractContextManager[BinaryIO]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Response:
    """Content-Length is added for bytes and files; a generator without it is sent chunked.

    `first` is sent before the buffers of the generator: a handler may read the first buffer itself, to be sure of its
    source before it answers 200. The server removes that buffer from the list, so that it is freed before the body
    ends. If the generator raises, the body ends early. Answer HEAD like GET; set Content-Length if you omit the body.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Buffer | FileBody | AsyncGenerator[Buffer, None] = b""
    first: list[Buffer] = field(default_factory=list)


Handler = Callable[[Request], Awaitable[Response]]


def error_response(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the distribution specification's JSON form."""
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, body)


class _RefusedError(Exception):
    """The request is answered before all of it was read; then the connection is closed."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = replace(response, headers={**response.headers, "Connection": "close"})


def _refused(status: int, code: str, message: str) -> _RefusedError:
    return _RefusedError(error_response(status, code, message))


class Server:
    """State that the connections of one `serve_http` share."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self.handler = handler
        self.limits = limits
        self.stopping = False
        self._open: OpenConnections[_Connection] = OpenConnections(limits.connections)

    async def serve(self, stream: trio.SocketStream) -> None:
        address = _address(stream)
        connection = _Connection(self, stream, address, refuse=not self._open.makes_way(address, trio.current_time()))
        with self._open.holding(connection), working_for(Demand(connection.client)):
            await connection.run()

    def stop(self) -> None:
        self.stopping = True
        for connection in self._open:
            if connection.phase is Phase.IDLE:
                connection.end_within(LINGER_S)


async def serve_http(
    listeners: Sequence[trio.SocketListener],
    handler: Handler,
    *,
    limits: Limits = Limits(),
    stop: trio.Event | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, or until `stop` is set and its grace period is over.

    After `stop` nothing is accepted, requests on open connections get 503, and running bodies may end.
    """
    server = Server(handler, limits)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            await accepting.start(
                partial(trio.serve_listeners, server.serve, list(listeners), handler_nursery=connections)
            )
            task_status.started()
            await (stop if stop is not None else trio.Event()).wait()
            accepting.cancel_scope.cancel()
        server.stop()
        connections.cancel_scope.deadline = trio.current_time() + limits.grace_s


class _Connection:
    def __init__(self, server: Server, stream: trio.SocketStream, address: str, *, refuse: bool) -> None:
        self.address, self.client = address, Client(address, self.cut)
        self._server = server
        self._limits = server.limits
        self._stream = stream
        self._output = Output(stream, server.limits.write_stall_s)
        self._refuse = refuse
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=server.limits.head_bytes)
        self._method = b""
        self._request_until = 0.0
        self._descriptors: list[int] = []
        self._phase, self._since = Phase.WORK, trio.current_time()
        self._scope = trio.CancelScope()
        self.is_cut = False

    @property
    def phase(self) -> Phase:
        return self._phase if self._output.waits_since is None else Phase.CLIENT

    @property
    def since(self) -> float:
        return self._since if self._output.waits_since is None else self._output.waits_since

    def cut(self) -> bool:
        """End what this connection does now. Returns False if it ends already."""
        first, self.is_cut = not self.is_cut, True
        self._scope.cancel()
        return first

    def end_within(self, seconds: float) -> None:
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + seconds)

    @contextmanager
    def _during(self, phase: Phase, seconds: float = float("inf")) -> Iterator[trio.CancelScope]:
        """A part of a request that ends after `seconds`, or when the connection is cut."""
        self._phase, self._since = phase, trio.current_time()
        with trio.CancelScope(deadline=self._since + seconds) as self._scope:
            if self.is_cut:
                self._scope.cancel()
            yield self._scope
        self._phase = Phase.WORK

    async def run(self) -> None:
        try:
            while await self._cycle():
                self._close_descriptors()
                self._h11.start_next_cycle()
                self._method = b""  # a malformed request has no method: do not keep the previous one
            await self._hang_up()
        except ClientLeftError as error:
            log.debug("client left: %s", error)
        finally:
            self._close_descriptors()
            await self._stream.aclose()

    async def _cycle(self) -> bool:
        """Answer one request. Returns whether another may follow."""
        try:
            request = await self._receive()
            if request is None:
                return False
            response = await self._answer(request)
        except _RefusedError as refused:
            response = refused.response
        except h11.RemoteProtocolError as error:
            log.debug("malformed request: %s", error)
            status = error.error_status_hint if error.error_status_hint in _MALFORMED else 400
            response = _refused(status, "UNSUPPORTED", f"malformed request: {error}").response
        try:
            with self._during(Phase.WORK):
                await self._send(response)
        except ShoalError as error:
            log.warning("a body ends early: %s", error)
            return False
        except ClientLeftError:
            raise
        except Exception:
            # A handler's bug, as in `_answer`. The head may have been sent: the client only sees that the body ends.
            log.exception("a response with status %d broke off", response.status)
            return False
        if self.is_cut:
            log.debug("a body for %s ends early: it makes way for another client", self.address)
            return False
        return self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE

    async def _hang_up(self) -> None:
        """Send FIN and wait for the client's: closing with unread input would reset bytes still on their way."""
        with trio.move_on_after(LINGER_S):
            try:
                await self._stream.send_eof()
                for _ in range(LINGER_BYTES // RECEIVE_BYTES):
                    if not await self._stream.receive_some(RECEIVE_BYTES):
                        return
            except trio.BrokenResourceError as error:
                raise ClientLeftError("while the connection was closed") from error

    async def _receive(self) -> Request | None:
        """The next request; None when the client closed, or stayed idle too long."""
        event = self._h11.next_event()
        if event is not h11.NEED_DATA:
            await trio.lowlevel.checkpoint()  # between requests that arrived together, other tasks run
        else:
            with self._during(Phase.IDLE, LINGER_S if self._server.stopping else self._limits.idle_s) as idle:
                await self._fill()
            if idle.cancelled_caught:
                return None
        self._request_until = trio.current_time() + self._limits.request_s
        if event is h11.NEED_DATA:
            event = await self._next_event()
        if isinstance(event, h11.ConnectionClosed):
            return None
        return await self._rest_of(cast(h11.Request, event))

    async def _rest_of(self, head: h11.Request) -> Request:
        self._method = head.method
        request = _parse(head)
        if self._refuse or self._server.stopping:
            reason = "this node is shutting down" if self._server.stopping else "too many connections"
            raise _refused(503, "UNAVAILABLE", reason)
        if request.method not in self._limits.methods:
            raise _RefusedError(await self._answer(request))
        body = await self._body(int(request.headers.get("content-length", "0")))
        descriptors = tuple(self._descriptors)
        return replace(request, body=body, descriptors=descriptors) if body or descriptors else request

    async def _body(self, declared: int) -> bytes:
        body = bytearray()
        while max(declared, len(body)) <= self._limits.body_bytes:
            if self._h11.they_are_waiting_for_100_continue:
                await self._output.write(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])))
            event = await self._next_event()
            if isinstance(event, h11.EndOfMessage):
                return bytes(body)
            body += cast(h11.Data, event).data
        raise _refused(413, "SIZE_INVALID", f"a request's body may have {self._limits.body_bytes} bytes at most")

    async def _next_event(self) -> h11.Event:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            with self._during(Phase.CLIENT, self._request_until - trio.current_time()) as late:
                await self._fill()
            if late.cancelled_caught:
                raise _refused(408, "TIMEOUT", f"the request took longer than {self._limits.request_s:.0f} s")
        return cast(h11.Event, event)

    async def _fill(self) -> None:
        await trio.lowlevel.wait_readable(self._stream.socket)
        try:
            self._h11.receive_data(self._read())
        except BlockingIOError:
            return  # a spurious wake-up; the caller asks again
        except OSError as error:
            raise ClientLeftError("while a request was read") from error

    def _read(self) -> bytes:
        if not self._limits.descriptors:
            return os.read(self._stream.socket.fileno(), RECEIVE_BYTES)
        room = self._limits.descriptors - len(self._descriptors)
        own = os.dup(self._stream.socket.fileno())  # trio has no call that receives descriptors without waiting
        with socket.socket(fileno=own) as sock:
            data, received, _, _ = socket.recv_fds(sock, RECEIVE_BYTES, self._limits.descriptors, _CLOEXEC)
        self._descriptors += received[:room]
        for surplus in received[room:]:
            os.close(surplus)
        return data

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    async def _answer(self, request: Request) -> Response:
        try:
            with self._during(Phase.WORK):
                return await self._server.handler(request)
        except Exception:
            # A handler's bug: it must not end other requests.
            log.exception("%s %r failed", request.method, request.path)
            return error_response(500, "UNKNOWN", "internal error; see this node's log")
        raise _refused(503, "UNAVAILABLE", "this client's address has too many connections")

    async def _send(self, response: Response) -> None:
        body = response.body
        if isinstance(body, FileBody):
            with body.file as file:
                await self._send_file(response, body, file)
        elif isinstance(body, bytes | bytearray | memoryview):
            await self._send_bytes(response, body)
        else:
            async with aclosing(body):
                await self._output.write(
                    *self._head(response, None), *self._data(response.first.pop() if response.first else b"")
                )
                if self._method != b"HEAD":
                    async for buffer in body:
                        await self._output.write(*self._data(buffer))
                        del buffer  # a block: free it while the next one is awaited
                await self._output.write(*self._event(h11.EndOfMessage()))

    async def _send_bytes(self, response: Response, body: Buffer) -> None:
        await self._output.write(*self._head(response, len(body)), *self._data(body), *self._event(h11.EndOfMessage()))

    async def _send_file(self, response: Response, body: FileBody, file: BinaryIO) -> None:
        length = body.stop - body.start
        if length <= JOINED_BYTES and len(data := os.pread(file.fileno(), length, body.start)) == length:
            await self._send_bytes(response, data)
            return
        await self._output.write(*self._head(response, length))
        if self._data(cast(Buffer, range(length))):  # h11 uses only the length of a body
            await self._output.sendfile(file.fileno(), body.start, body.stop)
        await self._output.write(*self._event(h11.EndOfMessage()))

    def _head(self, response: Response, length: int | None) -> list[Buffer]:
        headers = [("Date", _date(int(time.time()))), *response.headers.items()]
        if length is not None and response.status not in _BODILESS and "Content-Length" not in response.headers:
            headers.append(("Content-Length", str(length)))
        return self._event(h11.Response(status_code=response.status, headers=headers))

    def _data(self, data: Buffer) -> list[Buffer]:
        if self._method == b"HEAD" or not len(data):
            return []
        return self._event(h11.Data(data=cast(bytes, data)))

    def _event(self, event: h11.Event) -> list[Buffer]:
        return [part for part in self._h11.send_with_data_passthrough(event) or () if len(part)]


def _address(stream: trio.SocketStream) -> str:
    """The client's host, "" for one on a unix socket or that has left."""
    try:
        peer = stream.socket.getpeername()
    except OSError:
        return ""
    return host_of(peer[0]) if isinstance(peer, tuple) else ""


@lru_cache(1)
def _date(now: int) -> str:
    return formatdate(now, usegmt=True)


def _parse(head: h11.Request) -> Request:
    target = head.target.decode("ascii")
    if target.startswith(("http://", "https://")):
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    path, _, query = target.partition("?")
    try:
        fields = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS))
    except ValueError as error:
        raise _refused(400, "UNSUPPORTED", f"more than {MAX_QUERY_FIELDS} query fields") from error
    headers: dict[str, str] = {}
    for raw_name, raw_value in head.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Request(head.method.decode("ascii"), unquote(path), fields, headers)
