"""Single flight: one piece of work for each key, shared by all tasks that wait for it.

The work runs in a nursery that outlives the waiting tasks: a task that gives up does not end the work for the others,
and the work is cancelled when the last one gives up. Results go to the waiting tasks and are then forgotten. The work
is done for the clients of all tasks that wait (node/runtime/fair_places.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from node.runtime.fair_places import Demand, current_demand, working_for
from protocol.errors import UnavailableError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Flight(Generic[V]):
    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    demand: Demand = field(default_factory=Demand)
    waiting: int = 0
    value: V | None = None
    error: Exception | None = None


class Ticket(Generic[K, V]):
    """One task's share of a flight. `release` gives it up, and must be called, also after `wait`."""

    __slots__ = ("_demand", "_flight", "_flights", "_key", "_released")

    def __init__(self, flights: SingleFlight[K, V], key: K, flight: _Flight[V]) -> None:
        self._flights, self._key, self._flight = flights, key, flight
        self._released = False
        self._demand = current_demand()
        self._demand.support(flight.demand)
        flight.waiting += 1

    async def wait(self) -> V:
        """The result of the work. Raises the error that the work ended with."""
        await self._flight.done.wait()
        error = self._flight.error
        if error is not None:
            # The waiting tasks share the error: the same object raised in several tasks would chain their tracebacks.
            raise type(error)(*error.args) from error
        assert self._flight.value is not None
        return self._flight.value

    @property
    def ended(self) -> bool:
        """Whether `wait` returns at once."""
        return self._flight.done.is_set()

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        self._demand.leave(self._flight.demand)
        self._flight.waiting -= 1
        if not self._flight.waiting and not self._flight.done.is_set():
            self._flights.abandon(self._key, self._flight)


class SingleFlight(Generic[K, V]):
    """An error of the work, even a bug, is raised in the waiting tasks, which log it; other flights continue."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[K, _Flight[V]] = {}

    def join(self, key: K, work: Callable[[], Awaitable[V]]) -> Ticket[K, V]:
        """A ticket for the work under `key`; the work starts unless it runs already."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            self._nursery.start_soon(self._run, key, flight, work)
        return Ticket(self, key, flight)

    def __contains__(self, key: object) -> bool:
        """Whether the work under `key` runs."""
        return key in self._flights

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
        flight.error = UnavailableError("the node is stopping")
        try:
            with flight.scope, working_for(flight.demand):
                flight.value = await work()
                flight.error = None
        except Exception as error:  # noqa: BLE001 - raised again, with the same type, in every task that waits
            flight.error = error
        finally:
            self._forget(key, flight)
            flight.done.set()

    def _forget(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
