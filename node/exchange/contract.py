"""Requests between members: the contract of an exchange.

`node/exchange/tls.py` carries requests over mutual TLS; simulations and tests use `node/exchange/memory.py`. All
implementations run tests/conformance/test_exchange.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Protocol

import trio

from node.config.quantities import HostPort
from protocol.errors import ShoalError
from protocol.ids import Buffer, PeerId
from protocol.messages import Failed, GetShards, Reply, Request, ShardFound


class Lane(StrEnum):
    """Each lane has its own connection, so that one kind of traffic never waits behind another."""

    CONTROL = "control"
    URGENT = "urgent"
    BULK = "bulk"


class State(IntEnum):
    """How far the answering side is with a request. The numbers are those of `Waiting`."""

    WAITING = 0
    """It has nothing of the answer yet."""
    COMING = 1
    """Bytes of the answer arrive there, from the registry or another member."""
    READY = 2
    """It has a part of the answer, which is in transit or queued on the connection."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to a request that has a single answer."""

    message: Reply


class Sender(Protocol):
    """The answering side of a stream. Its handler sends a part for each wanted block, in any order.

    - `send` queues a part, whose bytes never change afterwards. It is synchronous, so that a part that arrives on one
      connection is queued on others without a task switch. What is sent after the end of the stream is dropped: the
      asker closed the connection, or read so slowly that too many bytes waited for it. It raises ValueError if the body
      has not the length that follows from the message.
    - `room` returns once few enough bodies are queued on the connection for one more; at once, and without a
      checkpoint, if they are few already. It raises PeerUnavailableError after the end of the stream.
    - `coming` notes that bytes of the answer arrive here: the next `Waiting` says so.
    - `end` ends the stream with `Failed`, behind the parts that were sent; not if all wanted parts were.
    """

    def send(self, message: ShardFound, body: Buffer) -> None: ...

    async def room(self) -> None: ...

    def coming(self) -> None: ...

    def end(self, error: ShoalError) -> None: ...


Handler = Callable[[PeerId, Request], Awaitable[Answer]]
"""Answers one request of an authenticated member. Errors of protocol.errors become `Failed`."""

Server = Callable[[PeerId, GetShards, Sender], Awaitable[None]]
"""Answers a GetShards. It returns after it sent all wanted parts. If it returns earlier, or with an error of
protocol.errors, the stream ends with `Failed`, behind the parts that it sent. Its Sender is of no use afterwards."""

AtOnce = Callable[[PeerId, GetShards, Sender], bool]
"""Answers a GetShards without a task, if it can. It returns True if it sent all parts, or has the rest of them sent
later by whoever receives them, who then also has to `end` the stream if they do not come. Else it sends nothing and
returns False, and the Server is called. It is called while there is `room`, by the task that reads the connection, so
it must not take long."""

Heard = Callable[[State], None] | None
"""Called when the answering side says how far it is, and with READY before each part is read."""

Part = Callable[[ShardFound, Buffer], None]
"""Receives each part of a stream and its body. It is synchronous, and must not take long: the connection is read by the
same task. PeerMisbehavedError, the only error that it may raise, ends the stream."""

Into = Callable[[ShardFound], memoryview | None] | None
"""Returns memory for the body of a part: writable bytes of exactly its length, or None for fresh memory."""


class Exchange(Protocol):
    """Makes requests to members, and answers theirs.

    - `request` makes a request that has a single answer. It connects if necessary, and returns the answer (also a
      `Failed`; never a `Waiting`). It raises PeerUnavailableError if the peer cannot be reached, its connection breaks,
      nothing arrives for `silence_s`, or nothing of this request (no byte of the answer, no `Waiting` that lists it)
      for STARVED_S; PeerMisbehavedError if the peer breaks the protocol. A cancelled request does not harm the
      connection: its answer is dropped when it arrives.
    - `stream` makes a GetShards. `part` is called for each wanted block once, in the order of arrival; then `stream`
      returns None. It returns `Failed` if the peer sends that instead of a part, and raises as `request`. If `part`
      raises PeerMisbehavedError, `stream` raises it, and the connection lives on. `into` is called at most once for a
      part, and must not raise. Its memory is written to until `part` is called with it or `stream` ends, and never
      after that. After the end, neither is called: late parts are dropped.
    - `run` listens and answers until it is cancelled; it calls `started()` once it listens. Requests that take longer
      are kept alive with `Waiting`. A peer never disturbs the requests of another.
    - `reached`: the address at which the peer was last reached and proved who it is; None if it was not, or long ago.
    - `disconnect` closes all connections with a peer. New ones from it are refused while `refused(peer)` is true.
    """

    async def request(
        self, peer: PeerId, message: Request, *, lane: Lane, silence_s: float, heard: Heard = None
    ) -> Answer: ...

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
    ) -> Failed | None: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def reached(self, peer: PeerId) -> HostPort | None: ...

    def disconnect(self, peer: PeerId) -> None: ...
