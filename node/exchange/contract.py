"""Requests between members: the contract of what carries them.

`node/exchange/tls.py` carries them over mutual TLS; simulations and tests over memory. All implementations run
tests/conformance/test_exchange.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import trio

from protocol.ids import PeerId
from protocol.messages import Reply, Request

Body = bytes | bytearray | memoryview


class Lane(StrEnum):
    """One connection for each, so that one kind of traffic never waits behind another."""

    CONTROL = "control"
    URGENT = "urgent"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply; `body` goes with ShardFound and BlockFound only, and is never altered after it was handed over."""

    message: Reply
    body: Body | None = None


Handler = Callable[[PeerId, Request], Awaitable[Answer]]
"""Answers one request of an authenticated member. Errors of protocol.errors become `Failed`."""

Heard = Callable[[bool], None]
"""Told True where the answer is ready: it is on its way, or waits for its turn on the connection."""

Into = Callable[[Reply], memoryview | None]
"""Where the body that comes with this reply shall go: writable bytes of just its length, or None for fresh memory."""


class Exchange(Protocol):
    """Asks members, and answers them.

    - `request` connects where it must, and returns the reply (also a `Failed`; never a `Waiting`). It raises
      PeerUnavailableError when the peer cannot be reached, its connection breaks, nothing comes on it for `silence_s`,
      or nothing of this request (no `Waiting`, no byte of the answer) for STARVED_S; PeerMisbehavedError when it breaks
      the protocol. `heard` is called for each `Waiting` and at the first byte of the answer's body. A request that is
      cancelled costs the connection nothing: its answer is dropped when it comes. `into` is called at most once, when
      a reply with a body is known and fits the request; the memory that it gives is written to until `request` returns
      or raises, and never after that. It must not raise.
    - `run` listens and answers until it is cancelled; `started()` once it listens. A request whose handler takes
      longer is kept alive with `Waiting`. What one peer does never disturbs another.
    - `disconnect` closes all connections with a peer, and refuses new ones from it while `refused(peer)` says so.
    """

    async def request(
        self,
        peer: PeerId,
        message: Request,
        *,
        lane: Lane,
        silence_s: float,
        heard: Heard | None = None,
        into: Into | None = None,
    ) -> Answer: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def disconnect(self, peer: PeerId) -> None: ...
