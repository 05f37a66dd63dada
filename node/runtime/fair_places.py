"""Places for work, shared fairly by the clients for whom the work is done: first by address, then by connection.

A free place goes to the waiting address that holds the fewest places, and within it to the connection that holds the
fewest; equals take turns. A client that alone wants places gets all of them, and one that asks for much waits behind
its own work only.
All programs of a machine have one address. If more of its connections wait than there are places, the newest goes
first, because the oldest clients may have given up ("adaptive LIFO": Maurer, "Fail at Scale", ACM Queue 2015).
node/exchange/fair_shares.py shares bytes, whose takers cannot wait in a queue.

Work that several clients wait for (node/runtime/single_flight.py) is done for all of them: it takes the place of
whichever is due first, so that a client is never behind another's queue because that one asked for the same thing
before. Which clients a task works for is in its context, and tasks that it starts inherit it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from ipaddress import IPv6Address, ip_address
from typing import TypeVar

import trio

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


class Client:
    """A connection. `address`: the host's, or the part of it that one host can have to itself (`host_of`).

    `cut` ends the connection's current answer early, and returns whether it did. Others may need what it holds.
    """

    __slots__ = ("address", "cut")

    def __init__(self, address: str, cut: Callable[[], bool] = lambda: False) -> None:
        self.address, self.cut = address, cut


class Asker(Client):
    """A member whose requests this node answers, in place of an address. What it asks for another member, `passed_for`,
    counts as a connection of its own: a member that floods others with requests delays none of their own."""

    __slots__ = ("passed_for",)

    def __init__(self, peer: str, passed_for: str = "") -> None:
        super().__init__(f"member {peer}")
        self.passed_for = passed_for

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Asker) and (self.address, self.passed_for) == (other.address, other.passed_for)

    def __hash__(self) -> int:
        return hash((self.address, self.passed_for))


def host_of(address: str) -> str:
    """The address by which shares are counted: of IPv6 the first 64 bits, because a host can use all others itself."""
    try:
        host = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(host, IPv6Address):
        return str(host.ipv4_mapped or IPv6Address(int(host) >> 64 << 64))
    return str(host)


OWN = Client("")
"""The node itself: work that no client waits for."""


class Demand:
    """The clients for whom a piece of work is done; without any, the node itself. They may change while it waits."""

    __slots__ = ("_clients", "_supported", "wishes")

    def __init__(self, *clients: Client) -> None:
        self._clients = Counter(clients)
        self._supported: Counter[Demand] = Counter()
        """Other work that is done for the clients of this demand."""
        self.wishes: set[Wish] = set()

    @property
    def clients(self) -> Collection[Client]:
        return self._clients.keys() or (OWN,)

    @property
    def first(self) -> Client:
        return next(iter(self.clients))

    @contextmanager
    def supporting(self, work: Demand) -> Iterator[None]:
        """While the context is open, the clients of this demand are also clients of `work`."""
        self.support(work)
        try:
            yield
        finally:
            self.leave(work)

    def support(self, work: Demand) -> None:
        self._supported[work] += 1
        for client in self._clients:
            work.add(client)

    def leave(self, work: Demand) -> None:
        self._supported[work] -= 1
        if not self._supported[work]:
            del self._supported[work]
        for client in self._clients:
            work.remove(client)

    def add(self, client: Client) -> None:
        self._clients[client] += 1
        if self._clients[client] > 1:
            return
        for wish in self.wishes:
            wish.places.enlist(wish, client)
            if len(self._clients) == 1:
                wish.places.strike(wish, OWN)
        for work in self._supported.elements():
            work.add(client)

    def remove(self, client: Client) -> None:
        self._clients[client] -= 1
        if self._clients[client]:
            return
        del self._clients[client]
        for wish in self.wishes:
            if not self._clients:
                wish.places.enlist(wish, OWN)
            wish.places.strike(wish, client)
        for work in self._supported.elements():
            work.remove(client)


_CURRENT: ContextVar[Demand] = ContextVar("clients of the current task")


def current_demand() -> Demand:
    """The demand that the current task works for."""
    return _CURRENT.get(None) or Demand()


@contextmanager
def working_for(demand: Demand) -> Iterator[None]:
    """Within the context, this task works for `demand`, and so do the tasks that it starts."""
    token = _CURRENT.set(demand)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Wish:
    """A wait for a place. `client` holds the place once `granted` is set."""

    __slots__ = ("client", "demand", "granted", "places")

    def __init__(self, places: FairPlaces, demand: Demand) -> None:
        self.places, self.demand = places, demand
        self.granted = trio.Event()
        self.client: Client | None = None


class FairPlaces:
    """`total` places. The queue gives at most `most_queued` of them, and `most_each` to the clients of one address; the
    others are for `take_now`."""

    def __init__(self, total: int, *, most_each: int = 0, most_queued: int = 0) -> None:
        self.free = total
        self._most_queued = most_queued or total
        self._most_each = most_each or self._most_queued
        self._queued: Counter[str] = Counter()
        """Places from the queue by address."""
        self._by_client: Counter[Client] = Counter()
        self.by_address: Counter[str] = Counter()
        """Places held. An address that holds none is left out."""
        self._waiting: dict[str, dict[Client, dict[Wish, None]]] = {}
        """By address and client, in the order in which they began to wait."""

    @property
    def holders(self) -> int:
        """The number of clients that hold places."""
        return len(self._by_client)

    @contextmanager
    def asking(self) -> Iterator[Wish]:
        """Wait in the queue for the current task's demand. If the context ends with an error, no place is kept; else
        the caller gives it back."""
        demand = current_demand()
        wish = Wish(self, demand)
        demand.wishes.add(wish)
        for client in demand.clients:
            self.enlist(wish, client)
        self._grant()
        try:
            yield wish
        except BaseException:
            if wish.client is not None:
                self.give(wish.client)
            raise
        finally:
            self._end(wish)

    async def take(self) -> Callable[[], None]:
        """Wait for a place. Returns a function that gives it back."""
        with self.asking() as wish:
            await wish.granted.wait()
        assert wish.client is not None
        return partial(self.give, wish.client)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        give = await self.take()
        try:
            yield
        finally:
            give()

    def take_now(self, client: Client, *, leaving: int = 0) -> bool:
        """Take a place for `client` if more than `leaving` are free, even if others wait."""
        if self.free <= leaving:
            return False
        self._hold(client)
        return True

    def give(self, client: Client, *, queued: bool = True) -> None:
        """Give a place back. `queued`: it came from the queue and not from `take_now`."""
        self.free += 1
        _less(self._by_client, client)
        _less(self.by_address, client.address)
        if queued:
            _less(self._queued, client.address)
        self._grant()

    def enlist(self, wish: Wish, client: Client) -> None:
        self._waiting.setdefault(client.address, {}).setdefault(client, {})[wish] = None

    def strike(self, wish: Wish, client: Client) -> None:
        clients = self._waiting[client.address]
        del clients[client][wish]
        if not clients[client]:
            del clients[client]
        if not clients:
            del self._waiting[client.address]

    def _end(self, wish: Wish) -> None:
        if wish in wish.demand.wishes:
            wish.demand.wishes.remove(wish)
            for client in wish.demand.clients:
                self.strike(wish, client)

    def _hold(self, client: Client) -> None:
        self.free -= 1
        self._by_client[client] += 1
        self.by_address[client.address] += 1

    def _grant(self) -> None:
        while self.free and self._waiting and self._queued.total() < self._most_queued:
            address = min(self._waiting, key=self._queued.__getitem__)
            if self._queued[address] >= self._most_each:
                return
            clients = self._waiting[address]
            crowded = len(clients) > self._most_queued
            client = min(reversed(clients) if crowded else clients, key=self._by_client.__getitem__)
            wish = next(iter(clients[client]))
            self._end(wish)
            self._hold(client)
            self._queued[address] += 1
            _to_the_end(self._waiting, address)
            if not crowded:
                _to_the_end(clients, client)
            wish.client = client
            wish.granted.set()


def _to_the_end(waiting: dict[K, V], key: K) -> None:
    if key in waiting:
        waiting[key] = waiting.pop(key)


def _less(count: Counter[T], key: T) -> None:
    count[key] -= 1
    if not count[key]:
        del count[key]
