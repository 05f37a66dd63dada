"""Placement of shards on members: weighted rendezvous hashing, and the code that a site of a given size uses.

Every node computes the same answer from the same view, and a changed view moves as few shards as possible (Thaler and
Ravishankar, "Using name-based mappings to increase hit rates", 1998). A score mixes 64-bit hashes of key and member
(splitmix64's finalizer) for all members at once, so that it costs one numpy pass for any size of the site.

A block's *home* is its keeper of rank 0: the member that reads it from the upstream for all (the term is from Squirrel:
Iyer, Rowstron, Druschel, PODC 2002).

**Cells.** The k+m keepers of a block can serve some twenty readers, but not a thousand. So the members of a large site
are cut into cells by their hashes: into halves, and these again, each with at least as many keeping members as a code
has shards. Each cell keeps a code of every block for the reads of its own members. For each block the cells form
another tree, with the cell of the block's home at its root: a keeper asks the keeper of the same rank in the cell above
for its shard, in the root cell the home. docs/decisions/0008-cells.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import cachetools
import numpy as np
import numpy.typing as npt

from protocol.ids import Digest, PeerId
from protocol.members import Member
from protocol.stripes import StripeId

DIRECTORY_MEMBERS = 3
HOME_HOPS = 2
"""`hops` of a request that may use the block's home and no other cell: see GetShard."""
SMALL_BLOCK = 64 * 1024
"""Blocks up to this size are copied to two keepers: coding them would cost requests and save nothing."""
_REMEMBERED_BLOCKS = 4096
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
    """A member's way to a block: the keepers by rank of its own cell, of each cell above, and of the root cell."""

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


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
        self._remembered: cachetools.LRUCache[tuple[PeerId, StripeId, int], Route] = cachetools.LRUCache(
            _REMEMBERED_BLOCKS
        )

    def _cut(self, first: int, members: slice, bit: int, least: int) -> Iterator[tuple[int, int, slice]]:
        """Cells of the members whose hashes share the bits of `first` above `bit`, halved while both have `least`."""
        half = first | 1 << bit
        middle = int(np.searchsorted(self._hashes, np.uint64(half)))
        if min(middle - members.start, members.stop - middle) < least:
            yield first, bit, members
        else:
            yield from self._cut(first, slice(members.start, middle), bit - 1, least)
            yield from self._cut(half, slice(middle, members.stop), bit - 1, least)

    def route(self, peer: PeerId, block: StripeId, length: int) -> Route:
        """The route of `peer`, which may keep nothing itself."""
        route = self._remembered.get((peer, block, length))
        if route is None:
            route = self._remembered[peer, block, length] = self._find(peer, block, length)
        return route

    def _find(self, peer: PeerId, block: StripeId, length: int) -> Route:
        key = f"{block.digest}#{block.number}"
        home = self._cell_of(int(self._hashes[_nearest(self._hashes, self._weights, key, 1)[0]]))
        others = _nearest(self._names, self._sums, key, len(self._cells))
        order = [home, *others[others != home]]
        at = order.index(self._cell_of(_hash64(peer.encode())))
        above = [at]
        while at:
            at = (at - 1) // CHILDREN
            above.append(at)
        members = [self._cells[order[number]][2] for number in above]
        shape = geometry(members[0].stop - members[0].start, self._k, self._m, length)
        return Route(shape, tuple(self._ranked(key, shape.width, cell) for cell in members))

    def _cell_of(self, value: int) -> int:
        return bisect_right(self._cells, value, key=lambda cell: cell[0]) - 1

    def keepers(self, block: StripeId, length: int) -> tuple[Geometry, tuple[PeerId, ...]]:
        """The block's code, and its keepers by rank in the root cell; rank 0 is its home."""
        route = self.route(self._peers[0], block, length)
        return route.shape, route.cells[-1]

    def directory(self, digest: Digest) -> tuple[PeerId, ...]:
        """The members that store the announcements of an object's holders."""
        return self._ranked(str(digest), DIRECTORY_MEMBERS)

    def _ranked(self, key: str, count: int, among: slice = slice(None)) -> tuple[PeerId, ...]:
        peers = self._peers[among]
        return tuple(peers[i] for i in _nearest(self._hashes[among], self._weights[among], key, count))


def _nearest(
    hashes: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64], key: str, count: int
) -> npt.NDArray[np.intp]:
    """Indices of the `count` that rank highest for a key, in order."""
    mixed = _mix(hashes ^ np.uint64(_hash64(key.encode())))
    uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    distance = -np.log(uniform) / weights
    count = min(count, len(hashes))
    # Sorting only the few nearest keeps the cost of a large site at one pass.
    few = np.argpartition(distance, count - 1)[:count] if count < len(hashes) else np.arange(count)
    return few[np.argsort(distance[few])]
