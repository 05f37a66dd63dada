"""Shared work: a stripe's blocks are obtained once, for all that wait for some of them.

It is single flight (node/runtime/single_flight.py) for work with several results. Callers order items; items under way
are shared, and one flow of work begins for the others. Each item goes to its callers by a plain call as it arrives, so
that it is passed on without a switch of tasks. A flow is cancelled when nobody waits for any of its items.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Generic, TypeVar

import trio

from node.runtime.fair_places import Demand, current_demand, working_for
from protocol.errors import UnavailableError

G = TypeVar("G", bound=Hashable)
V = TypeVar("V")


class Flow(Generic[G, V]):
    """Work under way for items of one group. The work calls `deliver` for each item."""

    def __init__(self, shared: SharedWork[G, V], group: G, items: Iterable[int]) -> None:
        self._shared, self.group = shared, group
        self.orders: dict[int, list[Order[G, V]]] = {item: [] for item in items}
        """The items that are still to be delivered, with the orders that wait for each."""
        self.scope = trio.CancelScope()
        self.demand = Demand()

    @property
    def left(self) -> tuple[int, ...]:
        return tuple(self.orders)

    def deliver(self, item: int, value: V) -> None:
        """Give an item to all that wait for it. Only the first call for an item counts."""
        for order in self._take(item):
            order.deliver(item, value)
        if self.orders:
            self.abandon()

    def progress(self) -> None:
        """Tell all that wait that bytes of the items come on."""
        for order in {order for orders in self.orders.values() for order in orders}:
            order.progress()

    def fail(self, error: Exception) -> None:
        """Give up the items that are left."""
        for item in self.left:
            for order in self._take(item):
                order.fail(item, error)

    def abandon(self) -> None:
        """End the work if nobody waits for any of its items."""
        if not any(self.orders.values()):
            self.scope.cancel()
            for item in self.left:
                self._take(item)

    def _take(self, item: int) -> list[Order[G, V]]:
        orders = self.orders.pop(item, [])
        self._shared.forget(self.group, item, self)
        for order in orders:
            order.leave(item)
        return orders


class Order(Generic[G, V]):
    """The items that one caller waits for. `release` must be called at the end; it gives up those that are left."""

    def __init__(
        self,
        came: Callable[[int, V], None],
        lost: Callable[[int, Exception], None] | None,
        progress: Callable[[], None],
        demand: Demand,
    ) -> None:
        self._came, self._lost, self.progress, self._demand = came, lost, progress, demand
        self._flows: dict[int, Flow[G, V]] = {}
        self._ended = trio.Event()
        self._error: Exception | None = None

    def add(self, item: int, flow: Flow[G, V]) -> None:
        if item not in self._flows:
            self._flows[item] = flow
            flow.orders[item].append(self)
            self._demand.support(flow.demand)

    def leave(self, item: int) -> None:
        self._demand.leave(self._flows.pop(item).demand)

    def deliver(self, item: int, value: V) -> None:
        self._came(item, value)
        self._check_end()

    def fail(self, item: int, error: Exception) -> None:
        self._error = self._error or error
        if self._lost is not None:
            self._lost(item, error)
        self._check_end()

    def _check_end(self) -> None:
        if not self._flows:
            self._ended.set()

    async def wait(self) -> None:
        """Wait for the end of all items. Raises the first error."""
        if self._flows:
            await self._ended.wait()
        if self._error is not None:
            # Several orders share the error: the same object raised in several tasks would chain their tracebacks.
            raise type(self._error)(*self._error.args) from self._error

    def drop(self, item: int) -> None:
        """Give up an item, if it is still under way."""
        flow = self._flows.get(item)
        if flow is not None:
            flow.orders[item].remove(self)
            self.leave(item)
            flow.abandon()

    def release(self) -> None:
        for item in list(self._flows):
            self.drop(item)


class SharedWork(Generic[G, V]):
    """An error of the work, even a bug, goes to the orders that wait; other flows continue."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flows: dict[tuple[G, int], Flow[G, V]] = {}

    def __contains__(self, key: tuple[G, int]) -> bool:
        """Whether the item is under way."""
        return key in self._flows

    def order(
        self,
        group: G,
        items: Iterable[int],
        work: Callable[[Flow[G, V]], Awaitable[None]],
        came: Callable[[int, V], None],
        *,
        lost: Callable[[int, Exception], None] | None = None,
        progress: Callable[[], None] = lambda: None,
        demand: Demand | None = None,
    ) -> Order[G, V]:
        """Join the work on `items`. `work` obtains those that are not under way; it begins after this call returned.
        `came` or `lost` is called for each item, `progress` when bytes of some come on. The work is done for the
        clients of `demand`, by default those of this task."""
        order: Order[G, V] = Order(came, lost, progress, demand or current_demand())
        missing = []
        for item in items:
            flow = self._flows.get((group, item))
            if flow is None:
                missing.append(item)
            else:
                order.add(item, flow)
        if missing:
            flow = Flow(self, group, missing)
            for item in missing:
                self._flows[group, item] = flow
                order.add(item, flow)
            self._nursery.start_soon(self._run, flow, work)
        return order

    async def obtain(
        self,
        group: G,
        items: Iterable[int],
        work: Callable[[Flow[G, V]], Awaitable[None]],
        came: Callable[[int, V], None],
        *,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """As `order`, and wait for all items. Raises the first error."""
        order = self.order(group, items, work, came, progress=progress)
        try:
            await order.wait()
        finally:
            order.release()

    def forget(self, group: G, item: int, flow: Flow[G, V]) -> None:
        if self._flows.get((group, item)) is flow:
            del self._flows[group, item]

    async def _run(self, flow: Flow[G, V], work: Callable[[Flow[G, V]], Awaitable[None]]) -> None:
        error: Exception = UnavailableError("the node is stopping")
        try:
            with flow.scope, working_for(flow.demand):
                await work(flow)
                error = UnavailableError("no source has it")
        except Exception as failure:  # noqa: BLE001 - raised again, with the same type, in every task that waits
            error = failure
        finally:
            flow.fail(error)
