"""Ways to place stripes on members, compared: `python -m tests.benchmarks.placement` (a minute).

For objects of 25, 50 and 200 stripes in one cell, with the code 4+1: the places of the unluckiest member, and the
stripes that it is home of, divided by its part, also in a window of 8 consecutive stripes (the mean over the windows).
Then the part of the shards, and of the homes, that are at another member after one has left. Means over 40 objects.
Last: the time of a route that is not remembered, and of one that is. docs/decisions/0012-balanced-stripes.md.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from protocol import balance
from protocol.balance import GROUP_STRIPES, BalancedGroup, CellRows, uniform
from protocol.ids import BLOCK_SIZE, Digest, PeerId
from protocol.members import Member
from protocol.placement import Placement
from protocol.stripes import StripeId

OBJECTS, WIDTH, WINDOW = 40, 5, 8
LENGTHS = (25, 50, 200)
MOVED_STRIPES = 50
"""Stripes of the objects of which the moved shards are counted."""
GOLDEN = (5**0.5 - 1) / 2
UNEQUAL = (0.5, 1.0, 1.0, 2.0, 1.5)

Keepers = npt.NDArray[np.intp]
"""The keepers of an object by stripe and rank, as numbers of members."""


@dataclass(frozen=True)
class Site:
    hashes: npt.NDArray[np.uint64]
    weights: npt.NDArray[np.float64]

    def without(self, member: int) -> Site:
        return Site(np.delete(self.hashes, member), np.delete(self.weights, member))


Way = Callable[[Site, int, int], Keepers]
"""The keepers of the first stripes of an object, by its seed and their number."""


def balanced(site: Site, seed: int, stripes: int) -> Keepers:
    """The way of protocol/balance.py."""
    rows = CellRows(site.hashes, site.weights, [slice(0, len(site.hashes))], WIDTH)
    groups = [BalancedGroup(rows, seed + number) for number in range(-(-stripes // GROUP_STRIPES))]
    return np.array([groups[at // GROUP_STRIPES].stripe(at % GROUP_STRIPES)[1][0] for at in range(stripes)])


def independent(site: Site, seed: int, stripes: int) -> Keepers:
    """Weighted rendezvous hashing of each stripe."""
    keys = np.array([random.Random(f"{seed} {at}").getrandbits(64) for at in range(stripes)], np.uint64)
    distances = -np.log(uniform(site.hashes ^ keys[:, np.newaxis])) / site.weights
    ranked: Keepers = np.argsort(distances, axis=1)
    return ranked[:, :WIDTH]


def round_robin(site: Site, seed: int, stripes: int) -> Keepers:
    """Around the members in the object's rendezvous order. Knows no weights."""
    order = np.argsort(uniform(site.hashes ^ np.uint64(seed)))
    keepers: Keepers = order[(np.arange(stripes)[:, np.newaxis] + np.arange(WIDTH)) % len(order)]
    return keepers


def circle(site: Site, seed: int, stripes: int) -> Keepers:
    """Systematic sampling: points of a golden sequence on a circle where each member has an arc by its weight."""
    order = np.argsort(uniform(site.hashes ^ np.uint64(seed)))
    ends = np.cumsum(site.weights[order]) / site.weights.sum()
    keepers = np.empty((stripes, WIDTH), np.intp)
    for at in range(stripes):
        taken: list[int] = []
        for rank in range(WIDTH):
            point = (seed * 2.0**-64 + at * GOLDEN + rank / WIDTH) % 1.0
            arc = int(np.searchsorted(ends, point, side="right")) % len(order)
            while arc in taken:
                arc = (arc + 1) % len(order)
            taken.append(arc)
        keepers[at] = order[taken]
    return keepers


def pulled(pull: float) -> Way:
    """Balanced with another factor."""

    def way(site: Site, seed: int, stripes: int) -> Keepers:
        shipped = balance.PULL
        balance.PULL = pull
        try:
            return balanced(site, seed, stripes)
        finally:
            balance.PULL = shipped

    return way


WAYS: dict[str, Way] = {
    "independent hashing": independent,
    "round robin": round_robin,
    "golden circle": circle,
    "balanced": balanced,
    "balanced, pull 0.25": pulled(0.25),
    "balanced, pull 0.5": pulled(0.5),
    "balanced, pull 2": pulled(2.0),
}


def excess(keepers: Keepers, parts: npt.NDArray[np.float64]) -> list[float]:
    """The unluckiest member's places divided by its part of one stripe times the stripes, by LENGTHS, in a window."""
    counts = (keepers[:, :, np.newaxis] == np.arange(len(parts))).sum(axis=1).cumsum(axis=0)
    whole = [float((counts[length - 1] / length / parts).max()) for length in LENGTHS]
    windows = (counts[WINDOW:] - counts[:-WINDOW]) / WINDOW / parts
    return [*whole, float(windows.max(axis=1).mean())]


def moved(way: Way, site: Site, seed: int, before: Keepers) -> tuple[float, float]:
    gone = seed % len(site.hashes)
    after = way(site.without(gone), seed, MOVED_STRIPES)
    same = before[:MOVED_STRIPES] == after + (after >= gone)
    return 1 - float(same.mean()), 1 - float(same[:, 0].mean())


def compare(count: int, equal: bool) -> Table:
    rng = random.Random(count)
    weights = np.array([1.0 if equal else UNEQUAL[at % len(UNEQUAL)] for at in range(count)])
    site = Site(np.array([rng.getrandbits(64) for _ in range(count)], np.uint64), weights)
    parts = CellRows(site.hashes, weights, [slice(0, count)], WIDTH).parts[0]
    seeds = [rng.getrandbits(63) for _ in range(OBJECTS)]
    columns = [f"{kind} {length}" for kind in ("places", "homes") for length in (*LENGTHS, "window")]
    title = f"{count} members, {'equal' if equal else 'unequal'} weights"
    table = Table("", *columns, "moved", "homes moved", title=title)
    for name, way in WAYS.items():
        rows = []
        for seed in seeds:
            keepers = way(site, seed, max(LENGTHS))
            row = [*excess(keepers, parts), *excess(keepers[:, :1], weights / weights.sum())]
            if count > WIDTH:  # otherwise another code has other shards
                row += moved(way, site, seed, keepers)
            rows.append(row)
        table.add_row(name, *(f"{figure:.2f}" for figure in np.mean(rows, axis=0)))
    return table


def route_times() -> Table:
    table = Table("members", "view, ms", "route of the next stripe, us", "remembered, us", title="Time of a route")
    for count in (5, 10, 100, 1000):
        members = [Member(PeerId(f"peer-{number}"), "", "site", ()) for number in range(count)]
        began = time.perf_counter()
        placement = Placement(members, 4, 1)
        seconds = [time.perf_counter() - began]
        stripes = [
            StripeId(Digest("sha256", hashlib.sha256(bytes([number])).hexdigest()), at)
            for number in range(8)
            for at in range(GROUP_STRIPES)
        ]
        for _ in range(2):
            began = time.perf_counter()
            for stripe in stripes:
                placement.route(members[0].peer_id, stripe, BLOCK_SIZE)
            seconds.append((time.perf_counter() - began) / len(stripes))
        table.add_row(str(count), f"{seconds[0] * 1e3:.1f}", f"{seconds[1] * 1e6:.0f}", f"{seconds[2] * 1e6:.1f}")
    return table


def main() -> None:
    console = Console()
    for count in (5, 6, 10, 40):
        for equal in (True, False):
            console.print(compare(count, equal))
    console.print(route_times())


if __name__ == "__main__":
    main()
