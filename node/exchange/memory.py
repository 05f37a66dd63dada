"""`Exchange` between members in one process, without sockets: for tests and simulations in virtual time.

Requests and replies are encoded and checked as on the wire, so a message that TLS would refuse fails here too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import trio

from node.config.quantities import HostPort
from node.exchange.contract import Answer, Handler, Heard, Into, Lane
from node.exchange.requests import REQUESTS_PER_CONNECTION, AtWork, Call, answer
from protocol import wire
from protocol.errors import PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.messages import Reply, Request

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
    """A request between two nodes, until its answer arrives."""

    asker: PeerId
    lane: Lane
    call: Call
    size: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ready: bool = False
    """The answer's body is in transit."""

    def cut(self) -> None:
        self.call.end(PeerUnavailableError(f"the connection with {self.call.peer} was closed"))
        self.scope.cancel()


class MemoryExchange:
    """`Exchange` (node/exchange/contract.py) on a `MemoryNetwork`."""

    def __init__(
        self,
        network: MemoryNetwork,
        own: PeerId,
        *,
        refused: Callable[[PeerId], bool],
        handler: Handler,
        requests_per_connection: int = REQUESTS_PER_CONNECTION,
    ) -> None:
        self._network, self._own = network, own
        self._refused, self._handler = refused, handler
        self._slots = defaultdict[tuple[PeerId, Lane], trio.Semaphore](lambda: trio.Semaphore(requests_per_connection))
        self._asked: dict[_Line, None] = {}  # ordered, unlike a set, so that a run can be repeated
        self._answering: dict[_Line, None] = {}
        self._at_work = AtWork[_Line]()
        self._arrivals, self._inbox = trio.open_memory_channel[_Line](math.inf)  # the waiting askers bound it

    async def request(
        self, peer: PeerId, message: Request, *, lane: Lane, silence_s: float, heard: Heard = None, into: Into = None
    ) -> Answer:
        self._network.node(self._own)
        frame = wire.encode_head(0, message, 0)
        call = Call(peer, _checked(frame), silence_s=silence_s, heard=heard, into=into)
        line = _Line(self._own, lane, call, len(frame))
        self._network.node(peer).accept(line)
        self._asked[line] = None
        try:
            return await line.call.wait()
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
                nursery.start_soon(self._at_work.keep_alive, self._say_waiting)
                task_status.started()
                async for line in self._inbox:
                    nursery.start_soon(self._serve, line)
        finally:
            self._network.leave(self._own, self)

    def _say_waiting(self, line: _Line) -> None:
        if self._network.reaches(self._own, line.asker):
            line.call.waiting(line.ready)

    async def _serve(self, line: _Line) -> None:
        with line.scope:
            await self._network.travel(line.asker, self._own, line.size)
            await self._answer(line)
        del self._answering[line]

    async def _answer(self, line: _Line) -> None:
        """Deliver the answer, or the asker's error, once all of it has arrived at the asker."""
        slot = self._slots[line.asker, line.lane]
        await slot.acquire()
        self._at_work.begin(line)
        try:
            try:
                head, body = await answer(self._handler, line.asker, wire.Head(0, line.call.message, 0))
            finally:
                slot.release()
            line.ready = body is not None
            await self._network.travel(self._own, line.asker, len(head) + len(body or b""))
        finally:
            self._at_work.end(line)
        try:
            message = _read(wire.REPLIES, head)
            wire.check_answer(line.call.message, message)
        except PeerMisbehavedError as error:
            line.call.end(error)
        else:
            line.call.deliver(Answer(message, body))


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
