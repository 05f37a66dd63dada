"""Requests between members in one process, for tests and simulations: latency and silence in trio's clock, no sockets.

What is asked and answered passes the wire's encoding and checks, so that nothing works here that would not elsewhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import msgspec
import trio

from node.calls import REQUESTS_PER_CONNECTION, AtWork, Call, answer
from node.exchange import Answer, Handler, Heard, Into, Lane
from protocol import wire
from protocol.errors import PeerMisbehavedError, PeerUnavailableError, ShoalError
from protocol.ids import PeerId
from protocol.messages import Reply, Request

Message = TypeVar("Message", Request, Reply)


class MemoryNetwork:
    """What the exchanges of one simulation share. `latency_s` is that of each way."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self._nodes: dict[PeerId, MemoryExchange] = {}
        self._stopped: dict[PeerId, trio.Event] = {}

    def stop(self, peer: PeerId) -> None:
        """From now on nothing is heard of it, as of a process under SIGSTOP; requests to it wait."""
        self._stopped.setdefault(peer, trio.Event())

    def resume(self, peer: PeerId) -> None:
        if self.is_stopped(peer):
            self._stopped.pop(peer).set()

    def is_stopped(self, peer: PeerId) -> bool:
        return peer in self._stopped

    def kill(self, peer: PeerId) -> None:
        """Its requests fail at once, in both directions, and so does every later one until its exchange runs anew."""
        if peer in self._nodes:
            self.leave(peer, self._nodes[peer])

    def join(self, peer: PeerId, exchange: MemoryExchange) -> None:
        self._nodes[peer] = exchange

    def leave(self, peer: PeerId, exchange: MemoryExchange) -> None:
        if self._nodes.get(peer) is exchange:
            del self._nodes[peer]
        exchange.hang_up()

    def node(self, peer: PeerId) -> MemoryExchange:
        """Raises PeerUnavailableError where nobody runs under that name."""
        if peer not in self._nodes:
            raise PeerUnavailableError(f"{peer} cannot be reached")
        return self._nodes[peer]

    async def travel(self, *ends: PeerId) -> None:
        """One way between two nodes; a stopped one holds up what leaves it and what comes to it."""
        await trio.sleep(self.latency_s)
        for peer in ends:
            while self.is_stopped(peer):
                await self._stopped[peer].wait()


class _Line:
    """A request between two nodes until its answer has come."""

    def __init__(self, asker: PeerId, lane: Lane, call: Call) -> None:
        self.asker = asker
        self.lane = lane
        self.call = call
        self.scope = trio.CancelScope()

    def cut(self) -> None:
        self.call.end(PeerUnavailableError(f"the connection with {self.call.peer} was closed"))
        self.scope.cancel()


class MemoryExchange:
    """`Exchange` on a `MemoryNetwork`; see there for the promises."""

    def __init__(
        self,
        network: MemoryNetwork,
        own: PeerId,
        *,
        refused: Callable[[PeerId], bool],
        handler: Handler,
        requests_per_connection: int = REQUESTS_PER_CONNECTION,
    ) -> None:
        self._network = network
        self._own = own
        self._refused = refused
        self._handler = handler
        self._slots = defaultdict[tuple[PeerId, Lane], trio.Semaphore](lambda: trio.Semaphore(requests_per_connection))
        self._asked: set[_Line] = set()
        self._answering: set[_Line] = set()
        self._at_work = AtWork[_Line]()
        self._arrivals, self._inbox = trio.open_memory_channel[_Line](math.inf)  # what is in it, its askers wait for

    async def request(
        self,
        peer: PeerId,
        message: Request,
        *,
        lane: Lane,
        silence_s: float,
        heard: Heard | None = None,
        into: Into | None = None,
    ) -> Answer:
        self._network.node(self._own)
        line = _Line(self._own, lane, Call(peer, _checked(message), silence_s, heard, into))
        self._network.node(peer).accept(line)
        self._asked.add(line)
        try:
            return await line.call.wait()
        finally:
            self._asked.discard(line)

    def accept(self, line: _Line) -> None:
        """Raises PeerUnavailableError where the asker is refused."""
        if self._refused(line.asker):
            raise PeerUnavailableError(f"{self._own} refuses {line.asker}")
        self._answering.add(line)
        self._arrivals.send_nowait(line)

    def disconnect(self, peer: PeerId) -> None:
        for line in [*self._asked, *self._answering]:
            if peer in (line.asker, line.call.peer):
                line.cut()

    def hang_up(self) -> None:
        for line in [*self._asked, *self._answering]:
            line.cut()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._network.join(self._own, self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._at_work.keep_alive, self._say_waiting)
                task_status.started()
                async for line in self._inbox:
                    nursery.start_soon(self._serve, line)
        finally:
            self._network.leave(self._own, self)

    def _say_waiting(self, line: _Line) -> None:
        if not self._network.is_stopped(self._own) and not self._network.is_stopped(line.asker):
            line.call.waiting(False)

    async def _serve(self, line: _Line) -> None:
        with line.scope:
            await self._network.travel(line.asker, self._own)
            async with self._slots[line.asker, line.lane]:
                result = await self._answer(line)
            await self._network.travel(self._own, line.asker)
            if isinstance(result, Answer):
                line.call.deliver(result)
            else:
                line.call.end(result)
        self._answering.discard(line)

    async def _answer(self, line: _Line) -> Answer | ShoalError:
        request = line.call.message
        self._at_work.begin(line)
        try:
            head, body = await answer(self._handler, line.asker, wire.Head(0, request, 0))
        finally:
            self._at_work.end(line)
        try:
            message = _read(wire.REPLIES, head)
            wire.check_answer(request, message)
        except PeerMisbehavedError as error:
            return error
        return Answer(message, body)


def _checked(message: Request) -> Request:
    """Raises PeerUnavailableError for what a peer would not take, as it would close the connection."""
    try:
        return _read(wire.REQUESTS, wire.encode_head(0, message, 0))
    except PeerMisbehavedError as error:
        raise PeerUnavailableError(f"the request is malformed: {error}") from error


def _read(kind: msgspec.msgpack.Decoder[tuple[int, Message]], frame: bytes) -> Message:
    heads = wire.Heads(kind)
    heads.feed(frame)
    head = heads.next()
    assert head is not None
    return head.message
