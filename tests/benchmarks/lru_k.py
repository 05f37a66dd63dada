"""Hit ratios of LRU-K beside other policies: `python -m tests.benchmarks.lru_k [--trace FILE] [--horizon N]`.

Without a trace: the two-pool test of the LRU-K paper (100 hot entries, 10,000 cold ones), and Zipf references with
scans between them. A trace has one integer on each line, the number of the object asked for, and may be compressed by
zstd; every policy sees it in caches of .1 to 30 % of its distinct objects, as it is and with scans put in.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path

import click
from cachetools import Cache, LRUCache
from rich.console import Console
from rich.table import Table

from cache.lru_k import LRUKCache

SHARES = (0.1, 1, 3, 10, 30)
"""Cache sizes, in percent of the distinct objects."""

SCAN_EVERY, SCAN_LENGTH = 5000, 1000


class Sieve(Cache[int, None]):
    """SIEVE (Zhang et al., NSDI'24): one queue, a hand that moves from old to new, and a visited bit."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self._older: dict[int, int | None] = {}
        self._newer: dict[int, int | None] = {}
        self._newest: int | None = None
        self._oldest: int | None = None
        self._hand: int | None = None
        self._visited: set[int] = set()

    def __getitem__(self, key: int) -> None:
        self._visited.add(key)
        return super().__getitem__(key)

    def __setitem__(self, key: int, value: None) -> None:
        super().__setitem__(key, value)
        self._older[key], self._newer[key] = self._newest, None
        if self._newest is None:
            self._oldest = key
        else:
            self._newer[self._newest] = key
        self._newest = key

    def popitem(self) -> tuple[int, None]:
        hand = self._hand if self._hand is not None else self._oldest
        while hand in self._visited:
            self._visited.remove(hand)
            hand = self._newer[hand] if self._newer[hand] is not None else self._oldest
        assert hand is not None
        older, newer = self._older.pop(hand), self._newer.pop(hand)
        self._hand = newer
        if older is None:
            self._oldest = newer
        else:
            self._newer[older] = newer
        if newer is None:
            self._newest = older
        else:
            self._older[newer] = older
        del self[hand]
        return hand, None


class S3Fifo(Cache[int, None]):
    """S3-FIFO (Yang et al., SOSP'23): a small queue of a tenth, a main one, and a ghost queue as long as the main."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}

    def __getitem__(self, key: int) -> None:
        self._uses[key] = min(3, self._uses[key] + 1)
        return super().__getitem__(key)

    def __setitem__(self, key: int, value: None) -> None:
        known = key in self._ghosts
        self._ghosts.pop(key, None)
        super().__setitem__(key, value)
        self._uses[key] = 0
        (self._main if known else self._small).append(key)

    def popitem(self) -> tuple[int, None]:
        while True:
            if len(self._small) >= max(1, self.maxsize // 10) or not self._main:
                key = self._small.popleft()
                if self._uses[key] > 1:
                    self._uses[key] = 0
                    self._main.append(key)
                    continue
                self._ghosts[key] = None
                if len(self._ghosts) > self.maxsize * 9 // 10:
                    self._ghosts.popitem(last=False)
            else:
                key = self._main.popleft()
                if self._uses[key]:
                    self._uses[key] -= 1
                    self._main.append(key)
                    continue
            del self[key], self._uses[key]
            return key, None


Policy = Callable[[int], "Cache[int, None]"]


def ticks() -> Callable[[], float]:
    """A timer that counts references, so that a horizon is a number of them."""
    counter = count()
    return lambda: float(next(counter))


def policies(horizons: Iterable[int]) -> dict[str, Policy]:
    bounded: dict[str, Policy] = {
        f"LRU-2, horizon {horizon:,}": lambda size, horizon=horizon: LRUKCache(size, horizon=horizon, timer=ticks())  # type: ignore[misc]
        for horizon in horizons
    }
    return {"LRU": LRUCache, "LRU-2": LRUKCache, **bounded, "SIEVE": Sieve, "S3-FIFO": S3Fifo}


def hit_ratio(cache: Cache[int, None], references: Sequence[int], skip: int = 0) -> float:
    hits = 0
    for turn, key in enumerate(references):
        if key in cache:
            cache[key]
            hits += turn >= skip
        else:
            cache[key] = None
    return hits / (len(references) - skip)


def two_pools(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(100) if turn % 2 else 100 + rng.randrange(10_000) for turn in range(length)]


def zipf(rng: random.Random, length: int, objects: int = 10_000) -> list[int]:
    weights = list(accumulate(1 / (rank + 1) for rank in range(objects)))
    return rng.choices(range(objects), cum_weights=weights, k=length)


def with_scans(references: Sequence[int]) -> list[int]:
    """After each SCAN_EVERY references, SCAN_LENGTH objects that nobody asks for again."""

    def mixed() -> Iterator[int]:
        fresh = count(-1, -1)
        for turn, key in enumerate(references, 1):
            yield key
            if turn % SCAN_EVERY == 0:
                yield from (next(fresh) for _ in range(SCAN_LENGTH))

    return list(mixed())


def read_trace(path: Path) -> list[int]:
    if path.suffix == ".zst":
        raw = subprocess.run(["zstd", "-dc", str(path)], check=True, capture_output=True).stdout
    else:
        raw = path.read_bytes()
    return [int(line) for line in raw.split()]


def compare(
    title: str, references: Sequence[int], sizes: dict[str, int], among: dict[str, Policy], skip: int = 0
) -> Table:
    table = Table("policy", *sizes, "µs a reference", title=title)
    for name, policy in among.items():
        start = time.perf_counter()
        ratios = [hit_ratio(policy(size), references, skip) for size in sizes.values()]
        cost = (time.perf_counter() - start) / len(references) / len(sizes)
        table.add_row(name, *(f"{100 * ratio:.2f}" for ratio in ratios), f"{1e6 * cost:.1f}")
    return table


def shares_of(references: Sequence[int]) -> dict[str, int]:
    distinct = len(set(references))
    return {f"{share:g} % ({round(distinct * share / 100)})": round(distinct * share / 100) for share in SHARES}


@click.command()
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One integer a line.")
@click.option(
    "--horizon", "horizons", type=int, multiple=True, default=(8000, 16000), help="In references; repeatable."
)
def main(trace: Path | None, horizons: tuple[int, ...]) -> None:
    console = Console()
    among = policies(horizons)
    pools = two_pools(random.Random(1993), 60_000)
    console.print(compare("Two pools, hits in %", pools, {"buffer 100": 100}, among, skip=10_000))
    skewed = zipf(random.Random(7), 100_000)
    sizes = shares_of(skewed)
    console.print(compare("Zipf over 10,000 objects with scans, hits in %", with_scans(skewed), sizes, among))
    if trace is not None:
        references = read_trace(trace)
        sizes = shares_of(references)
        console.print(compare(f"{trace.name}, hits in %", references, sizes, among))
        console.print(compare(f"{trace.name} with scans, hits in %", with_scans(references), sizes, among))


if __name__ == "__main__":
    main()
