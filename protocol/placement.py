"""Placement of stripes on members, and the code that a site of a given size uses.

Every node computes the same answer from the same view. The members of a cell are drawn as keepers of an object's
stripes so that each gets its part of them, and a changed view moves few shards: protocol/balance.py.

A stripe's *home* is its keeper of rank 0: the member that reads it from the upstream for all (the term is from
Squirrel: Iyer, Rowstron, Druschel, PODC 2002).

**Cells.** The k+m keepers of a stripe can serve some twenty readers, but not a thousand. So the members of a large site
are cut into cells by their hashes: into halves, and these again, each with at least as many keeping members as a code
has shards. Each cell keeps a code of every block for the reads of its own members. For each stripe the cells form
another tree, with the cell of the stripe's home at its root: a keeper asks the keeper of the same rank in the cell
above for its shard, in the root cell the home. docs/decisions/0008-cells.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import cachetools
import numpy as np
import numpy.typing as npt

from protocol.balance import GROUP_STRIPES, BalancedGroup, CellRows, uniform
from protocol.ids import Digest, PeerId
from protocol.members import Member
from protocol.stripes import StripeId

DIRECTORY_MEMBERS = 3
HOME_HOPS = 2
"""`hops` of a request that may use the home and no other cell: docs/PROTOCOL.md, "Fields and bounds"."""
SMALL_BLOCK = 64 * 1024
"""Blocks up to this size are copied to two keepers: coding them would cost requests and save nothing."""
_REMEMBERED_ROUTES = 4096
_REMEMBERED_PLACES = 1 << 21
CHILDREN = 3
"""Cells below each cell of the tree: another child costs its keepers another send, another level costs time."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """k data and m parity shards; any k of the k+m make the block."""

    k: int
    m: int

    @property
    def width(self) -> int:
        return self.k + self.m


def geometry(members: int, k: int, m: int, block_length: int) -> Geometry:
    """The code for a block in a site with `members` keeping nodes, configured for k+m. Small sites keep as much parity
    as they can afford: with m = 1, 2 nodes use 1+1, 3 nodes 2+1, 4 nodes 3+1."""
    parity = min(m, members // 2)
    if block_length <= SMALL_BLOCK:
        return Geometry(1, min(1, parity))
    return Geometry(max(1, min(k, members - parity)), parity)


@dataclass(frozen=True, slots=True)
class Route:
    """A member's way to a stripe: the keepers by rank of its own cell, of each cell above, and of the root cell."""

    shape: Geometry
    cells: tuple[tuple[PeerId, ...], ...]

    @property
    def keepers(self) -> tuple[PeerId, ...]:
        return self.cells[0]

    @property
    def home(self) -> PeerId:
        return self.cells[-1][0]

    @property
    def root(self) -> Route:
        """The route of a member of the root cell, for readers whose own cell fails."""
        return Route(self.shape, self.cells[-1:])

    @property
    def depth(self) -> int:
        """Number of cells above the member's own."""
        return len(self.cells) - 1

    def sources(self, index: int, hops: int) -> dict[PeerId, int]:
        """The members that a keeper asks in turn for shard `index`, each with the `hops` of the request, fewer than the
        keeper's own. So waits never form a circle, even if views differ."""
        if self.depth == 0 or hops <= HOME_HOPS:
            return dict.fromkeys(self.cells[-1], HOME_HOPS - 1)
        further = min(hops, self.hops) - 1
        return {**dict.fromkeys(_pair(self.cells[1], index), further), self.home: HOME_HOPS - 1}

    @property
    def hops(self) -> int:
        """The `hops` that a keeper of the member's own cell needs for a block that no member has."""
        return HOME_HOPS + self.depth


def _pair(cell: tuple[PeerId, ...], index: int) -> tuple[PeerId, PeerId]:
    """The members asked for shard `index` in a cell above: its keeper, and the next one if that fails."""
    return cell[index % len(cell)], cell[(index + 1) % len(cell)]


