"""Places that clients share: by address, then by connection, also through work that several of them wait for."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from node.runtime.fair_places import OWN, Client, Demand, FairPlaces, Wish, current_demand, host_of, working_for
from node.runtime.single_flight import SingleFlight

ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


def wished(places: FairPlaces, *clients: Client) -> Wish:
    """A wish that stays in the queue after its context, as that of a task that waits."""
    demand = Demand(*clients)
    with working_for(demand):
        context = places.asking()
        wish = context.__enter__()
    KEPT.append(context)
    return wish


KEPT: list[object] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    KEPT.clear()


def client_of(wish: Wish) -> Client:
    assert wish.client is not None
    return wish.client


def test_an_address_with_many_connections_leaves_the_next_place_to_another() -> None:
    """S-39"""
    places = FairPlaces(4)
    crowd = [wished(places, Client("10.0.0.1")) for _ in range(100)]
    assert sum(wish.granted.is_set() for wish in crowd) == 4, "alone, it has all places"
    other = wished(places, Client("10.0.0.2"))
    places.give(client_of(crowd[0]))
    assert other.granted.is_set()


def test_a_single_place_goes_round_among_addresses() -> None:
    """S-39"""
    places = FairPlaces(1)
    wishes = [wished(places, Client(address)) for address in ("10.0.0.1", "10.0.0.2") for _ in range(5)]
    order: list[str] = []
    while len(order) < 5:
        (given,) = (wish for wish in wishes if wish.granted.is_set())
        order.append(client_of(given).address)
        wishes.remove(given)
        places.give(client_of(given))
    assert order[1:] == ["10.0.0.1", "10.0.0.2"] * 2, "the first wish came alone"


def test_a_connection_with_many_wishes_leaves_the_next_place_to_another_of_its_address() -> None:
    places, greedy = FairPlaces(4), Client("127.0.0.1")
    many = [wished(places, greedy) for _ in range(100)]
    other = wished(places, Client("127.0.0.1"))
    places.give(greedy)
    assert other.granted.is_set()
    assert sum(wish.granted.is_set() for wish in many) == 4


def test_the_newest_connection_goes_first_when_more_wait_than_there_are_places() -> None:
    places, holder = FairPlaces(2), Client("127.0.0.1")
    for _ in range(2):
        assert places.take_now(holder)
    few = [wished(places, Client("127.0.0.1")) for _ in range(2)]
    places.give(holder)
    assert [wish.granted.is_set() for wish in few] == [True, False], "the oldest, while all soon have a place"
    many = [wished(places, Client("127.0.0.1")) for _ in range(100)]
    places.give(holder)
    assert many[-1].granted.is_set()


def test_an_address_holds_at_most_its_part() -> None:
    """S-39"""
    places = FairPlaces(6, most_each=4)
    crowd = [wished(places, Client("10.0.0.1")) for _ in range(10)]
    assert sum(wish.granted.is_set() for wish in crowd) == 4
    assert wished(places, Client("10.0.0.2")).granted.is_set()


def test_the_queue_leaves_places_to_those_that_do_not_wait() -> None:
    places, quick = FairPlaces(5, most_queued=2), Client("10.0.0.1")
    crowd = [wished(places, Client("10.0.0.1")) for _ in range(10)]
    assert sum(wish.granted.is_set() for wish in crowd) == 2
    assert [places.take_now(quick, leaving=1) for _ in range(3)] == [True, True, False]
    places.give(quick, queued=False)
    assert sum(wish.granted.is_set() for wish in crowd) == 2
    places.give(client_of(crowd[0]))
    assert sum(wish.granted.is_set() for wish in crowd) == 3


@given(
    st.lists(st.tuples(st.sampled_from(ADDRESSES), st.integers(0, 3), st.booleans()), max_size=80), st.integers(1, 5)
)
def test_places_are_all_used_and_never_far_apart(steps: list[tuple[str, int, bool]], total: int) -> None:
    """While anybody waits no place is free, and no waiting address holds fewer places than one that was just served."""
    places, clients = FairPlaces(total), {(a, n): Client(a) for a in ADDRESSES for n in range(4)}
    wishes: list[Wish] = []
    for address, number, gives in steps:
        held = [wish for wish in wishes if wish.client is not None]
        before = set(map(id, held))
        if gives and held:
            wish = held[number % len(held)]
            wishes.remove(wish)
            places.give(client_of(wish))
        else:
            wishes.append(wished(places, clients[address, number]))
        waiting = {wish.demand.first.address for wish in wishes if wish.client is None}
        assert places.free == 0 or not waiting
        count = Counter(client_of(wish).address for wish in wishes if wish.client is not None)
        assert count == places.by_address
        assert places.free == total - count.total() >= 0
        for wish in wishes:
            if wish.client is not None and id(wish) not in before:
                served = wish.client.address
                assert all(count[served] - 1 <= count[other] for other in waiting)


def test_work_takes_the_place_of_the_client_that_is_due_first_even_if_it_came_later() -> None:
    places, busy, idle = FairPlaces(2), Client("10.0.0.1"), Client("10.0.0.2")
    for _ in range(50):
        wished(places, busy)
    shared = wished(places, busy)
    Demand(idle).support(shared.demand)
    places.give(busy)
    assert shared.client is idle


def test_work_that_all_clients_left_is_the_nodes_own_and_still_gets_its_place() -> None:
    places, client = FairPlaces(1), Client("10.0.0.1")
    assert places.take_now(client)
    asker = Demand(client)
    work = wished(places)
    asker.support(work.demand)
    asker.leave(work.demand)
    places.give(client)
    assert work.client is OWN


def test_a_flights_demand_follows_the_tasks_that_wait_for_it_through_nested_flights() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            outer: SingleFlight[str, str] = SingleFlight(nursery)
            inner: SingleFlight[str, str] = SingleFlight(nursery)
            first, second = Client("10.0.0.1"), Client("10.0.0.2")
            demands: list[Demand] = []
            go_on = trio.Event()

            async def work() -> str:
                demands.append(current_demand())
                await go_on.wait()
                return "done"

            async def ask(client: Client) -> None:
                with working_for(Demand(client)):
                    assert await outer.do("key", lambda: inner.do("key", work)) == "done"

            async with trio.open_nursery() as askers:
                askers.start_soon(ask, first)
                await trio.testing.wait_all_tasks_blocked()
                assert set(demands[0].clients) == {first}
                async with trio.open_nursery() as late:
                    late.start_soon(ask, second)
                    await trio.testing.wait_all_tasks_blocked()
                    assert set(demands[0].clients) == {first, second}
                    late.cancel_scope.cancel()
                assert set(demands[0].clients) == {first}
                go_on.set()
            assert len(demands) == 1
            assert set(demands[0].clients) == {OWN}

    trio.run(main)


def test_a_task_that_is_cancelled_leaves_the_queue_and_keeps_no_place() -> None:
    async def main() -> None:
        places = FairPlaces(1)
        async with places.place(), trio.open_nursery() as nursery:

            async def wait() -> None:
                async with places.place():
                    raise AssertionError("there is no place")

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert places.free == 1
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.cancel()
            nursery.start_soon(wait)  # it is granted a place at once, and cancelled before it has it
        assert places.free == 1

    trio.run(main)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
    ],
)
def test_a_host_with_64_bits_of_addresses_counts_once(address: str, host: str) -> None:
    assert host_of(address) == host
