"""LRU-K against its definition, written down naively, and against the interface of cachetools."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from cachetools import Cache, LRUCache, cached
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.lru_k import HISTORY_FLOOR, LRUKCache


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Definition:
    """Keeps every reference ever made, and computes each eviction anew from the definition."""

    maxsize: int
    k: int
    correlated: float
    burst: float
    history: float
    horizon: float
    clock: Clock
    sizes: dict[str, int] = field(default_factory=dict)
    references: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    turn: int = 0

    def bursts(self, key: str) -> list[float]:
        starts, before = list[float](), -math.inf
        for time, _ in self.references[key]:
            if not time - before < self.correlated or time - starts[-1] >= self.burst:
                starts.append(time)
            before = time
        return starts

    def order(self, key: str) -> tuple[float, int]:
        bursts = self.bursts(key)
        last, turn = self.references[key][-1]
        return max(bursts[-self.k] if len(bursts) >= self.k else -math.inf, last - self.horizon), turn

    def refer(self, key: str) -> None:
        self.turn += 1
        self.references.setdefault(key, []).append((self.clock(), self.turn))
        if key in self.gone:
            self.gone.remove(key)

    def get(self, key: str) -> None:
        if key in self.sizes:
            self.refer(key)

    def ordered(self) -> list[str]:
        return sorted(self.sizes, key=self.order)

    def delete(self, key: str) -> None:
        del self.sizes[key]
        self.gone.append(key)
        while len(self.gone) > self.history * len(self.sizes) + HISTORY_FLOOR:
            del self.references[self.gone.pop(0)]

    def put(self, key: str, size: int) -> None:
        while sum(self.sizes.values()) - self.sizes.get(key, 0) + size > self.maxsize:
            self.delete(self.ordered()[0])
        self.sizes[key] = size
        self.refer(key)

    def victims(self, need: int) -> list[str]:
        named: list[str] = []
        while self.maxsize - sum(size for key, size in self.sizes.items() if key not in named) < need:
            named.append(self.ordered()[len(named)])
        return named


keys = st.integers(0, 14).map(str) | st.integers(0, 150).map(str)
STEPS = [
    st.tuples(st.just("get"), keys),
    st.tuples(st.just("put"), keys, st.integers(0, 12)),
    st.tuples(st.just("put"), keys, st.just(1)),
    st.tuples(st.just("delete"), keys),
    st.tuples(st.just("look"), keys),
    st.tuples(st.just("pop")),
    st.tuples(st.just("victims"), st.integers(0, 12)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 3.0, 20.0])),
    st.tuples(st.just("scan"), st.integers(200, 400), st.integers(1, 120)),
]
times = st.fixed_dictionaries(
    {
        "correlated": st.sampled_from([0.0, 1.0, 2.5]),
        "burst": st.sampled_from([math.inf, 0.0, 3.0]),
        "history": st.sampled_from([0.0, 1.0, 8.0]),
        "horizon": st.sampled_from([math.inf, 0.0, 4.0, 30.0]),
    }
)
"""Parameters of the cache. `history` is a factor, and the others are seconds."""


@settings(max_examples=300)
@given(st.lists(st.one_of(STEPS), max_size=60), st.integers(1, 3), times)
def test_it_evicts_as_the_definition_does(script: list[tuple[object, ...]], k: int, times: dict[str, float]) -> None:
    clock = Clock()
    cache = LRUKCache[str, int](12, lambda size: size, k=k, timer=clock, **times)
    model = Definition(12, k, clock=clock, **times)
    for step in script:
        apply(step, cache, model, clock)
        assert {key: Cache.__getitem__(cache, key) for key in cache} == model.sizes  # by no reference
        assert cache.currsize == sum(model.sizes.values())
    assert cache.victims(12) == model.victims(12)


def apply(step: tuple[object, ...], cache: LRUKCache[str, int], model: Definition, clock: Clock) -> None:
    match step:
        case "get", str(key):
            assert cache.get(key) == model.sizes.get(key)
            model.get(key)
        case "put", str(key), int(size):
            cache[key] = size
            model.put(key, size)
        case "delete", str(key) if key in model.sizes:
            del cache[key]
            model.delete(key)
        case "look", str(key):
            assert (key in cache) == (key in model.sizes)
        case ("pop",) if model.sizes:
            victim = model.ordered()[0]
            assert cache.popitem() == (victim, model.sizes[victim])
            model.delete(victim)
        case "victims", int(need):
            assert cache.victims(need) == model.victims(need)
        case "wait", float(seconds):
            clock.now += seconds
        case "scan", int(start), int(count):
            for number in range(start, start + count):
                cache[str(number)] = 1
                model.put(str(number), 1)


def test_two_references_outlive_any_number_of_single_ones() -> None:
    cache = LRUKCache[str, int](10)
    cache["hot"] = 1
    assert cache["hot"] == 1
    for key in range(1000):
        cache[str(key)] = key
    assert "hot" in cache
    assert len(cache) == 10


def test_history_outlives_eviction() -> None:
    cache = LRUKCache[str, int](2)
    for key in ("a", "b", "c", "a", "d"):  # "a" returns, so it has two references when "d" needs room
        cache[key] = 0
    assert set(cache) == {"a", "d"}


def test_without_history_an_entry_that_returns_is_new() -> None:
    cache = LRUKCache[int, int](2, history=0)
    cache[-1] = 0
    for key in range(HISTORY_FLOOR + 3):
        cache[key] = 0
    cache[-1] = 0
    cache[0] = 0
    cache[1000] = 0
    assert set(cache) == {0, 1000}  # 0 is still among the floor's, -1 is not


def test_a_burst_counts_once() -> None:
    clock = Clock()
    cache = LRUKCache[str, int](2, correlated=5.0, timer=clock)
    cache["burst"] = 0
    for _ in range(10):
        clock.now += 4.9
        assert cache["burst"] == 0
    cache["twice"] = 0
    clock.now += 5.0
    assert cache["twice"] == 0
    assert cache["burst"] == 0
    cache["new"] = 0
    assert set(cache) == {"twice", "new"}


def test_an_entry_in_constant_use_does_not_count_as_used_once() -> None:
    clock = Clock()
    cache = LRUKCache[str, int](2, correlated=5.0, burst=20.0, timer=clock)
    cache["always"] = 0
    for _ in range(5):
        clock.now += 4.9
        assert cache["always"] == 0
    cache["new"] = 0
    cache["newer"] = 0
    assert set(cache) == {"always", "newer"}


def test_zero_horizon_is_lru() -> None:
    rng = random.Random(3)
    ours, theirs = LRUKCache[int, int](20, horizon=0.0, timer=Ticks()), LRUCache[int, int](20)
    for _ in range(3000):
        key = int(rng.expovariate(0.05))
        for cache in (ours, theirs):
            if cache.get(key) is None:
                cache[key] = 1
        assert set(ours) == set(theirs)


class Ticks:
    """A timer that counts its readings. The cache reads it once for each reference."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return self.count


