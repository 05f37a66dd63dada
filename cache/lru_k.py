"""LRU-K as a cachetools policy (O'Neil, O'Neil & Weikum, SIGMOD 1993).

LRU evicts by the last use of an entry, so one pass over many entries that are used once displaces all others. LRU-K
evicts by the k-th last use, and remembers uses beyond eviction; entries with fewer than k uses are evicted first.

The classical rule loses to LRU in large caches, where it keeps entries that were used often, but long ago. `horizon`
prevents this: the k-th last reference never counts as older than `horizon` before the last one, so that the order of
eviction runs from LRU (horizon 0) to LRU-K (infinite). `python -m simulations cache` measures it.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple, TypeVar

from cachetools import Cache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

HISTORY_FLOOR = 64
"""Evicted entries that are remembered even if fewer are held, so that a cache of few large entries learns too."""
HEAP_FLOOR = 64
"""A smaller heap is not rebuilt to drop outdated entries: that costs more than it saves."""


class _Past(NamedTuple):
    """References to a key: the times of the last k uncorrelated ones (oldest first); time and number of the last."""

    times: tuple[float, ...]
    last: float
    turn: int


_UNKNOWN = _Past((), -math.inf, 0)


class LRUKCache(Cache[K, V]):
    """Evicts the entry whose k-th last reference is oldest, and the least recently used among equals.

    - `get`, `[]` and assignment are references; `in` is not. A reference less than `correlated` after the previous one
      to the same key belongs to that one, until `burst` after the first of them: an entry in constant use must not
      look like one that was used once.
    - The references to `history` times as many keys as are held (and HISTORY_FLOOR) outlive their eviction or
      deletion; the keys that were evicted first are forgotten first.
    - `correlated`, `burst` and `horizon` are in the timer's units; the timer never goes back.

    The heap holds each entry under one of its earlier orders. As references only raise an entry's order, that is a
    lower bound, corrected when it comes to the top: a hit costs O(1), an eviction O(log n) amortised.
    """

    def __init__(
        self,
        maxsize: float,
        getsizeof: Callable[[V], float] | None = None,
        *,
        k: int = 2,
        correlated: float = 0.0,
        burst: float = math.inf,
        history: float = 8.0,
        horizon: float = math.inf,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if k < 1 or min(correlated, burst, history, horizon) < 0:
            raise ValueError("k must be positive; correlated, burst, history and horizon must be non-negative")
        super().__init__(maxsize, getsizeof)
        self._k, self._history, self._timer = k, history, timer
        self._correlated, self._burst, self._horizon = correlated, burst, horizon
        self._turn = 0
        self._held: dict[K, _Past] = {}
        self.gone: OrderedDict[K, _Past] = OrderedDict()
        self.heap: list[tuple[float, int, K]] = []

    def __getitem__(self, key: K) -> V:
        if key in self._held:  # else __missing__ may insert it, which refers to it
            self._refer(key)
        return super().__getitem__(key)

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self._refer(key)

    def __delitem__(self, key: K) -> None:
        super().__delitem__(key)
        self.gone[key] = self._held.pop(key)
        while len(self.gone) > self._history * len(self._held) + HISTORY_FLOOR:
            self.gone.popitem(last=False)

    def popitem(self) -> tuple[K, V]:
        """Evict an entry; this is not a reference. Raises KeyError when the cache is empty."""
        key = self._oldest()
        value = super().__getitem__(key)
        del self[key]
        return key, value

    def victims(self, need: float) -> list[K]:
        """The keys to delete, in order, so that `need` more fits; nothing is deleted or referenced. Later calls name
        the same keys until these are deleted. Raises ValueError if `need` can never fit."""
        if need > self.maxsize:
            raise ValueError("value too large")
        return self.worth(need - (self.maxsize - self.currsize))

    def worth(self, size: float, count: int = 0) -> list[K]:
        """As `victims`: at least `count` keys, of at least `size` in total; all keys if they are less."""
        named: dict[K, tuple[float, int, K]] = {}
        while (size > 0 or len(named) < count) and len(named) < len(self):
            key = self._oldest()
            entry = heappop(self.heap)
            if key not in named:
                named[key] = entry
                size -= self.getsizeof(super().__getitem__(key))
        for entry in named.values():
            heappush(self.heap, entry)
        return list(named)

    def peek(self, key: K) -> V:
        """The value; this is not a reference. Raises KeyError."""
        return super().__getitem__(key)

    def clear(self) -> None:
        super().clear()
        self._held.clear()
        self.gone.clear()
        self.heap.clear()

    def _refer(self, key: K) -> None:
        now = self._timer()
        self._turn += 1
        held = self._held.get(key)
        past = held or self.gone.pop(key, _UNKNOWN)
        belongs = now - past.last < self._correlated and now - past.times[-1] < self._burst
        times = past.times if belongs else (*past.times, now)[-self._k :]
        self._held[key] = _Past(times, now, self._turn)
        if held is None:
            self._enqueue(key)

    def _order(self, key: K) -> tuple[float, int]:
        """The entry with the lowest order is evicted first."""
        times, last, turn = self._held[key]
        return max(times[0] if len(times) == self._k else -math.inf, last - self._horizon), turn

    def _enqueue(self, key: K) -> None:
        heappush(self.heap, (*self._order(key), key))
        if len(self.heap) > 2 * len(self._held) + HEAP_FLOOR:
            self.heap = [(*self._order(other), other) for other in self._held]
            heapify(self.heap)

    def _oldest(self) -> K:
        """The key to evict next, which is then at the top of the heap."""
        while self.heap:
            score, turn, key = self.heap[0]
            if key not in self._held:
                heappop(self.heap)
            elif (order := self._order(key)) != (score, turn):
                heapreplace(self.heap, (*order, key))
            else:
                return key
        raise KeyError(f"{type(self).__name__} is empty")