def _hash64(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


class Placement:
    """Placement in one view of the site. Members with weight 0 keep nothing for others."""

    def __init__(self, members: Sequence[Member], k: int, m: int) -> None:
        keeping = [member for member in members if member.weight > 0] or list(members)
        hashed = sorted((_hash64(member.peer_id.encode()), member.peer_id, member.weight or 1.0) for member in keeping)
        self._peers = [peer for _, peer, _ in hashed]
        self._hashes = np.array([value for value, _, _ in hashed], dtype=np.uint64)
        self._weights = np.array([weight for _, _, weight in hashed])
        self._k, self._m = k, m
        self._cells = list(self._cut(0, slice(0, len(hashed)), 63, k + m))
        self._names = np.array([_hash64(f"cell {first} {bits}".encode()) for first, bits, _ in self._cells], np.uint64)
        self._sums = np.array([self._weights[cell].sum() for _, _, cell in self._cells])
        self._site = CellRows(self._hashes, self._weights, [cell for _, _, cell in self._cells], k + m)
        self._groups: cachetools.LRUCache[tuple[Digest, int], BalancedGroup] = cachetools.LRUCache(
            max(8, _REMEMBERED_PLACES // (GROUP_STRIPES * (k + m) * len(self._cells)))
        )
        self._routes: cachetools.LRUCache[tuple[PeerId, StripeId, int], Route] = cachetools.LRUCache(_REMEMBERED_ROUTES)

    def _cut(self, first: int, members: slice, bit: int, least: int) -> Iterator[tuple[int, int, slice]]:
        """Cells of the members whose hashes share the bits of `first` above `bit`, halved while both have `least`."""
        half = first | 1 << bit
        middle = int(np.searchsorted(self._hashes, np.uint64(half)))
        if min(middle - members.start, members.stop - middle) < least:
            yield first, bit, members
        else:
            yield from self._cut(first, slice(members.start, middle), bit - 1, least)
            yield from self._cut(half, slice(middle, members.stop), bit - 1, least)

    def route(self, peer: PeerId, stripe: StripeId, length: int) -> Route:
        """The route of `peer`, which may keep nothing itself. `length`: bytes of the stripe's longest block."""
        route = self._routes.get((peer, stripe, length))
        if route is None:
            route = self._routes[peer, stripe, length] = self._find(peer, stripe, length)
        return route

    def _find(self, peer: PeerId, stripe: StripeId, length: int) -> Route:
        number, place = divmod(stripe.number, GROUP_STRIPES)
        group = self._groups.get((stripe.digest, number))
        if group is None:
            seed = _hash64(f"{stripe.digest}/{number}".encode())
            group = self._groups[stripe.digest, number] = BalancedGroup(self._site, seed)
        root, keepers = group.stripe(place)
        above = self._way_up(root, self._cell_of(_hash64(peer.encode())), stripe)
        _, _, members = self._cells[above[0]]
        shape = geometry(members.stop - members.start, self._k, self._m, length)
        return Route(shape, tuple(tuple(self._peers[i] for i in keepers[cell, : shape.width]) for cell in above))

    def _way_up(self, root: int, own: int, stripe: StripeId) -> list[int]:
        """The cells from a member's own to the root in the tree of a stripe."""
        if own == root:
            return [root]
        ranked = _nearest(self._names, self._sums, f"{stripe.digest}#{stripe.number}", len(self._cells))
        order = [root, *ranked[ranked != root].tolist()]
        at = order.index(own)
        above = [own]
        while at:
            at = (at - 1) // CHILDREN
            above.append(order[at])
        return above

    def _cell_of(self, value: int) -> int:
        return bisect_right(self._cells, value, key=lambda cell: cell[0]) - 1

    def keepers(self, stripe: StripeId, length: int) -> tuple[Geometry, tuple[PeerId, ...]]:
        """The stripe's code, and its keepers by rank in the root cell; rank 0 is its home."""
        route = self.route(self._peers[0], stripe, length)
        return route.shape, route.cells[-1]

    def directory(self, digest: Digest) -> tuple[PeerId, ...]:
        """The members that store the announcements of an object's holders."""
        nearest = _nearest(self._hashes, self._weights, str(digest), DIRECTORY_MEMBERS)
        return tuple(self._peers[i] for i in nearest)


def _nearest(
    hashes: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64], key: str, count: int
) -> npt.NDArray[np.intp]:
    """Indices of the `count` that rank highest for a key, in order."""
    distance = -np.log(uniform(hashes ^ np.uint64(_hash64(key.encode())))) / weights
    count = min(count, len(hashes))
    # Sorting only the few nearest keeps the cost of a large site at one pass.
    few = np.argpartition(distance, count - 1)[:count] if count < len(hashes) else np.arange(count)
    return few[np.argsort(distance[few])]
