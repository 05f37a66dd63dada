"""`Exchange` between members in one process, without sockets: for tests and simulations in virtual time.

Requests and replies are encoded and checked as on the wire, so a message that TLS would refuse fails here too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import trio

from node.config.quantities import HostPort
from node.exchange.contract import Answer, AtOnce, Handler, Heard, Into, Lane, Part, Server, State
from node.exchange.keep_alive import KeepAlive, OpenWork, Work
from node.exchange.requests import (
    REQUESTS_PER_CONNECTION,
    ROOM_BYTES,
    Call,
    answer,
    failure,
    nothing_at_once,
    serve,
    serve_at_once,
    serve_nothing,
)
from protocol import wire
from protocol.errors import PeerMisbehavedError, PeerUnavailableError, ShoalError
from protocol.ids import Buffer, PeerId
from protocol.messages import Failed, GetShards, Reply, Request, ShardFound

Message = TypeVar("Message", Request, Reply)


class MemoryNetwork:
    """The network of one simulation's exchanges. `latency_s` is the latency of each direction."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self._nodes: dict[PeerId, MemoryExchange] = {}
        self._stopped: dict[PeerId, trio.Event] = {}

    def stop(self, peer: PeerId) -> None:
        """From now on the node sends nothing, like a process under SIGSTOP, and requests to it wait."""
        self._stopped.setdefault(peer, trio.Event())

    def resume(self, peer: PeerId) -> None:
        if peer in self._stopped:
            self._stopped.pop(peer).set()

    def kill(self, peer: PeerId) -> None:
        """Requests from and to the node fail at once, as do all later ones until its exchange runs again."""
        if peer in self._nodes:
            self.leave(peer, self._nodes[peer])

    def join(self, peer: PeerId, exchange: MemoryExchange) -> None:
        self._nodes[peer] = exchange

    def leave(self, peer: PeerId, exchange: MemoryExchange) -> None:
        if self._nodes.get(peer) is exchange:
            del self._nodes[peer]
        exchange.disconnect(peer)

    def node(self, peer: PeerId) -> MemoryExchange:
        """Raises PeerUnavailableError if no exchange of this peer runs."""
        if peer not in self._nodes:
            raise PeerUnavailableError(f"{peer} cannot be reached")
        return self._nodes[peer]

    def reaches(self, sender: PeerId, receiver: PeerId) -> bool:
        """Whether a frame sent now arrives without waiting for `resume`."""
        return sender not in self._stopped and receiver not in self._stopped

    async def travel(self, sender: PeerId, receiver: PeerId, size: int) -> None:
        """Carry a frame of `size` bytes in one direction. A stopped node holds up frames from it and to it."""
        await trio.sleep(self.latency_s)
        for peer in (sender, receiver):
            while peer in self._stopped:
                await self._stopped[peer].wait()


@dataclass(eq=False)
class _Line:
    """A request between two nodes, until its answer arrived."""

    asker: PeerId
    lane: Lane
    call: Call
    size: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def cut(self) -> None:
        self.call.end(PeerUnavailableError(f"the connection with {self.call.peer} was closed"))
        self.scope.cancel()


class _Link:
    """The lines of one asker and lane."""

    def __init__(self, asker: PeerId, requests: int) -> None:
        self.asker = asker
        self.places = trio.Semaphore(requests)
        self.work = OpenWork[_Line]()
        self.travelling = 0
        """Bytes of bodies."""
        self.parts: deque[_Part] = deque()
        """On their way, in the order in which they arrive: that of a TCP connection."""
        self.room = trio.lowlevel.ParkingLot()

    def deliver(self) -> None:
        """Deliver the parts that wait for none before them."""
        while self.parts and self.parts[0].has_arrived:
            part = self.parts.popleft()
            _deliver(part.line.call, part.head, part.body)
            part.delivered.set()


@dataclass(eq=False)
class _Part:
    line: _Line
    head: bytes
    body: Buffer
    has_arrived: bool = False
    delivered: trio.Event = field(default_factory=trio.Event)


class _Parts(Work):
    """The Sender of one stream: each part travels in a task of `nursery`."""

    def __init__(
        self, exchange: MemoryExchange, link: _Link, line: _Line, request: GetShards, *, nursery: trio.Nursery
    ) -> None:
        super().__init__()
        self._exchange, self._link, self._line, self._nursery = exchange, link, line, nursery
        self._first, self._missing = request.first, request.wanted
        self.over = trio.Event()
        self.failed = Failed("unavailable", "")
        """What ends the stream if parts are missing."""

    def send(self, message: ShardFound, body: Buffer) -> None:
        head = wire.encode_head(1, message, len(body))
        if self.over.is_set():
            return
        self._missing &= ~(1 << max(0, message.record.index - self._first))
        if not self._missing:
            self.over.set()
        self.queued += 1
        self._link.travelling += len(body)
        part = _Part(self._line, head, body)
        self._link.parts.append(part)
        self._nursery.start_soon(self._carry, part)

    async def room(self) -> None:
        while not self.over.is_set() and self._link.travelling >= ROOM_BYTES:
            await self._link.room.park()
        if self.over.is_set():
            raise PeerUnavailableError("the stream is over")

    def coming(self) -> None:
        self.is_coming = True

    def end(self, error: ShoalError) -> None:
        self.fail(failure(error))

    def fail(self, failed: Failed) -> None:
        if not self.over.is_set():
            self.failed = failed
            self.over.set()

    async def _carry(self, part: _Part) -> None:
        link = self._link
        try:
            await self._exchange.travel(self._line, len(part.head) + len(part.body))
            part.has_arrived = True
            link.deliver()
            await part.delivered.wait()
        finally:
            self.queued -= 1
            link.travelling -= len(part.body)
            link.room.unpark_all()
            if part in link.parts:
                link.parts.remove(part)
                link.deliver()


