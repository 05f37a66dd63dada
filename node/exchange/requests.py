"""Both ends of a request, independent of the transport.

The asking side cannot see whether a peer works or is dead, only when it last received something. So a request has no
deadline: it ends after a silence. The answering side always answers, and sends `Waiting` while it works.

An exchange needs its handler when it is built, and the parts that answer need the exchange. So the handler is a
`Dispatcher`, built first; it gets its routes while the node is assembled, before the exchange answers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Generic, TypeVar

import trio

from node.exchange.contract import Answer, Handler, Heard, Into
from node.runtime.fair_places import Asker, Demand, working_for
from protocol import errors, wire
from protocol.ids import Buffer, PeerId
from protocol.messages import Failed, GetShard, Reply, Request

log = logging.getLogger(__name__)

WAITING_FIRST_S = 0.25
"""Most answers take less time than this, and need no `Waiting`."""
WAITING_EVERY_S = 0.5
"""Half of the shortest `silence_s` that is sensible for a caller."""
STARVED_S = 10.0
"""A request fails if nothing of it arrives for this time, whatever else the peer sends."""
REQUESTS_PER_CONNECTION = 64
"""Unanswered requests at once. Beyond it the connection is not read: further requests queue at the asker."""

Key = TypeVar("Key", bound=Hashable)

_CODES: tuple[tuple[type[errors.ShoalError], str], ...] = (  # all others: "unavailable"
    (errors.NotFoundError, "not-found"),
    (errors.DeniedError, "denied"),
    (errors.BadInputError, "bad-request"),
    (errors.PeerMisbehavedError, "bad-request"),
)


@dataclass(eq=False)
class Call:
    """One request on the asking side. Ends with an answer, an error or silence.

    `came` returns when the peer last sent a byte. None: other bytes of the peer are no sign of life for this request.
    They are one if this request's answer may have to wait behind a long answer on a slow link.
    """

    peer: PeerId
    message: Request
    _: KW_ONLY
    silence_s: float
    heard: Heard
    into: Into
    came: Callable[[], float] | None = None
    _heard_at: float = field(default_factory=trio.current_time, init=False)
    _body: bytearray | memoryview | None = field(default=None, init=False)
    _view: memoryview | None = field(default=None, init=False)
    _ended: trio.Event = field(default_factory=trio.Event, init=False)
    _result: Answer | Exception | None = field(default=None, init=False)

    async def wait(self) -> Answer:
        try:
            while not self._ended.is_set() and (until := self._silent_at()) > trio.current_time():
                with trio.move_on_at(until):
                    await self._ended.wait()
        finally:
            if self._result is None:
                self._result = errors.PeerUnavailableError(f"{self.peer} was silent for {self.silence_s} s")
            self._release()
        if isinstance(self._result, Answer):
            return self._result
        # A new error for each asker: an error that many tasks raise would gather the tracebacks of all.
        raise type(self._result)(*self._result.args) from self._result

    def _silent_at(self) -> float:
        if self.came is None:
            return self._heard_at + self.silence_s
        came = min(self.came(), self._heard_at + max(0.0, STARVED_S - self.silence_s))
        return max(self._heard_at, came) + self.silence_s

    def progress(self) -> None:
        """Note that a part of the answer arrived."""
        self._heard_at = trio.current_time()

    def waiting(self, ready: bool) -> None:
        """Note that a `Waiting` arrived, or the head of an answer with a body."""
        self.progress()
        if self.heard is not None:
            self.heard(ready)

    def expect(self, message: Reply, length: int) -> None:
        """A body of `length` bytes (at least 1) follows: get memory for it, if this call has not ended."""
        if self._result is not None:
            return
        self.waiting(True)
        given = self.into(message) if self.into is not None else None
        if given is not None and given.nbytes != length:
            self.end(ValueError(f"memory of {given.nbytes} bytes for a body of {length}"))
            return
        self._body = bytearray(length) if given is None else given
        self._view = memoryview(self._body).cast("B")

    def room(self) -> memoryview | None:
        """The memory for the whole body; None once this call has ended. Callers must ask again before each write."""
        return self._view

    def answered(self, message: Reply) -> None:
        """End with this answer, whose body, if it has one, was read into `room`."""
        self.end(Answer(message, self._body))

    def deliver(self, answer: Answer) -> None:
        """End with this answer, whose body is in `answer` and not yet in the caller's memory."""
        if answer.body is None or self.into is None:
            if answer.body is not None:
                self.waiting(True)
            self.end(answer)
            return
        self.expect(answer.message, len(answer.body))
        if self._view is not None:
            self._view[:] = answer.body
            self.answered(answer.message)

    def end(self, result: Answer | Exception) -> None:
        """Only the first call counts."""
        if self._result is None:
            self._result = result
            self._release()
            self._ended.set()

    def _release(self) -> None:
        """Give the memory back to the caller."""
        self.heard = self.into = self._body = self._view = None


