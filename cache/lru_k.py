"""LRU-K as a cachetools policy (O'Neil, O'Neil & Weikum, SIGMOD 1993).

LRU evicts by the last use of an entry, so one pass over many entries that are used once displaces all others. LRU-K
evicts by the k-th last use, and remembers uses beyond eviction; entries with fewer than k uses are evicted first.

The classical rule loses to LRU in large caches, where it keeps entries that were used often, but long ago. `horizon`
prevents this: the k-th last reference never counts as older than `horizon` before the last one, so that the order of
eviction runs from LRU (horizon 0) to LRU-K (infinite). `python -m simulations cache` measures it.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

from cachetools import Cache
from sortedcontainers import SortedList

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

HISTORY_FLOOR = 64
"""Evicted entries that are remembered even if fewer are held, so that a cache of few large entries learns too."""
HISTORY_CEILING = 1 << 14
"""At most so many evicted entries are remembered, 150 bytes each, or as many as are held if these are more."""


class _Past(NamedTuple):
    """References to a held key: the times of the last k uncorrelated ones (oldest first), the time of the last, and the
    place in the order of eviction: the lowest `(score, turn)` is first."""

    times: tuple[float, ...]
    last: float
    place: tuple[float, int]


def _packed(past: _Past) -> bytes:
    return struct.pack(f"{1 + len(past.times)}d", past.last, *past.times)


def _unpacked(packed: bytes | None) -> tuple[float, tuple[float, ...]]:
    if packed is None:
        return -math.inf, ()
    last, *times = struct.unpack(f"{len(packed) // 8}d", packed)
    return last, tuple(times)


class LRUKCache(Cache[K, V]):
    """Evicts the entry whose k-th last reference is oldest, and the least recently used among equals.

    - `get`, `[]` and assignment are references; `in` is not. A reference less than `correlated` after the previous one
      to the same key belongs to that one, until `burst` after the first of them: an entry in constant use must not
      look like one that was used once.
    - The references to `history` times as many keys as are held (between HISTORY_FLOOR and HISTORY_CEILING) outlive
      their eviction or deletion; the keys that were evicted first are forgotten first. They are remembered by the hash
      of the key: two keys with the same hash have their past in common, which only makes the choice a little worse.
    - `correlated`, `burst` and `horizon` are in the timer's units; the timer never goes back.

    A reference moves the entry in a sorted list, so that no call does work for entries that it does not name.
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
        self._order: SortedList[tuple[float, int, K]] = SortedList()
        self.gone: dict[int, bytes] = {}

    def __getitem__(self, key: K) -> V:
        if key in self._held:  # else __missing__ may insert it, which refers to it
            self._refer(key)
        return super().__getitem__(key)

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self._refer(key)

    def __delitem__(self, key: K) -> None:
        super().__delitem__(key)
        past = self._held.pop(key)
        self._order.remove((*past.place, key))
        self.gone.pop(hash(key), None)
        self.gone[hash(key)] = _packed(past)
        held = len(self._held)
        while len(self.gone) > min(self._history * held + HISTORY_FLOOR, max(HISTORY_CEILING, held)):
            del self.gone[next(iter(self.gone))]

    def popitem(self) -> tuple[K, V]:
        """Evict an entry; this is not a reference. Raises KeyError when the cache is empty."""
        if not self._order:
            raise KeyError(f"{type(self).__name__} is empty")
        key = self._order[0][2]
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
        named: list[K] = []
        if size <= 0 and count <= 0:
            return named
        for _, _, key in self._order:
            named.append(key)
            size -= self.getsizeof(super().__getitem__(key))
            if size <= 0 and len(named) >= count:
                break
        return named

    def peek(self, key: K) -> V:
        """The value; this is not a reference. Raises KeyError."""
        return super().__getitem__(key)

    def replace(self, key: K, value: V) -> None:
        """Give a held key another value; this is not a reference."""
        super().__setitem__(key, value)

    def clear(self) -> None:
        super().clear()
        self._held.clear()
        self._order.clear()
        self.gone.clear()

    def _refer(self, key: K) -> None:
        now = self._timer()
        self._turn += 1
        held = self._held.get(key)
        if held is not None:
            self._order.remove((*held.place, key))
            last, times = held.last, held.times
        else:
            last, times = _unpacked(self.gone.pop(hash(key), None))
        belongs = now - last < self._correlated and now - times[-1] < self._burst
        times = times if belongs else (*times, now)[-self._k :]
        score = max(times[0] if len(times) == self._k else -math.inf, now - self._horizon)
        self._held[key] = _Past(times, now, (score, self._turn))
        self._order.add((score, self._turn, key))
