"""Requests between members: the contract of an exchange.

`node/exchange/tls.py` carries requests over mutual TLS; simulations and tests use `node/exchange/memory.py`. All
implementations run tests/conformance/test_exchange.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import trio

from node.config.quantities import HostPort
from protocol.ids import Buffer, PeerId
from protocol.messages import Reply, Request


class Lane(StrEnum):
    """Each lane has its own connection, so that one kind of traffic never waits behind another."""

    CONTROL = "control"
    URGENT = "urgent"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply. Only ShardFound and BlockFound have a `body`. Its bytes never change after the handler returned them."""

    message: Reply
    body: Buffer | None = None


Handler = Callable[[PeerId, Request], Awaitable[Answer]]
"""Answers one request of an authenticated member. Errors of protocol.errors become `Failed`."""

Heard = Callable[[bool], None] | None
"""Called with True if the answer is ready (in transit, or queued on the peer's connection), else with False."""

Into = Callable[[Reply], memoryview | None] | None
"""Returns memory for the body of a reply: writable bytes of exactly the body's length, or None for fresh memory."""


class Exchange(Protocol):
    """Makes requests to members, and answers theirs.

    - `request` connects if necessary, and returns the reply (also a `Failed`; never a `Waiting`). It raises
      PeerUnavailableError if the peer cannot be reached, its connection breaks, nothing arrives for `silence_s`, or
      nothing of this request (no `Waiting`, no byte of the answer) for STARVED_S; PeerMisbehavedError if the peer
      breaks the protocol. `heard` is called for each `Waiting` and before the answer's body is read. A cancelled
      request does not harm the connection: its answer is dropped when it arrives. `into` is called at most once, when
      a reply with a body arrives that fits the request. Its memory is written to until `request` returns or raises,
      and never after that. It must not raise.
    - `run` listens and answers until it is cancelled; it calls `started()` once it listens. A request whose handler
      takes longer is kept alive with `Waiting`. A peer never disturbs the requests of another.
    - `reached`: the address at which the peer was last reached and proved who it is; None if it was not, or long ago.
    - `disconnect` closes all connections with a peer. New ones from it are refused while `refused(peer)` is true.
    """

    async def request(
        self, peer: PeerId, message: Request, *, lane: Lane, silence_s: float, heard: Heard = None, into: Into = None
    ) -> Answer: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def reached(self, peer: PeerId) -> HostPort | None: ...

    def disconnect(self, peer: PeerId) -> None: ...
