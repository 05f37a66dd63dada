"""Shared work: every item is obtained once for all that wait for it, and nothing runs that nobody waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from node.runtime.fair_places import OWN, Client, Demand, current_demand, working_for
from node.runtime.shared_work import Flow, Order, SharedWork
from protocol.errors import UnavailableError


class Site:
    """Shared work on items of group "a". `flows` has every flow that began; the test delivers their items."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.shared: SharedWork[str, str] = SharedWork(nursery)
        self.flows: list[Flow[str, str]] = []
        self.over = trio.Event()
        """The flows return once it is set."""
        self.ended = 0

    async def work(self, flow: Flow[str, str]) -> None:
        self.flows.append(flow)
        try:
            await self.over.wait()
        finally:
            self.ended += 1

    def flow_of(self, item: int) -> Flow[str, str]:
        return next(flow for flow in self.flows if item in flow.left)

    def order(self, *items: int, **more: object) -> Caller:
        return Caller(self, items, more)


class Caller:
    """One order, and what it received."""

    def __init__(self, site: Site, items: tuple[int, ...], more: dict[str, object]) -> None:
        self.got: dict[int, str] = {}
        self.lost: dict[int, Exception] = {}
        self.heard = 0
        self.order: Order[str, str] = site.shared.order(
            "a",
            items,
            site.work,
            self._got,
            lost=self.lost.__setitem__,
            progress=self._heard,
            **more,  # type: ignore[arg-type]
        )

    def _got(self, item: int, value: str) -> None:
        assert item not in self.got
        self.got[item] = value

    def _heard(self) -> None:
        self.heard += 1

    async def ended(self) -> dict[int, str]:
        await self.order.wait()
        self.order.release()
        return self.got