class Dispatcher:
    """The handler of an exchange: the type of a request names the part that answers it."""

    def __init__(self) -> None:
        self._handlers: dict[type, Callable[[PeerId, Any], Awaitable[Answer]]] = {}

    def route(self, handler: Callable[[PeerId, Any], Awaitable[Answer]], *requests: type) -> None:
        """Have `handler` answer these types of request."""
        self._handlers.update(dict.fromkeys(requests, handler))

    async def __call__(self, peer: PeerId, request: Request) -> Answer:
        handler = self._handlers.get(type(request))
        if handler is None:
            return Answer(Failed("bad-request", f"no part of this node answers {type(request).__name__}"))
        passed_for = request.asker if isinstance(request, GetShard) else ""
        with working_for(Demand(Asker(peer, passed_for))):  # its requests to a registry take turns with clients'
            return await handler(peer, request)


async def answer(handler: Handler, peer: PeerId, request: wire.Head[Request]) -> tuple[bytes, Buffer | None]:
    """The frame of the answer: prefix and header, and the body. `Failed` for every error of the handler."""
    try:
        reply = await handler(peer, request.message)
        head = wire.encode_head(request.request_id, reply.message, len(reply.body or b""))
    except errors.ShoalError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "unavailable")
        failed = Failed(code, str(error)[: wire.MAX_FAILURE_TEXT])
    except Exception:  # the boundary of a task that a peer started: a bug here must not end the daemon
        log.exception("answering %s to %s failed", type(request.message).__name__, peer)
        failed = Failed("unavailable", "internal error")
    else:
        return head, reply.body
    return wire.encode_head(request.request_id, failed, 0), None


class AtWork(Generic[Key]):
    """The unanswered requests, and when each is due for its next `Waiting`.

    One task serves all in even steps and sleeps while there are none: a quick answer costs two dictionary operations.
    After their first `Waiting`, all requests are due at the same times, so that their frames are sent together.
    """

    def __init__(self, first_s: float = WAITING_FIRST_S, every_s: float = WAITING_EVERY_S) -> None:
        self._first_s = first_s
        self._every_s = every_s
        self._due: dict[Key, float] = {}
        self._busy = trio.Event()

    def begin(self, key: Key) -> None:
        self._due[key] = trio.current_time() + self._first_s
        self._busy.set()

    def end(self, key: Key) -> None:
        del self._due[key]

    async def keep_alive(self, say: Callable[[Key], None]) -> None:
        """Call `say` for each unanswered request when it is due, or at most half of `first_s` later."""
        while True:
            await self._busy.wait()
            while self._due:
                now = trio.current_time()
                together = now + self._every_s - now % self._every_s
                for key in [key for key, due in self._due.items() if due <= now]:
                    self._due[key] = together
                    say(key)
                await trio.sleep(self._first_s / 2)
            self._busy = trio.Event()