def test_memory_is_bounded() -> None:
    cache = LRUKCache[int, int](50, history=2.0)
    rng = random.Random(5)
    for turn in range(20_000):
        if rng.random() < 0.3:
            cache.get(rng.randrange(200))
        elif rng.random() < 0.2 and len(cache):
            del cache[rng.choice(list(cache))]
        else:
            cache[turn if rng.random() < 0.5 else rng.randrange(200)] = turn
        assert len(cache.gone) <= 2 * 50 + HISTORY_FLOOR


def two_pool_hits(cache: Cache[int, int], rng: random.Random, references: int = 30_000, warm_up: int = 5_000) -> float:
    """The paper's first experiment (section 4.1): references alternate between 100 hot and 10,000 cold entries."""
    hits = 0
    for turn in range(references):
        key = rng.randrange(100) if turn % 2 else 100 + rng.randrange(10_000)
        if cache.get(key) is None:
            cache[key] = 1
        elif turn >= warm_up:
            hits += 1
    return hits / (references - warm_up)


def test_two_pools() -> None:
    assert two_pool_hits(LRUKCache(100), random.Random(1993)) >= 0.45
    assert two_pool_hits(LRUCache(100), random.Random(1993)) < 0.25


def test_cachetools_interface() -> None:
    cache: Cache[str, str] = LRUKCache(10, getsizeof=len)
    cache["a"] = "xxx"
    assert (cache.maxsize, cache.currsize, len(cache), cache.getsizeof("xxx")) == (10, 3, 1, 3)
    assert cache.setdefault("a", "other") == "xxx"
    assert cache.setdefault("b", "yy") == "yy"
    cache["a"] = "xxxxx"
    assert cache.currsize == 7
    assert cache.pop("b") == "yy"
    assert cache.pop("b", None) is None
    with pytest.raises(KeyError):
        cache.pop("b")
    with pytest.raises(KeyError):
        cache["b"]
    with pytest.raises(ValueError, match="value too large"):
        cache["c"] = "x" * 11
    assert dict(cache) == {"a": "xxxxx"}
    cache.update(b="yy", c="zz")
    assert cache.popitem() == ("c", "zz")  # "b" was known from before
    assert "maxsize=10" in repr(cache)
    cache.clear()
    assert (len(cache), cache.currsize) == (0, 0)
    with pytest.raises(KeyError, match="empty"):
        cache.popitem()


def test_a_value_that_grows_evicts_others() -> None:
    cache = LRUKCache[str, str](4, len)
    cache.update(a="x", b="x", c="x")
    cache["a"] = "xxx"
    assert dict(cache) == {"a": "xxx", "c": "x"}


def test_missing_may_insert() -> None:
    class Squares(LRUKCache[int, int]):
        def __missing__(self, key: int) -> int:
            self[key] = key * key
            return key * key

    cache = Squares(2)
    assert [cache[3], cache[4], cache[5]] == [9, 16, 25]
    assert list(cache) == [4, 5]
    assert cache[4] == 16
    assert cache.victims(1) == [5]  # 4 has two references; its insertion counted as one


def test_as_the_cache_of_a_function() -> None:
    calls = []

    @cached(LRUKCache(2))
    def double(value: int) -> int:
        calls.append(value)
        return 2 * value

    assert [double(n) for n in (1, 1, 2, 3, 1)] == [2, 2, 4, 6, 2]
    assert calls == [1, 2, 3]


def test_naming_victims_changes_nothing() -> None:
    cache = LRUKCache[str, str](6, len)
    cache.update(a="xx", b="xx", c="xx")
    assert cache["a"] == "xx"
    assert cache.victims(0) == []
    assert cache.victims(3) == ["b", "c"]
    assert cache.victims(3) == ["b", "c"]
    assert cache.victims(6) == ["b", "c", "a"]
    with pytest.raises(ValueError, match="too large"):
        cache.victims(7)
    assert len(cache) == 3


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"correlated": -1.0}, {"burst": -1.0}, {"history": -0.1}, {"horizon": -1.0}]
)
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LRUKCache(10, **wrong)
