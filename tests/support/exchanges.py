"""Members on loopback: real exchanges, and raw peers that send any bytes, with a clock that the test controls.

The clock stands still unless the scenario lets time pass. Therefore a busy machine causes no timeout, and a test does
not really wait for the timeouts that it expects.
"""

from __future__ import annotations

import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.config.quantities import HostPort
from node.exchange.connection import Endpoint
from node.exchange.contract import Answer, Lane, Sender
from node.exchange.limits import Timing
from node.exchange.tls import TlsExchange
from node.identity.certificates import Authority, Credentials, own_authority, peer_of
from node.identity.identity import Identity
from protocol import wire
from protocol.ids import BLOCK_SIZE, PeerId
from protocol.members import Member
from protocol.messages import Failed, GetShards, Ping, Pong, Request, Resolve, Resolved, ShardFound
from protocol.records import Record

DIGEST = "sha256:" + "ab" * 32
PING, PONG = Ping(), Pong()
NAME, NAMED = Resolve("secret", "latest"), Resolved(DIGEST, 1, "secret", 0.0)
GET = GetShards(DIGEST, 0, 1, BLOCK_SIZE, 1, m=0, want=0, hops=0, source="")
SIGNED = {"sha256": bytes(32), "signer": PeerId("12D3KooW"), "signature": bytes(64)}
RECORD = Record(DIGEST, 0, length=BLOCK_SIZE, size=BLOCK_SIZE, **SIGNED)
BLOCK = bytes(range(256)) * (BLOCK_SIZE // 256)
PART = ShardFound(1, 0, 0, RECORD)
HELLO = wire.encode_hello("bulk")

HANG_S = 300.0
"""Real seconds after which a scenario counts as hung. On an idle machine every scenario takes only a few."""
STEP_S, QUIET_S = 0.1, 0.01
"""While time passes, the clock jumps by STEP_S each time that no task was able to run for QUIET_S of real time."""


def frame(request_id: int, message: Any, body_length: int = 0) -> bytes:
    header = msgspec.msgpack.encode((request_id, message))
    return struct.pack(">II", len(header), body_length) + header


async def answer_all(peer: PeerId, request: Request) -> Answer:
    return Answer(NAMED if isinstance(request, Resolve) else PONG)


async def serve_block(peer: PeerId, request: GetShards, sender: Sender) -> None:
    await sender.room()
    sender.send(PART, BLOCK)


class Raw:
    """A peer's side of a connection, byte by byte."""

    def __init__(self, stream: Any, received: bytes = b"") -> None:
        self.stream = stream
        self.received = received

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def say(self, request_id: int, message: Any, body_length: int = 0) -> None:
        await self.send(frame(request_id, message, body_length))

    async def read_frame(self) -> Any:
        header_length, body_length = struct.unpack(">II", await self._read(8))
        header = msgpack.unpackb(await self._read(header_length))
        await self._read(body_length)
        return header

    async def give_block(self, data: bytes = BLOCK) -> None:
        """Answer the next request with a block, of which only `data` is sent."""
        request_id, _ = await self.read_frame()
        await self.say(request_id, PART, BLOCK_SIZE)
        await self.send(data)

    async def ended(self) -> bool:
        """Read until the other side closes."""
        try:
            while await self.stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            return True
        return True

    async def to_plain(self) -> Raw:
        """End TLS, as a peer in plain mode does; the result continues in the clear."""
        return Raw(*await self.stream.unwrap())

    async def _read(self, size: int) -> bytes:
        while len(self.received) < size:
            more = await self.stream.receive_some(size - len(self.received))
            if not more:
                raise EOFError
            self.received += more
        data, self.received = self.received[:size], self.received[size:]
        return data


@dataclass
class Node:
    peer: PeerId
    exchange: TlsExchange
    credentials: Credentials
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            await self.exchange.run(task_status=task_status)

    async def ask(self, peer: PeerId, message: Request, silence_s: float = 5.0, **more: Any) -> Answer:
        return await self.exchange.request(peer, message, **{"lane": Lane.BULK, "silence_s": silence_s} | more)

    async def read(self, peer: PeerId, message: GetShards = GET, silence_s: float = 5.0, **more: Any) -> bytes | Failed:
        """The bytes of all parts, or the failure that ended the stream."""
        parts: list[bytes] = []
        settings = {"lane": Lane.BULK, "silence_s": silence_s, "part": lambda message, body: parts.append(bytes(body))}
        failed = await self.exchange.stream(peer, message, **settings | more)
        return b"".join(parts) if failed is None else failed


class Cluster:
    """Members of one authority."""

    def __init__(self, nursery: trio.Nursery, folder: Path, clock: trio.testing.MockClock | None = None) -> None:
        self.nursery = nursery
        self.authority: Authority = own_authority(folder)
        self.members: dict[PeerId, Member] = {}
        self._clock = clock

    def jump(self, seconds: float) -> None:
        assert self._clock is not None
        self._clock.jump(seconds)

    @asynccontextmanager
    async def time_passing(self) -> AsyncIterator[None]:
        """While the block runs, time passes whenever all tasks are blocked."""

        async def pass_on() -> None:
            while True:
                await trio.testing.wait_all_tasks_blocked(QUIET_S)
                self.jump(STEP_S)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_on)
            yield
            nursery.cancel_scope.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let time pass until the condition holds."""
        async with self.time_passing():
            while not condition():
                await trio.testing.wait_all_tasks_blocked(QUIET_S)

    def credentials(self) -> Credentials:
        return Credentials.issued(self.authority, Identity.of(Ed25519PrivateKey.generate()), "")

    def locate(self, peer: PeerId, *addresses: str) -> None:
        self.members[peer] = Member(peer, "node", "site", addresses)

    def exchange(self, credentials: Credentials | None = None, *, port: int = 0, **changes: Any) -> Node:
        """A node that listens, but does not run."""
        credentials = credentials or self.credentials()
        contexts = credentials.server_context(), credentials.client_context()
        settings: dict[str, Any] = {
            "handler": answer_all,
            "server": serve_block,
            "timing": Timing(),
            "refused": lambda peer: False,
        } | changes
        listen, locate = HostPort("127.0.0.1", port), self.members.get
        exchange = TlsExchange(Endpoint(*contexts, peer_of, listen=listen, locate=locate, **settings))
        peer = credentials.identity.peer_id
        self.locate(peer, str(exchange.address))
        return Node(peer, exchange, credentials)

    async def start(self, **changes: Any) -> Node:
        node = self.exchange(**changes)
        await self.nursery.start(node.run)
        return node

    async def serve_raw(
        self, serve: Callable[[Raw], Awaitable[None]], plain: bool = False, hello: bytes = b""
    ) -> PeerId:
        """A member that listens, says hello (or `hello`) and then runs `serve` on each connection."""
        credentials = self.credentials()

        async def welcome(stream: trio.SSLStream[trio.SocketStream]) -> None:
            raw = Raw(stream)
            await raw.read_frame()
            await raw.send(hello or wire.encode_hello("bulk", plain))
            await serve(raw)
            stream.transport_stream.socket.close()

        listeners = await self.nursery.start(
            partial(trio.serve_ssl_over_tcp, welcome, 0, credentials.server_context(), host="127.0.0.1")
        )
        host, port = listeners[0].transport_listener.socket.getsockname()
        self.locate(credentials.identity.peer_id, f"{host}:{port}")
        return credentials.identity.peer_id

    async def dial_raw(self, node: Node, context: ssl.SSLContext | None = None, hello: bytes = HELLO) -> Raw:
        """A connection of a member, or of the client in `context`, that has sent `hello` and read no answer yet."""
        address = node.exchange.address
        transport = await trio.open_tcp_stream(address.host, address.port)
        raw = Raw(trio.SSLStream(transport, context or self.credentials().client_context()))
        if hello:
            await raw.send(hello)
        return raw


def play(folder: Path, scenario: Callable[[Cluster], Awaitable[None]], *, real_time: bool = False) -> None:
    """Run a scenario; all that it started ends with it."""
    clock = None if real_time else trio.testing.MockClock()

    async def main() -> None:
        with trio.CancelScope() as hang_guard:
            token = trio.lowlevel.current_trio_token()
            timer = threading.Timer(HANG_S, token.run_sync_soon, (hang_guard.cancel,))
            timer.start()
            try:
                async with trio.open_nursery() as nursery:
                    await scenario(Cluster(nursery, folder, clock))
                    nursery.cancel_scope.cancel()
            finally:
                timer.cancel()
        assert not hang_guard.cancelled_caught, "the scenario hung"

    trio.run(main, clock=clock)
