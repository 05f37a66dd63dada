"""One piece of work for each key, however many wait for it.

The work runs in a nursery that outlives those who wait: the first one to give up does not take it from the others, and
when the last one gives up it is cancelled. Results are handed to those who waited and then forgotten.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import outcome
import trio

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Flight(Generic[V]):
    __slots__ = ("done", "result", "scope", "waiting")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.waiting = 0
        self.result: outcome.Outcome[V] | None = None


class Ticket(Generic[K, V]):
    """A place in a flight. `release` gives it back; it must be called once, also after `wait`."""

    __slots__ = ("_flight", "_flights", "_key", "_released")

    def __init__(self, flights: SingleFlight[K, V], key: K, flight: _Flight[V]) -> None:
        self._flights, self._key, self._flight = flights, key, flight
        self._released = False
        flight.waiting += 1

    async def wait(self) -> V:
        """The result, or the error that the work ended with."""
        await self._flight.done.wait()
        assert self._flight.result is not None
        # The error is shared by all who wait: raising the one object in several tasks would chain their tracebacks.
        if isinstance(self._flight.result, outcome.Error):
            error = self._flight.result.error
            raise type(error)(*error.args) from error
        return self._flight.result.unwrap()

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        self._flight.waiting -= 1
        if not self._flight.waiting and not self._flight.done.is_set():
            self._flights.abandon(self._key, self._flight)


class SingleFlight(Generic[K, V]):
    """`errors` are those that the work may end with; anything else is a bug and ends the nursery."""

    def __init__(self, nursery: trio.Nursery, errors: tuple[type[Exception], ...]) -> None:
        self._nursery, self._errors = nursery, errors
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    def join(self, key: K, work: Callable[[], Awaitable[V]]) -> Ticket[K, V]:
        """A ticket for the work under `key`, which is started where it does not run yet."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            self._nursery.start_soon(self._run, key, flight, work)
        return Ticket(self, key, flight)

    async def do(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        ticket = self.join(key, work)
        try:
            return await ticket.wait()
        finally:
            ticket.release()

    def abandon(self, key: K, flight: _Flight[V]) -> None:
        flight.scope.cancel()
        self._forget(key, flight)

    async def _run(self, key: K, flight: _Flight[V], work: Callable[[], Awaitable[V]]) -> None:
        with flight.scope:
            try:
                flight.result = outcome.Value(await work())
            except self._errors as error:
                flight.result = outcome.Error(error)
            finally:
                self._forget(key, flight)
                if flight.result is None:
                    flight.result = outcome.Error(trio.ClosedResourceError("the work was cancelled"))
                flight.done.set()

    def _forget(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
