"""A TCP proxy that counts requests and bytes: the load of a registry is measured outside the daemons.

It can also make the registry slow (a rate for all connections together), distant (a delay each way), silent (`stall`),
unreachable (`cut`) or failing (`answer`), and add TLS to it.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

import trio

from tests.support.lab import Namespace
from tests.support.processes import wait_for

CHUNK = 1 << 18
REFUSED_S = 5.0
ON_THE_WAY = 4096
"""Most chunks that a delay holds: those that a fast link has in flight. The bound also holds for a fast registry."""
_REQUEST_LINE = re.compile(rb"(GET|HEAD|POST|PUT|PATCH|DELETE) (\S+) HTTP/1\.[01]\r\n(.*?)\r\n\r\n", re.DOTALL)
_RANGE = re.compile(rb"(?im)^range: *(.*?)\r?$")
_MAX_HEAD = 1 << 16
_CONNECTION_ENDED = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


@dataclass(slots=True)
class Count:
    """`received`: bytes from the target to clients, with HTTP heads. `asked`: requests by method, path and range."""

    received: int = 0
    requests: int = 0
    connections: int = 0
    asked: Counter[str] = field(default_factory=Counter)


class CountingProxy:
    """A context manager; the proxy runs in a thread with a trio loop of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rate: float | None = None,
        delay_s: float = 0.0,
        namespace: Namespace | None = None,
        listen: str = "127.0.0.1",
        port_here: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`rate`: bytes per second. `delay_s`: each way, also of a new connection. `tls`: towards clients only."""
        self.count = Count()
        self.rate = rate
        self.port = port_here
        self.host = listen
        self._delay_s = delay_s
        self._namespace = namespace
        self._tls = tls
        self._target = (host, port)
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="counting-proxy")

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._ready = threading.Event()
        self._thread.start()
        wait_for("the proxy listens", self._ready.is_set)
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._scope.cancel)
        self._thread.join(60)

    def reset(self) -> None:
        """Set all counts to 0."""
        self.count = Count()

    def stall(self) -> None:
        """Forward nothing, and refuse nothing."""
        self._run(self._close_gate)

    def cut(self) -> None:
        """Close all connections, and new ones as soon as they are made."""
        self._run(self._cut_all)

    def answer(self, status: int) -> None:
        """Answer every request with `status`; none reaches the registry."""
        self._run(lambda: self._refuse_all(status))

    def restore(self) -> None:
        self._run(self._open_gate)

    def _run(self, function: object) -> None:
        trio.from_thread.run_sync(function, trio_token=self._token)  # type: ignore[arg-type]

    def _close_gate(self) -> None:
        self._gate = trio.Event()

    def _open_gate(self) -> None:
        self._reachable, self._status = True, 0
        self._gate.set()

    def _refuse_all(self, status: int) -> None:
        self._cut_all()
        self._reachable, self._status = True, status

    def _cut_all(self) -> None:
        self._reachable = False
        for scope in tuple(self._scopes):
            scope.cancel()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._gate = trio.Event()
        self._gate.set()
        self._reachable, self._status = True, 0
        self._scopes: set[trio.CancelScope] = set()
        self._paid_until = trio.current_time()
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                listener = await self._listener()
                nursery.start_soon(trio.serve_listeners, self._handle, [listener])
                self.port = listener.socket.getsockname()[1]
                self._ready.set()

    async def _listener(self) -> trio.SocketListener:
        if self._namespace is not None:
            return self._namespace.listener(self.host, self.port)
        return (await trio.open_tcp_listeners(self.port, host=self.host))[0]

    async def _connect(self) -> trio.SocketStream:
        if self._namespace is not None:
            return await self._namespace.connect(*self._target)
        return await trio.open_tcp_stream(*self._target)

    async def _handle(self, connection: trio.SocketStream) -> None:
        if not self._reachable:
            return
        client = (
            trio.SSLStream(connection, self._tls, server_side=True, https_compatible=True) if self._tls else connection
        )
        self.count.connections += 1
        if self._status:
            async with client:
                await self._refuse(client)
            return
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await trio.sleep(2 * self._delay_s)
                server = await self._connect()
                async with client, server, trio.open_nursery() as nursery:
                    nursery.start_soon(self._forward_requests, client, server)
                    await self._forward_answers(server, client)
                    nursery.cancel_scope.cancel()
            except* _CONNECTION_ENDED:
                pass  # either end may leave at any time; the other one notices
            finally:
                self._scopes.discard(scope)

    async def _refuse(self, client: trio.abc.Stream) -> None:
        with contextlib.suppress(*_CONNECTION_ENDED), trio.move_on_after(REFUSED_S):
            while data := await client.receive_some(CHUNK):
                for match in _REQUEST_LINE.finditer(bytes(data)):
                    self._note(match)
                    head = f"HTTP/1.1 {self._status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    await client.send_all(head.encode())
                    return

    async def _forward_requests(self, client: trio.abc.Stream, server: trio.SocketStream) -> None:
        seen = b""
        while data := await client.receive_some(CHUNK):
            seen += bytes(data)
            end = 0
            for match in _REQUEST_LINE.finditer(seen):
                self._note(match)
                end = match.end()
            seen = seen[max(end, len(seen) - _MAX_HEAD) :]
            await self._gate.wait()
            await trio.sleep(self._delay_s)
            await server.send_all(data)
        await server.send_eof()

    def _note(self, match: re.Match[bytes]) -> None:
        self.count.requests += 1
        ranged = _RANGE.search(match[3])
        span = f" {ranged[1].decode()}" if ranged else ""
        self.count.asked[f"{match[1].decode()} {match[2].decode()}{span}"] += 1

    async def _forward_answers(self, server: trio.SocketStream, client: trio.abc.Stream) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes | bytearray]](ON_THE_WAY if self._delay_s else 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, receive, client)
            async with send:
                while data := await server.receive_some(CHUNK):
                    await send.send((trio.current_time() + self._delay_s, data))

    async def _deliver(
        self, arriving: trio.MemoryReceiveChannel[tuple[float, bytes | bytearray]], client: trio.abc.Stream
    ) -> None:
        async for due, data in arriving:
            await self._gate.wait()
            if self.rate:
                self._paid_until = max(self._paid_until, trio.current_time()) + len(data) / self.rate
            await trio.sleep_until(max(due, self._paid_until) if self.rate else due)
            self.count.received += len(data)
            await client.send_all(data)
