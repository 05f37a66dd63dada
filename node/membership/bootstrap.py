"""Bootstrap: which peers this node dials to enter its site, and when.

Each configured bootstrap peer, and each peer that mDNS finds on the LAN, is dialled whenever it is not among the
current members. Pauses between failed dials double. A node without any other member dials often, because nothing else
brings it into its site. A node that has members dials rarely, because they tell it of a peer that returns.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random

import trio
from cachetools import TTLCache

from node.config.quantities import HostPort
from node.identity.verifier import REVOKED, Verifier
from node.membership import mdns
from node.membership.addresses import Target, parse_target
from node.membership.introduction import CHANNEL, Current
from node.runtime.refusals import MAX_REMEMBERED, Refusals
from protocol.errors import PeerUnavailableError
from protocol.ids import PeerId

log = logging.getLogger(__name__)

MAX_DIALS = 8
MAX_DISCOVERED = 256
"""Peers that mDNS may make this node dial: anyone on the LAN can announce any number."""

Dial = Callable[[Target], Awaitable[bool]]
"""Connects and introduces. False if either side refused the other. Raises PeerUnavailableError."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. Pauses vary at random by 25 %, so that the nodes of a site that starts do not dial in step."""

    deadline: float = 10.0
    """Longest time for one introduction or join, from its connect to its end."""
    first_retry: float = 0.5
    last_retry: float = 10.0
    """Longest pause of a node that has no other member."""
    longest_retry: float = 600.0
    """Longest pause of a node that has others: they tell it of a returned peer, or the peer's peers file leads here."""
    recheck: float = 6.5
    """How often this node looks for a peer among the current members, both after an introduction and in a pause."""
    linger: float = 1.0
    """How long the side that sends the last message waits for the other side to read it."""
    silence: float = 300.0
    """Shortest time between two equal warnings about the same peer."""

    def back_off(self, failures: int, *, alone: bool) -> float:
        """The pause after a failed dial that follows `failures` others. `alone`: the node has no other member."""
        return min(self.last_retry if alone else self.longest_retry, self.first_retry * 2.0 ** min(failures, 16))


class Bootstrap:
    def __init__(
        self, addresses: Sequence[str], verifier: Verifier, current: Current, dial: Dial, *, timing: Timing, rng: Random
    ) -> None:
        """`addresses` are multiaddrs; raises BadInputError for a malformed one."""
        self._verifier = verifier
        self._targets = self._parsed(addresses)
        self._changed = trio.Event()
        self._current, self._dial_peer = current, dial
        self.refusals = Refusals(timing.silence)
        self._timing, self._rng = timing, rng
        self._dials = trio.CapacityLimiter(MAX_DIALS)
        self._busy: set[PeerId] = set()
        self._discovered: dict[PeerId, tuple[tuple[Target, ...], trio.CancelScope]] = {}
        self._warned: TTLCache[Target, None] = TTLCache(MAX_REMEMBERED, timing.silence, timer=trio.current_time)

    async def run(self) -> None:
        """Dial the configured peers, until cancelled."""
        while True:
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                for target in self._targets:
                    nursery.start_soon(self._keep_introduced, (target,), logging.WARNING)
                await self._changed.wait()
                nursery.cancel_scope.cancel()

    async def discover(self, own: mdns.Announcement) -> None:
        """Announce this node by mDNS and dial the peers that are found, until cancelled."""
        async with trio.open_nursery() as nursery:
            await mdns.run(own, partial(self.discovered, nursery), self._lost)

    def prepared(self, addresses: Sequence[str]) -> Callable[[], None]:
        """A function that replaces the configured peers by `addresses`. Raises BadInputError."""
        targets = self._parsed(addresses)

        def change() -> None:
            if targets != self._targets:
                self._targets = targets
                self._changed.set()

        return change

    @contextmanager
    def introducing(self, peer: PeerId) -> Iterator[None]:
        """Mark an introduction to `peer`, in either direction. Meanwhile bootstrap does not dial that peer."""
        self._busy.add(peer)
        try:
            yield
        finally:
            self._busy.discard(peer)

    def discovered(self, nursery: trio.Nursery, ways: tuple[Target, ...]) -> None:
        """Dial a peer that mDNS found, or whose addresses changed. `ways`: its addresses. Dials run in `nursery`."""
        peer = ways[0].peer
        if peer in self._discovered and self._discovered[peer][0] == ways:
            return
        self._lost(peer)
        if len(self._discovered) < MAX_DISCOVERED:
            self._discovered[peer] = ways, trio.CancelScope()
            nursery.start_soon(self._keep_discovered, *self._discovered[peer])

    def _lost(self, peer: PeerId) -> None:
        if peer in self._discovered:
            self._discovered.pop(peer)[1].cancel()

    async def _keep_discovered(self, ways: tuple[Target, ...], scope: trio.CancelScope) -> None:
        """Start at a random moment, because all nodes of a site find a new node at the same time."""
        with scope:
            await trio.sleep(self._rng.uniform(0, self._timing.first_retry))
            await self._keep_introduced(ways, logging.DEBUG)

    def _parsed(self, addresses: Sequence[str]) -> list[Target]:
        own = self._verifier.credentials.identity.peer_id
        return [target for target in map(parse_target, addresses) if target.peer != own]

    async def _keep_introduced(self, ways: Sequence[Target], level: int) -> None:
        """Dial one peer, at its addresses in turn, whenever it is not among the current members, until it is revoked.

        Failures are logged at `level` if this node has no other member, else at level debug.
        """
        peer, failures = ways[0].peer, 0
        while not self._verifier.is_revoked(peer):
            level_now = level if self._is_alone() else logging.DEBUG
            if self._is_current(peer) or await self._dial(ways[failures % len(ways)], level_now):
                failures = 0
                await trio.sleep(self._spread(self._timing.recheck))
            else:
                await self._pause(peer, failures)
                failures += 1
        self.refusals.tell(CHANNEL, peer, str(HostPort(ways[0].host, ways[0].port)), REVOKED)

    async def _dial(self, target: Target, level: int) -> bool:
        """Whether the peer was introduced. A failure is logged at `level`, at most every `Timing.silence`."""
        if target.peer in self._busy:
            return False
        async with self._dials:
            try:
                with self.introducing(target.peer):
                    return await self._dial_peer(target)
            except PeerUnavailableError as error:
                text = f"cannot reach {target}, which is tried again: {error}"
                log.log(logging.DEBUG if target in self._warned else level, text)
                if level > logging.DEBUG:
                    self._warned[target] = None
                return False

    async def _pause(self, peer: PeerId, failures: int) -> None:
        """Wait until the next dial is due, or the peer has become a member. The pause changes with `alone`."""
        rested = 0.0
        while not self._is_current(peer):
            left = self._timing.back_off(failures, alone=self._is_alone()) - rested
            if left <= 0:
                return
            step = min(left, self._timing.recheck)
            await trio.sleep(self._spread(step))
            rested += step

    def _is_alone(self) -> bool:
        own = self._verifier.credentials.identity.peer_id
        return not any(member.peer_id != own for member in self._current())

    def _is_current(self, peer: PeerId) -> bool:
        return any(member.peer_id == peer for member in self._current())

    def _spread(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.75, 1.25)
