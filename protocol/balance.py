"""Balanced draws: which members keep the stripes of an object, each as much as its part.

The keepers of a stripe are drawn one after the other, in all cells of a site (protocol/placement.py) at the same time.
A member has a pseudo-random distance from each place, as in weighted rendezvous hashing (Thaler and Ravishankar, "Using
name-based mappings to increase hit rates", 1998), and the nearest takes it. Hashing alone gives the unluckiest of ten
members a quarter more places of an object of 100 MB than its part. So a member's distance grows by a factor for each
place that it has beyond its part of the earlier stripes, and shrinks for each that it lacks.

A distance depends on the number of the place, and not on ranks of members. So a member that leaves moves its own shards
and few others: those that the balance needs. docs/decisions/0012-balanced-stripes.md compares this with other ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

GROUP_STRIPES = 32
"""Consecutive stripes of an object that are balanced together. A longer group takes longer to compute if only its last
stripe is needed."""
PULL = 1.0
"""By how much the logarithm of a member's distance grows with each place beyond its part (docs/PROTOCOL.md)."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The step of splitmix64's sequence: 2^64 over the golden ratio."""


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class CellRows:
    """The cells of a site as rows of arrays, so that a place of all cells is drawn in one numpy pass. Rows are filled
    up to the longest with members of infinite distance."""

    def __init__(
        self, hashes: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64], cells: Sequence[slice], width: int
    ) -> None:
        lengths = [cell.stop - cell.start for cell in cells]
        self.width, self.ranks = width, min(width, *lengths)
        self.rows, self.starts = np.arange(len(cells)), np.array([cell.start for cell in cells])
        shape = (len(cells), max(lengths))
        self.hashes = np.zeros(shape, np.uint64)
        self.inverse_weights = np.full(shape, np.inf)
        self.parts, self.home_parts = np.zeros(shape), np.zeros(shape)
        for row, (cell, length) in enumerate(zip(cells, lengths, strict=True)):
            self.hashes[row, :length] = hashes[cell]
            self.inverse_weights[row, :length] = 1 / weights[cell]
            self.parts[row, :length] = _parts(weights[cell], self.ranks)
            self.home_parts[row, :length] = weights[cell] / weights.sum()

    def distances(self, seed: int, place: int) -> npt.NDArray[np.float64]:
        """The logarithms of all members' distances from the places of a stripe: by rank, cell and member."""
        numbers = np.arange(place * self.width, place * self.width + self.ranks, dtype=np.uint64)
        keys = _mix(np.uint64(seed) + numbers * _GOLDEN)
        fractions = uniform(self.hashes ^ keys[:, np.newaxis, np.newaxis])
        distances: npt.NDArray[np.float64] = np.log(-np.log(fractions) * self.inverse_weights)
        return distances


def _parts(weights: npt.NDArray[np.float64], ranks: int) -> npt.NDArray[np.float64]:
    """Each member's part of the stripes of its cell: `ranks` in all, by weight, but no member's above 1."""
    parts, full = np.ones(len(weights)), np.zeros(len(weights), bool)
    while not full.all():
        rest = np.where(full, 0, weights)
        parts = np.where(full, 1.0, (ranks - full.sum()) * rest / rest.sum())
        if not (parts > 1).any():
            break
        full |= parts > 1
    return parts


class BalancedGroup:
    """The keepers of up to GROUP_STRIPES consecutive stripes, drawn in order as far as they have been asked for."""

    def __init__(self, site: CellRows, seed: int) -> None:
        self._site, self._seed = site, seed
        self._kept, self._homes = np.zeros(site.parts.shape), np.zeros(site.parts.shape)
        self._drawn: list[tuple[int, npt.NDArray[np.intp]]] = []

    def stripe(self, place: int) -> tuple[int, npt.NDArray[np.intp]]:
        """The row of the root cell, and the keepers by cell and rank, as numbers of members."""
        while len(self._drawn) <= place:
            self._drawn.append(self._draw(len(self._drawn)))
        return self._drawn[place]

    def _draw(self, place: int) -> tuple[int, npt.NDArray[np.intp]]:
        site = self._site
        distances = site.distances(self._seed, place)
        surplus = PULL * (self._homes - place * site.home_parts)
        root, home = divmod(int(np.argmin(distances[0] + surplus)), distances.shape[2])
        self._homes[root, home] += 1
        keepers = np.empty((len(site.rows), site.ranks), np.intp)
        distances += PULL * (self._kept - place * site.parts)
        for rank in range(site.ranks):
            nearest = distances[rank].argmin(axis=1)
            if rank == 0:
                nearest[root] = home
            keepers[:, rank] = nearest
            distances[:, site.rows, nearest] = np.inf
            self._kept[site.rows, nearest] += 1
        return root, keepers + site.starts[:, np.newaxis]


def uniform(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Numbers between 0 and 1, neither included: the 53 high bits of the mixed hashes."""
    return ((_mix(hashes) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
