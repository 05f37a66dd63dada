"""Both ends of a request, independent of the transport.

The asking side cannot see whether a peer works or is dead, only when it last received something. So a request has no
deadline: it ends after a silence. The answering side always answers, and sends `Waiting` while it works.

An exchange needs its handlers when it is built, and the parts that answer need the exchange. So the handlers are a
`Dispatcher`, built first; it gets its routes while the node is assembled, before the exchange answers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import trio

from node.exchange.contract import Answer, AtOnce, Handler, Heard, Into, Part, Sender, Server, State
from node.runtime.fair_places import Asker, Demand, working_for
from protocol import errors, wire
from protocol.ids import PeerId
from protocol.messages import Failed, GetShards, Reply, Request, ShardFound

log = logging.getLogger(__name__)

STARVED_S = 10.0
"""A request fails if nothing of it arrives for this time, whatever else the peer sends."""
REQUESTS_PER_CONNECTION = 64
"""Unanswered requests at once. Beyond it the connection is not read: further requests queue at the asker."""
ROOM_BYTES = 512 << 10
"""A stream has room for one more body while fewer bytes of bodies are queued on its connection. So a fast link never
waits for a handler, and a slow one does not fill the memory."""

_CODES: tuple[tuple[type[errors.ShoalError], str], ...] = (  # all others: "unavailable"
    (errors.NotFoundError, "not-found"),
    (errors.DeniedError, "denied"),
    (errors.BadInputError, "bad-request"),
    (errors.PeerMisbehavedError, "bad-request"),
)


@dataclass(eq=False)
class Call:
    """One request on the asking side. Ends with its last reply, an error or silence.

    `came` returns when the peer last sent a byte. None: other bytes of the peer are no sign of life for this request.
    They are one if this request's answer may have to wait behind a long answer on a slow link.
    """

    peer: PeerId
    message: Request
    _: KW_ONLY
    silence_s: float
    heard: Heard = None
    part: Part | None = None
    into: Into = None
    came: Callable[[], float] | None = None
    missing: int = field(init=False)
    """The parts that did not come yet, as bits; 0 for a request with a single answer."""
    _heard_at: float = field(default_factory=trio.current_time, init=False)
    _body: bytearray | memoryview | None = field(default=None, init=False)
    _view: memoryview | None = field(default=None, init=False)
    _ended: trio.Event = field(default_factory=trio.Event, init=False)
    _result: Reply | Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.missing = wire.parts_of(self.message)

    async def wait(self) -> Reply:
        try:
            while not self._ended.is_set() and (until := self._silent_at()) > trio.current_time():
                with trio.move_on_at(until):
                    await self._ended.wait()
        finally:
            if self._result is None:
                self._result = errors.PeerUnavailableError(f"{self.peer} was silent for {self.silence_s} s")
            self._release()
        if isinstance(self._result, errors.ShoalError):
            # A new error for each asker: an error that many tasks raise would gather the tracebacks of all.
            raise type(self._result)(*self._result.args) from self._result
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def _silent_at(self) -> float:
        if self.came is None:
            return self._heard_at + self.silence_s
        came = min(self.came(), self._heard_at + max(0.0, STARVED_S - self.silence_s))
        return max(self._heard_at, came) + self.silence_s

    def progress(self, now: float) -> None:
        """Note that bytes of the answer arrived."""
        self._heard_at = now

    def waiting(self, state: State, now: float) -> None:
        """Note that a `Waiting` lists this request."""
        self._heard_at = now
        if self.heard is not None:
            self.heard(state)

    def accept(self, message: Reply, now: float) -> None:
        """Note a reply, or the head of a part. Raises PeerMisbehavedError if it does not answer the request."""
        self.missing = wire.check_answer(self.message, message, self.missing)
        self._heard_at = now

    def expect(self, message: ShardFound, length: int) -> None:
        """A body of `length` bytes (at least 1) follows: get memory for it, if this call has not ended."""
        if self._result is not None:
            return
        if self.heard is not None:
            self.heard(State.READY)
        given = self.into(message) if self.into is not None else None
        if given is not None and given.nbytes != length:
            self.end(ValueError(f"memory of {given.nbytes} bytes for a body of {length}"))
            return
        self._body = bytearray(length) if given is None else given
        self._view = memoryview(self._body).cast("B")

    def room(self) -> memoryview | None:
        """The memory for the whole body; None once this call has ended. Callers must ask again before each write."""
        return self._view

    def arrived(self, message: ShardFound) -> None:
        """The body of this part was read into `room`."""
        body, self._body, self._view = self._body, None, None
        if self._result is not None or self.part is None or body is None:
            return
        try:
            self.part(message, body)
        except errors.PeerMisbehavedError as error:
            self.end(error)
        except Exception as error:  # a bug must not end the task that reads the connection
            log.exception("a part from %s was not taken", self.peer)
            self.end(error)

    def end(self, result: Reply | Exception) -> None:
        """Only the first call counts."""
        if self._result is None:
            self._result = result
            self._release()
            self._ended.set()

    def _release(self) -> None:
        """Give the memory back to the caller."""
        self.heard = self.part = self.into = self._body = self._view = None


class Dispatcher:
    """The handlers of an exchange: the type of a request names the part that answers it."""

    def __init__(self) -> None:
        self._handlers: dict[type, Callable[[PeerId, Any], Awaitable[Answer]]] = {}
        self._server: Server = serve_nothing
        self._at_once: AtOnce = nothing_at_once

    def route(self, handler: Callable[[PeerId, Any], Awaitable[Answer]], *requests: type) -> None:
        """Have `handler` answer these types of request."""
        self._handlers.update(dict.fromkeys(requests, handler))

    def serve(self, server: Server, at_once: AtOnce | None = None) -> None:
        """Have these answer the requests that are answered by streams."""
        self._server, self._at_once = server, at_once or nothing_at_once

    async def __call__(self, peer: PeerId, request: Request) -> Answer:
        handler = self._handlers.get(type(request))
        if handler is None:
            return Answer(Failed("bad-request", f"no part of this node answers {type(request).__name__}"))
        with working_for(Demand(Asker(peer))):  # its requests to a registry take turns with clients'
            return await handler(peer, request)

    async def stream(self, peer: PeerId, request: GetShards, sender: Sender) -> None:
        with working_for(Demand(Asker(peer, request.asker))):
            await self._server(peer, request, sender)

    def at_once(self, peer: PeerId, request: GetShards, sender: Sender) -> bool:
        return self._at_once(peer, request, sender)


async def serve_nothing(peer: PeerId, request: GetShards, sender: Sender) -> None:
    """The Server of a node that holds no blocks."""


def nothing_at_once(peer: PeerId, request: GetShards, sender: Sender) -> bool:
    return False


async def answer(handler: Handler, peer: PeerId, request: wire.Head[Request]) -> bytes:
    """The frame of the answer: `Failed` for every error of the handler."""
    message: Reply
    try:
        message = (await handler(peer, request.message)).message
        return wire.encode_head(request.request_id, message, 0)
    except errors.ShoalError as error:
        message = failure(error)
    except Exception:  # the boundary of a task that a peer started: a bug here must not end the daemon
        log.exception("answering %s to %s failed", type(request.message).__name__, peer)
        message = _BUG
    return wire.encode_head(request.request_id, message, 0)


async def serve(server: Server, peer: PeerId, request: GetShards, sender: Sender) -> Failed:
    """Have `server` send the parts. Returns the end of the stream if not all wanted parts were sent."""
    try:
        await server(peer, request, sender)
    except errors.ShoalError as error:
        return failure(error)
    except Exception:  # as in `answer`
        log.exception("answering %s to %s failed", type(request).__name__, peer)
        return _BUG
    return Failed("not-held", "not held")


def serve_at_once(at_once: AtOnce, peer: PeerId, request: GetShards, sender: Sender) -> bool:
    """Whether nothing is left to do. If not, `serve` has to be called."""
    try:
        return at_once(peer, request, sender)
    except errors.ShoalError as error:
        sender.end(error)
    except Exception:  # as in `answer`
        log.exception("answering %s to %s failed", type(request).__name__, peer)
        sender.end(errors.UnavailableError(_BUG.text))
    return True


_BUG = Failed("unavailable", "internal error")


def failure(error: errors.ShoalError) -> Failed:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "unavailable")
    return Failed(code, str(error)[: wire.MAX_FAILURE_TEXT])