class MemoryExchange:
    """`Exchange` (node/exchange/contract.py) on a `MemoryNetwork`."""

    def __init__(
        self,
        network: MemoryNetwork,
        own: PeerId,
        *,
        refused: Callable[[PeerId], bool],
        handler: Handler,
        server: Server = serve_nothing,
        at_once: AtOnce = nothing_at_once,
        requests_per_connection: int = REQUESTS_PER_CONNECTION,
    ) -> None:
        self._network, self._own = network, own
        self._refused, self._handler, self._server, self._at_once = refused, handler, server, at_once
        self._requests = requests_per_connection
        self._links: dict[tuple[PeerId, Lane], _Link] = {}
        self._asked: dict[_Line, None] = {}  # ordered, unlike a set, so that a run can be repeated
        self._answering: dict[_Line, None] = {}
        self._keep_alive = KeepAlive[_Link, _Line]()
        self._arrivals, self._inbox = trio.open_memory_channel[_Line](math.inf)  # the waiting askers bound it

    async def request(
        self, peer: PeerId, message: Request, *, lane: Lane, silence_s: float, heard: Heard = None
    ) -> Answer:
        return Answer(await self._ask(lane, Call(peer, message, silence_s=silence_s, heard=heard)))

    async def stream(
        self,
        peer: PeerId,
        message: GetShards,
        *,
        lane: Lane,
        silence_s: float,
        part: Part,
        heard: Heard = None,
        into: Into = None,
    ) -> Failed | None:
        last = await self._ask(lane, Call(peer, message, silence_s=silence_s, heard=heard, part=part, into=into))
        return last if isinstance(last, Failed) else None

    async def _ask(self, lane: Lane, call: Call) -> Reply:
        self._network.node(self._own)
        frame = wire.encode_head(1, call.message, 0)
        call.message = _checked(frame)
        line = _Line(self._own, lane, call, len(frame))
        self._network.node(call.peer).accept(line)
        self._asked[line] = None
        try:
            return await call.wait()
        finally:
            del self._asked[line]

    def accept(self, line: _Line) -> None:
        """Raises PeerUnavailableError if the asker is refused."""
        if self._refused(line.asker):
            raise PeerUnavailableError(f"{self._own} refuses {line.asker}")
        self._answering[line] = None
        self._arrivals.send_nowait(line)

    def reached(self, peer: PeerId) -> HostPort | None:
        """Always None: members in one process have no addresses."""

    def disconnect(self, peer: PeerId) -> None:
        for line in [*self._asked, *self._answering]:
            if peer in (line.asker, line.call.peer):
                line.cut()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._network.join(self._own, self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_alive.run, self._say_waiting)
                task_status.started()
                async for line in self._inbox:
                    nursery.start_soon(self._serve, line)
        finally:
            self._network.leave(self._own, self)

    def _say_waiting(self, link: _Link, report: list[tuple[_Line, State]]) -> None:
        if self._network.reaches(self._own, link.asker):
            for line, state in report:
                line.call.waiting(state, trio.current_time())

    async def _serve(self, line: _Line) -> None:
        with line.scope:
            await self._network.travel(line.asker, self._own, line.size)
            link = self._links.setdefault((line.asker, line.lane), _Link(line.asker, self._requests))
            await link.places.acquire()
            self._keep_alive.begin(link, link.work)
            try:
                await self._answer(link, line)
            finally:
                link.work.by_number.pop(line, None)
        del self._answering[line]

    async def _answer(self, link: _Link, line: _Line) -> None:
        message = line.call.message
        try:
            if isinstance(message, GetShards):
                async with trio.open_nursery() as nursery:
                    link.work.by_number[line] = parts = _Parts(self, link, line, message, nursery=nursery)
                    try:
                        if serve_at_once(self._at_once, line.asker, message, parts):
                            await parts.over.wait()
                        else:
                            parts.fail(await serve(self._server, line.asker, message, parts))
                    finally:
                        parts.over.set()
                head = wire.encode_head(1, parts.failed, 0)
            else:
                link.work.by_number[line] = Work()
                head = await answer(self._handler, line.asker, wire.Head(1, message, 0))
        finally:
            link.places.release()
        if line.call.missing or not isinstance(message, GetShards):
            await self.travel(line, len(head))
            _deliver(line.call, head)

    async def travel(self, line: _Line, size: int) -> None:
        """Carry a reply to the asker."""
        await self._network.travel(self._own, line.asker, size)


def _deliver(call: Call, head: bytes, body: Buffer = b"") -> None:
    """Deliver a reply that has arrived whole, or the asker's error."""
    try:
        message = _read(wire.REPLIES, head)
        call.accept(message, trio.current_time())
    except PeerMisbehavedError as error:
        call.end(error)
        return
    if isinstance(message, ShardFound):
        call.expect(message, len(body))
        if (memory := call.room()) is not None:
            memory[:] = body
        call.arrived(message)
    if not call.missing:
        call.end(message)


def _checked(frame: bytes) -> Request:
    """The request as the peer decodes it. Raises PeerUnavailableError if the peer would close the connection."""
    try:
        return _read(wire.REQUESTS, frame)
    except PeerMisbehavedError as error:
        raise PeerUnavailableError(f"the request is malformed: {error}") from error


def _read(kind: msgspec.msgpack.Decoder[tuple[int, Message]], frame: bytes) -> Message:
    heads = wire.Heads(kind)
    heads.feed(frame)
    head = heads.next()
    assert head is not None
    return head.message
