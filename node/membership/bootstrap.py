"""Bootstrap: which peers this node dials to enter its site, and when.

Each configured bootstrap peer, and each peer that mDNS finds on the LAN, is dialled whenever it is not among the
current members. Pauses between failed dials double. A node without any other member dials often, because nothing else
brings it into its site. A node that has members dials rarely, because they tell it of a peer that returns.

Anyone on the LAN can announce any number of peers, at addresses that never answer. So finds of mDNS never
stand before configured peers: they are dialled beside them, for a short time that grows with each failure. A new find
does not wait for those that failed before, nor for many others at its host, and takes the place of one that failed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from random import Random

import trio
from cachetools import TTLCache

from node.config.quantities import HostPort
from node.identity.verifier import REVOKED, Verifier
from node.membership import mdns
from node.membership.addresses import Target, parse_target
from node.membership.introduction import CHANNEL, Current
from node.runtime.fair_places import Client, Demand, FairPlaces, working_for
from node.runtime.refusals import MAX_REMEMBERED, Refusals
from protocol.errors import PeerUnavailableError
from protocol.ids import PeerId

log = logging.getLogger(__name__)

MAX_DIALS = 16
"""Configured peers dialled at a time. One that hangs is given up after `Timing.deadline`."""
MAX_NEW_FIND_DIALS, MAX_OLD_FIND_DIALS = 32, 8
"""Peers from mDNS dialled at a time, for the first time and again. A dial that hangs costs a socket."""
MAX_DISCOVERED = 256
"""Peers that mDNS may make this node dial: anyone on the LAN can announce any number."""
MAX_DISCOVERED_PER_HOST = 4
"""Peers from mDNS at one host: it runs one, or a few for tests."""

Dial = Callable[[Target], Awaitable[bool]]
"""Connects and introduces. False if either side refused the other. Raises PeerUnavailableError."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. Pauses vary at random by 25 %, so that the nodes of a site that starts do not dial in step."""

    deadline: float = 10.0
    """Longest time for one introduction or join, from its connect to its end."""
    find_deadline: float = 2.0
    """The same for the first dial of a peer that mDNS found. It doubles with each failure, up to `deadline`."""
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


@dataclass(eq=False, slots=True)
class _Wanted:
    """A peer that shall be a member. `ways`: its addresses. `is_find`: it is from mDNS, and not configured."""

    ways: tuple[Target, ...]
    is_find: bool
    failures: int = 0
    """Since the last introduction."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise PeerUnavailableError(f"no introduction within {seconds:g} s") from error


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
        self._dials, self._new_find_dials, self._old_find_dials = map(
            FairPlaces, (MAX_DIALS, MAX_NEW_FIND_DIALS, MAX_OLD_FIND_DIALS)
        )
        self._busy: Counter[PeerId] = Counter()
        self.finds: dict[PeerId, _Wanted] = {}
        self._warned: TTLCache[Target, None] = TTLCache(MAX_REMEMBERED, timing.silence, timer=trio.current_time)

    async def run(self) -> None:
        """Dial the configured peers, until cancelled."""
        while True:
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                for target in self._targets:
                    nursery.start_soon(self._keep_introduced, _Wanted((target,), is_find=False))
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
        self._busy[peer] += 1
        try:
            yield
        finally:
            self._busy[peer] -= 1
            if not self._busy[peer]:
                del self._busy[peer]

    def discovered(self, nursery: trio.Nursery, ways: tuple[Target, ...]) -> None:
        """Dial a peer that mDNS found, or whose addresses changed. `ways`: its addresses. Dials run in `nursery`."""
        peer = ways[0].peer
        if peer in self.finds and self.finds[peer].ways == ways:
            return
        self._lost(peer)
        neighbours = [other for other, find in self.finds.items() if find.ways[0].host == ways[0].host]
        if len(neighbours) >= MAX_DISCOVERED_PER_HOST:
            self._replace(neighbours)
        elif len(self.finds) >= MAX_DISCOVERED:
            self._replace(list(self.finds))
        find = self.finds[peer] = _Wanted(ways, is_find=True)
        nursery.start_soon(self._keep_discovered, find)

    def _replace(self, peers: list[PeerId]) -> None:
        """Forget the find with the most failures, or one at random: what was announced first is no better."""
        self._lost(max(peers, key=lambda peer: (self.finds[peer].failures, self._rng.random())))

    def _lost(self, peer: PeerId) -> None:
        if peer in self.finds:
            self.finds.pop(peer).scope.cancel()

    async def _keep_discovered(self, find: _Wanted) -> None:
        """Start at a random moment, because all nodes of a site find a new node at the same time."""
        with find.scope:
            await trio.sleep(self._rng.uniform(0, self._timing.first_retry))
            with working_for(Demand(Client(find.ways[0].host))):
                await self._keep_introduced(find)

    def _parsed(self, addresses: Sequence[str]) -> list[Target]:
        own = self._verifier.credentials.identity.peer_id
        return [target for target in map(parse_target, addresses) if target.peer != own]

    async def _keep_introduced(self, wanted: _Wanted) -> None:
        """Dial a peer, at its addresses in turn, whenever it is not among the current members, until it is revoked."""
        ways, peer = wanted.ways, wanted.ways[0].peer
        while not self._verifier.is_revoked(peer):
            if self._is_current(peer) or await self._dial(wanted):
                wanted.failures = 0
                await trio.sleep(self._spread(self._timing.recheck))
            else:
                await self._pause(peer, wanted.failures)
                wanted.failures += 1
        self.refusals.tell(CHANNEL, peer, str(HostPort(ways[0].host, ways[0].port)), REVOKED)

    async def _dial(self, wanted: _Wanted) -> bool:
        """Whether the peer was introduced. A failure is logged as a warning, at most every `Timing.silence`, if this
        node has no other member and the peer is configured; else at level debug."""
        target = wanted.ways[wanted.failures % len(wanted.ways)]
        level = logging.WARNING if self._is_alone() and not wanted.is_find else logging.DEBUG
        if target.peer in self._busy:
            return False
        places, seconds = self._dials, self._timing.deadline
        if wanted.is_find:
            places = self._old_find_dials if wanted.failures else self._new_find_dials
            seconds = min(seconds, self._timing.find_deadline * 2.0 ** min(wanted.failures, 16))
        async with places.place():
            try:
                # A find is only a claim: it must not keep this node from dialling the peer elsewhere.
                with _within(seconds), nullcontext() if wanted.is_find else self.introducing(target.peer):
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
