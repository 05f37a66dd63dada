"""The open connections of a server, and which of them makes way for a new one when there are too many.

An idle connection makes way, or one that lets the server wait for its client, or one of an address that has more
connections than the newcomer's. Of those, it is one of the address that has the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Generic, Protocol, TypeVar

SLOW_S = 1.0
"""A client that lets the server wait for longer, for its request or for room to send, is slow."""


class Phase(IntEnum):
    """What a connection waits for. Of the connections of one address, those of the highest phase make way first."""

    WORK = 0
    CLIENT = 1
    IDLE = 2


class Connection(Protocol):
    address: str
    is_cut: bool

    @property
    def phase(self) -> Phase: ...

    @property
    def since(self) -> float:
        """When the phase began."""

    def cut(self) -> bool:
        """End the connection, after which `is_cut` is true. Returns False if it was cut before."""


C = TypeVar("C", bound=Connection)


class OpenConnections(Generic[C]):
    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[C, None] = {}
        self._by_address: Counter[str] = Counter()

    def __iter__(self) -> Iterator[C]:
        return iter(self._open)

    @contextmanager
    def holding(self, connection: C) -> Iterator[None]:
        self._open[connection] = None
        self._by_address[connection.address] += 1
        try:
            yield
        finally:
            del self._open[connection]
            self._by_address[connection.address] -= 1
            if not self._by_address[connection.address]:
                del self._by_address[connection.address]

    def makes_way(self, newcomer: str, now: float) -> bool:
        """Whether there is room for a connection of the address `newcomer`. If need be, another one is cut."""
        if len(self._open) < self._most:
            return True
        count = self._by_address

        def dispensable(connection: C) -> bool:
            if connection.is_cut:
                return False
            more = count[connection.address] - count[newcomer]
            slow = connection.phase is Phase.CLIENT and now - connection.since >= SLOW_S
            return connection.phase is Phase.IDLE or more > 1 or (more >= 0 and slow)

        def rank(connection: C) -> tuple[int, int, float]:
            return count[connection.address], connection.phase, now - connection.since

        victim = max(filter(dispensable, self._open), key=rank, default=None)
        return victim is not None and victim.cut()
