"""What both ends of a request do whatever carries it: wait no longer than the silence allows, and always answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import trio

from node.exchange.contract import Answer, Body, Handler, Heard, Into
from protocol import wire
from protocol.errors import (
    BadInputError,
    DeniedError,
    NotFoundError,
    PeerMisbehavedError,
    PeerUnavailableError,
    ShoalError,
    UnavailableError,
)
from protocol.ids import PeerId
from protocol.messages import Failed, Reply, Request

log = logging.getLogger(__name__)

WAITING_FIRST_S = 0.25
"""Most answers take less, and cost no `Waiting`."""
WAITING_EVERY_S = 0.5
"""Half the shortest silence that a caller may sensibly allow."""
STARVED_S = 10.0
"""A request that nothing is heard of for so long has failed, whatever else comes from the peer."""
REQUESTS_PER_CONNECTION = 64
"""At work at once. Beyond it nothing more is read from the connection: the asker's requests queue on its own side."""

Key = TypeVar("Key", bound=Hashable)

_CODES: tuple[tuple[type[ShoalError], str], ...] = (
    (NotFoundError, "not-found"),
    (DeniedError, "denied"),
    (UnavailableError, "unavailable"),
    (PeerUnavailableError, "unavailable"),
    (BadInputError, "bad-request"),
    (PeerMisbehavedError, "bad-request"),
)


def never() -> float:
    """When something came that never did."""
    return -math.inf


class Call:
    """One request on the asking side. Ends with an answer, an error or silence.

    `came` tells when anything last came from the peer: behind a long answer on a slow link nothing of this one can.
    """

    def __init__(
        self, peer: PeerId, message: Request, silence_s: float, heard: Heard | None = None, into: Into | None = None,
        came: Callable[[], float] = never,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.message = message
        self._silence_s = silence_s
        self._heard = heard
        self._came = came
        self._heard_at = trio.current_time()
        self._into = into
        self._body: bytearray | memoryview | None = None
        self._view: memoryview | None = None
        self._ended = trio.Event()
        self._result: Answer | Exception | None = None

    async def wait(self) -> Answer:
        try:
            while not self._ended.is_set() and (until := self._silent_at()) > trio.current_time():
                with trio.move_on_at(until):
                    await self._ended.wait()
        finally:
            if self._result is None:
                self._result = PeerUnavailableError(f"{self.peer} was silent for {self._silence_s} s")
            self._release()
        if isinstance(self._result, Answer):
            return self._result
        # A new error for each asker: one that many tasks raise would gather all their tracebacks.
        raise type(self._result)(*self._result.args) from self._result

    def _silent_at(self) -> float:
        came = min(self._came(), self._heard_at + max(0.0, STARVED_S - self._silence_s))
        return max(self._heard_at, came) + self._silence_s

    def progress(self) -> None:
        """A byte of the answer came."""
        self._heard_at = trio.current_time()

    def waiting(self, ready: bool) -> None:
        """A `Waiting` came, or `ready` the head of the answer."""
        self.progress()
        if self._heard is not None:
            self._heard(ready)

    def expect(self, message: Reply, length: int) -> None:
        """A body of `length` bytes, at least one, begins to come: find memory for it, unless nobody waits any more."""
        if self._result is not None:
            return
        self.waiting(True)
        given = self._into(message) if self._into is not None else None
        if given is not None and given.nbytes != length:
            self.end(ValueError(f"memory of {given.nbytes} bytes for a body of {length}"))
            return
        self._body = bytearray(length) if given is None else given
        self._view = memoryview(self._body).cast("B")

    def room(self) -> memoryview | None:
        """All of the memory for the body; None as soon as nobody waits for it. To be asked anew before each write."""
        return self._view

    def answered(self, message: Reply) -> None:
        """The answer came; its body, where it has one, is in the memory for it."""
        self.end(Answer(message, self._body))

    def deliver(self, answer: Answer) -> None:
        """An answer that is here with all of its body."""
        if answer.body is None or self._into is None:
            if answer.body is not None:
                self.waiting(True)
            self.end(answer)
            return
        self.expect(answer.message, len(answer.body))
        if self._view is not None:
            self._view[:] = answer.body
            self.answered(answer.message)

    def end(self, result: Answer | Exception) -> None:
        """Only the first end counts."""
        if self._result is None:
            self._result = result
            self._release()
            self._ended.set()

    def _release(self) -> None:
        """The memory is the caller's again."""
        self._heard = self._into = self._body = self._view = None


async def answer(handler: Handler, peer: PeerId, request: wire.Head[Request]) -> tuple[bytes, Body | None]:
    """The frame that answers: prefix and header, and the body. `Failed` for every error of the handler."""
    try:
        reply = await handler(peer, request.message)
        head = wire.encode_head(request.request_id, reply.message, len(reply.body or b""))
    except ShoalError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "unavailable")
        failed = Failed(code, str(error)[: wire.MAX_FAILURE_TEXT])
    except Exception:  # the boundary of a task that a peer started: our bug must not end the daemon
        log.exception("answering %s to %s failed", type(request.message).__name__, peer)
        failed = Failed("unavailable", "internal error")
    else:
        return head, reply.body
    return wire.encode_head(request.request_id, failed, 0), None


class AtWork(Generic[Key]):
    """The requests that have no answer yet, and when each is due for its next `Waiting`.

    One task for all of them, which looks after them in even steps and sleeps while there are none: a request that is
    answered quickly costs two entries in a dictionary. After the first `Waiting` those of all requests come at the same
    times, and so travel and are read together.
    """

    def __init__(self, first_s: float = WAITING_FIRST_S, every_s: float = WAITING_EVERY_S) -> None:
        self._first_s = first_s
        self._every_s = every_s
        self._due: dict[Key, float] = {}
        self._busy = trio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def begin(self, key: Key) -> None:
        self._due[key] = trio.current_time() + self._first_s
        self._busy.set()

    def end(self, key: Key) -> None:
        del self._due[key]

    async def keep_alive(self, say: Callable[[Key], None]) -> None:
        """Calls `say` for each request as long as it is at work, half of the first wait too late at most."""
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
