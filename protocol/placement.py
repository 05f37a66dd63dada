"""Who keeps what: weighted rendezvous hashing, and the code that a site of a given size uses.

Every node computes the same answer from the same view, and a changed view moves only what must move (Thaler and
Ravishankar, "Using name-based mappings to increase hit rates", 1998). A score mixes 64-bit hashes of key and member
(splitmix64's finalizer) for all members at once, so that its cost is one numpy pass, whatever the site's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import cachetools
import numpy as np
import numpy.typing as npt

from protocol.ids import BlockId, Digest, PeerId
from protocol.members import Member

DIRECTORY_MEMBERS = 3
SMALL_BLOCK = 64 * 1024
"""Blocks up to this size are copied to two keepers: cutting them up would cost requests and save nothing."""
_REMEMBERED_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Geometry:
    """k data and m parity shards; any k of the k+m make the block."""

    k: int
    m: int

    @property
    def width(self) -> int:
        return self.k + self.m


def geometry(members: int, k: int, m: int, block_length: int) -> Geometry:
    """The code for a block in a site of `members` nodes that keep, configured for k+m.

    Small sites keep as much parity as they can afford: 2 nodes a copy, 3 nodes 2+1, 4 nodes 3+1.
    """
    parity = min(m, members // 2)
    if block_length <= SMALL_BLOCK:
        return Geometry(1, min(1, parity))
    return Geometry(max(1, min(k, members - parity)), parity)


def _hash64(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Placement:
    """The answers for one view of the site. Members with weight 0 keep nothing for others."""

    def __init__(self, members: Sequence[Member], k: int, m: int) -> None:
        keeping = [member for member in members if member.weight > 0] or list(members)
        self._peers = [member.peer_id for member in keeping]
        self._hashes = np.array([_hash64(peer.encode()) for peer in self._peers], dtype=np.uint64)
        self._weights = np.array([member.weight or 1.0 for member in keeping])
        self._k, self._m = k, m
        self._remembered: cachetools.LRUCache[BlockId, tuple[PeerId, ...]] = cachetools.LRUCache(_REMEMBERED_BLOCKS)

    def keepers(self, block: BlockId, length: int) -> tuple[Geometry, tuple[PeerId, ...]]:
        """The block's code, and its keepers by rank; rank 0 is its home."""
        shape = geometry(len(self._peers), self._k, self._m, length)
        ranked = self._remembered.get(block)
        if ranked is None:
            ranked = self._ranked(f"{block.digest}#{block.index}", self._k + self._m)
            self._remembered[block] = ranked
        return shape, ranked[: shape.width]

    def directory(self, digest: Digest) -> tuple[PeerId, ...]:
        """The members that know who holds some of an object."""
        return self._ranked(str(digest), DIRECTORY_MEMBERS)

    def name_homes(self, name: str) -> tuple[PeerId, ...]:
        """The members that ask the origin what a name stands for, the first one first."""
        return self._ranked(name, DIRECTORY_MEMBERS)

    def _ranked(self, key: str, count: int) -> tuple[PeerId, ...]:
        mixed = _mix(self._hashes ^ np.uint64(_hash64(key.encode())))
        uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        distance = -np.log(uniform) / self._weights
        count = min(count, len(self._peers))
        # Sorting the few nearest only keeps the cost of a large site at one pass.
        few = np.argpartition(distance, count - 1)[:count] if count < len(self._peers) else np.arange(count)
        return tuple(self._peers[i] for i in few[np.argsort(distance[few])])
