"""Keep-alive on the answering side: one `Waiting` for all unanswered requests of a connection.

A task looks at the connections with unanswered requests in even steps, and sleeps while there are none. A request that
is answered soon costs a dictionary operation at its beginning, and another one at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import trio

from node.exchange.contract import State
from protocol.messages import Waiting

WAITING_FIRST_S = 0.25
"""Most answers take less time than this, and need no `Waiting`."""
WAITING_EVERY_S = 0.5
"""Half of the shortest `silence_s` that is sensible for a caller."""


class Work:
    """An unanswered request. `queued`: its bodies that wait to be written. `is_coming`: bytes for it arrived here since
    the last `Waiting`."""

    __slots__ = ("began", "is_coming", "is_listed", "queued")

    def __init__(self) -> None:
        self.began = trio.current_time()
        self.queued = 0
        self.is_coming = self.is_listed = False

    def report(self) -> State:
        """The state for a `Waiting` that is sent now."""
        state = State.READY if self.queued else State.COMING if self.is_coming else State.WAITING
        self.is_coming, self.is_listed = False, True
        return state


Number = TypeVar("Number", bound=Hashable)


class OpenWork(Generic[Number]):
    """The unanswered requests of one connection, by number."""

    def __init__(self) -> None:
        self.by_number: dict[Number, Work] = {}
        self._due = 0.0
        """When the listed requests are due for their next `Waiting`."""

    def report(self, now: float, first_s: float, every_s: float) -> list[tuple[Number, State]]:
        """The contents of the `Waiting` that is due, or nothing."""
        new = any(not work.is_listed and now - work.began >= first_s for work in self.by_number.values())
        listed = now >= self._due and any(work.is_listed for work in self.by_number.values())
        if not new and not listed:
            return []
        self._due = now + every_s - now % every_s
        return [(number, work.report()) for number, work in self.by_number.items()]


Link = TypeVar("Link", bound=Hashable)


class KeepAlive(Generic[Link, Number]):
    """The connections that have unanswered requests."""

    def __init__(self, first_s: float = WAITING_FIRST_S, every_s: float = WAITING_EVERY_S) -> None:
        self._first_s, self._every_s = first_s, every_s
        self._links: dict[Link, OpenWork[Number]] = {}
        self._busy = trio.Event()

    def begin(self, link: Link, work: OpenWork[Number]) -> None:
        """The connection has an unanswered request."""
        if link not in self._links:
            self._links[link] = work
            self._busy.set()

    async def run(self, say: Callable[[Link, list[tuple[Number, State]]], None]) -> None:
        """Call `say` for each connection that is due, or at most half of `first_s` later."""
        while True:
            await self._busy.wait()
            while self._links:
                now = trio.current_time()
                for link, work in [*self._links.items()]:
                    if not work.by_number:
                        del self._links[link]
                    elif report := work.report(now, self._first_s, self._every_s):
                        say(link, report)
                await trio.sleep(self._first_s / 2)
            self._busy = trio.Event()


def waiting(report: list[tuple[int, State]]) -> Waiting:
    return Waiting(tuple((number, int(state)) for number, state in report))