def play(scenario: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                await scenario(Site(nursery))
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


def test_an_order_joins_the_items_under_way_and_begins_the_others() -> None:
    async def scenario(site: Site) -> None:
        one, two = site.order(1, 2, 3), site.order(2, 3, 4)
        await settled()
        first, second = site.flow_of(1), site.flow_of(4)
        assert (first.left, second.left) == ((1, 2, 3), (4,))
        assert ("a", 2) in site.shared
        assert ("b", 2) not in site.shared
        first.progress()
        assert (one.heard, two.heard) == (1, 1)
        second.progress()
        assert (one.heard, two.heard) == (1, 2)
        for item in (3, 1, 2):
            first.deliver(item, f"block {item}")
        assert await one.ended() == {1: "block 1", 2: "block 2", 3: "block 3"}
        assert two.got == {2: "block 2", 3: "block 3"}
        second.deliver(4, "block 4")
        second.deliver(4, "again")
        assert await two.ended() == {2: "block 2", 3: "block 3", 4: "block 4"}
        assert ("a", 2) not in site.shared
        site.order(2)
        await settled()
        assert len(site.flows) == 3, "what was delivered is forgotten"

    play(scenario)


def test_an_item_goes_to_all_that_wait_in_one_plain_call() -> None:
    async def scenario(site: Site) -> None:
        callers = [site.order(1) for _ in range(3)]
        await settled()
        site.flows[0].deliver(1, "block")
        assert [caller.got for caller in callers] == [{1: "block"}] * 3
        assert not site.ended, "its flow may have more to do"

    play(scenario)


@pytest.mark.parametrize("failure", [UnavailableError("no source"), ZeroDivisionError("a bug")])
def test_an_error_ends_the_items_that_are_left(failure: Exception) -> None:
    async def scenario(site: Site) -> None:
        async def work(flow: Flow[str, str]) -> None:
            flow.deliver(1, "block")
            await settled()
            raise failure

        orders = [Caller(site, (), {}) for _ in range(2)]
        for caller in orders:
            caller.order = site.shared.order("a", (1, 2), work, caller._got, lost=caller.lost.__setitem__)  # noqa: SLF001
        for caller in orders:
            with pytest.raises(type(failure), match=str(failure)) as raised:
                await caller.order.wait()
            assert raised.value.__cause__ is failure, "each has an exception of its own"
            assert (caller.got, caller.lost) == ({1: "block"}, {2: failure})
        assert ("a", 2) not in site.shared

    play(scenario)


def test_items_that_the_work_does_not_deliver_are_lost() -> None:
    async def scenario(site: Site) -> None:
        caller = site.order(1, 2)
        site.over.set()
        with pytest.raises(UnavailableError):
            await caller.order.wait()
        assert list(caller.lost) == [1, 2]

    play(scenario)


def test_work_goes_on_while_somebody_waits_for_any_of_its_items() -> None:
    async def scenario(site: Site) -> None:
        one, two = site.order(1, 2, 3), site.order(2)
        await settled()
        one.order.release()
        await settled()
        assert not site.ended
        assert site.flows[0].left == (1, 2, 3), "it may bring what nobody waits for"
        site.flows[0].deliver(1, "block 1")
        two.order.drop(2)
        two.order.drop(2)
        assert ("a", 2) not in site.shared
        await settled()
        assert site.ended == 1
        assert not one.got
        site.order(1, 2)
        await settled()
        assert len(site.flows) == 2, "a new order begins anew"

    play(scenario)


def test_work_ends_once_nobody_waits_for_what_is_left() -> None:
    async def scenario(site: Site) -> None:
        caller = site.order(1, 2)
        await settled()
        caller.order.drop(2)
        site.flows[0].deliver(1, "block")
        await settled()
        assert site.ended == 1
        assert ("a", 2) not in site.shared

    play(scenario)


def test_a_cancelled_nursery_loses_all_items() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            caller = Site(nursery).order(1, 2)
            await settled()
            nursery.cancel_scope.cancel()
        assert list(caller.lost) == [1, 2]

    trio.run(main)


def test_the_work_is_done_for_the_clients_of_all_that_wait() -> None:
    async def scenario(site: Site) -> None:
        clients = Client("10.0.0.1"), Client("10.0.0.2"), Client("10.0.0.3")
        one, two = site.order(1, 2, demand=Demand(clients[0])), site.order(2, demand=Demand(clients[1]))
        with working_for(Demand(clients[2])):
            three = site.order(2, 3)
        await settled()
        first, second = site.flow_of(1), site.flow_of(3)
        assert set(first.demand.clients) == set(clients)
        assert set(second.demand.clients) == {clients[2]}
        first.deliver(2, "block 2")
        assert set(first.demand.clients) == {clients[0]}, "the others wait for nothing else of it"
        assert two.got == three.got == {2: "block 2"}
        one.order.release()
        assert set(first.demand.clients) == {OWN}

    play(scenario)


def test_work_that_the_work_orders_is_for_the_same_clients() -> None:
    async def scenario(site: Site) -> None:
        client = Client("10.0.0.1")
        demands: list[Demand] = []

        async def inner(flow: Flow[str, str]) -> None:
            demands.append(current_demand())
            await trio.sleep_forever()

        async def outer(flow: Flow[str, str]) -> None:
            await site.shared.obtain("inner", (1,), inner, flow.deliver)

        site.shared.order("outer", (1,), outer, lambda item, value: None)
        await settled()
        site.shared.order("outer", (1,), outer, lambda item, value: None, demand=Demand(client))
        assert list(demands[0].clients) == [client]

    play(scenario)


ITEMS = range(3)
EVENTS = st.one_of(
    st.tuples(st.just("order"), st.sets(st.sampled_from(ITEMS), min_size=1)),
    st.tuples(st.sampled_from(("deliver", "fail", "release")), st.integers(0, 3)),
    st.tuples(st.just("drop"), st.tuples(st.integers(0, 3), st.sampled_from(ITEMS))),
)


@settings(max_examples=300)
@given(st.lists(EVENTS, max_size=20))
def test_in_any_order_of_events_each_item_is_under_way_once_and_reaches_exactly_those_that_wait(
    events: list[tuple[str, object]],
) -> None:
    async def scenario(site: Site) -> None:
        callers: list[tuple[Caller, set[int]]] = []
        """Each with the items that it waits for."""
        for event, what in events:
            live = [flow for flow in site.flows if flow.left]
            match event, what:
                case "order", set(items):
                    callers.append((site.order(*sorted(items)), set(items)))
                case "deliver", int(number) if live:
                    flow = live[number % len(live)]
                    item = flow.left[number % len(flow.left)]
                    waiting = [pair for pair in callers if item in pair[1]]
                    flow.deliver(item, "block")
                    for caller, left in waiting:
                        left.remove(item)
                        assert caller.got.pop(item) == "block"
                case "fail", int(number) if live:
                    flow = live[number % len(live)]
                    items, error = flow.left, UnavailableError("no source")
                    flow.fail(error)
                    for caller, left in callers:
                        assert caller.lost == dict.fromkeys(left & set(items), error)
                        left -= set(items)
                        caller.lost.clear()
                case "release", int(number) if callers:
                    caller, left = callers[number % len(callers)]
                    caller.order.release()
                    left.clear()
                case "drop", (int(number), int(item)) if callers:
                    caller, left = callers[number % len(callers)]
                    caller.order.drop(item)
                    left.discard(item)
            await settled()
            assert not any(caller.got or caller.lost for caller, _ in callers), "nothing but what was waited for"
            under_way = Counter(item for flow in site.flows for item in flow.left)
            assert all(count == 1 for count in under_way.values())
            assert under_way.keys() == {item for item in ITEMS if ("a", item) in site.shared}
            wanted = {item for _, left in callers for item in left}
            assert wanted <= under_way.keys()
            assert all(wanted & set(flow.left) for flow in site.flows if flow.left), "no flow is for nobody"
        site.over.set()
        for caller, left in callers:
            if left:
                with pytest.raises(UnavailableError):
                    await caller.order.wait()

    play(scenario)
