"""The hit ratio of the tiers' LRU-K compared with other policies, and checks that these match their names."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner, Result

from simulations import cache_policies
from simulations.cache_policies import (
    HOT,
    LRU,
    OPTIMUM,
    POLICIES,
    SHIPPED,
    SMALLEST,
    WARM_UP,
    Workload,
    cache,
    hit_ratio,
    run,
    shipped,
    two_pools,
    workloads,
)
from simulations.run import silent

INTERVAL_S = 60.0


def small(seed: int, length: int = 3000) -> Workload:
    rng = Random(seed)
    return Workload("small", [int(rng.expovariate(0.02)) for _ in range(length)], {}, INTERVAL_S)


def test_lru_k_finds_the_hot_pool() -> None:
    pools = Workload("two pools", two_pools(Random(1993)), {}, INTERVAL_S, warm_up=WARM_UP)
    assert hit_ratio(shipped, pools, HOT) >= 0.45
    assert hit_ratio(POLICIES[LRU], pools, HOT) < 0.23


def test_small_caches_lose_at_most_a_point_to_the_best_policy_under_scans() -> None:
    (scans,) = (load for load in workloads(1, (0.3, 3), INTERVAL_S, None) if load.name == "Zipf with scans")
    (result,) = run([scans], silent)
    assert min(result.ahead()) >= -1
    for ours, lru, best in zip(*(result.percent[name] for name in (SHIPPED, LRU, OPTIMUM)), strict=True):
        assert lru + 5 < ours < best


@pytest.mark.parametrize("size", [SMALLEST, 50])
def test_lru_is_lru(size: int) -> None:
    workload = small(2)
    held: OrderedDict[int, None] = OrderedDict()
    expected = []
    for key in workload.references:
        expected.append(key in held)
        held[key] = None
        held.move_to_end(key)
        if len(held) > size:
            held.popitem(last=False)
    assert list(POLICIES[LRU](workload, size)) == expected


@pytest.mark.parametrize("size", [SMALLEST, 50])
def test_the_optimum_evicts_the_entry_that_is_used_last(size: int) -> None:
    workload = small(3)
    held: dict[int, int] = {}
    expected = []
    for key, next_use in zip(workload.references, workload.next_uses, strict=True):
        expected.append(key in held)
        held[key] = next_use
        if len(held) > size:
            del held[max(held.keys() - {key}, key=held.__getitem__)]
    assert sum(POLICIES[OPTIMUM](workload, size)) == sum(expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_works_in_a_cache_of_few_entries(policy: str) -> None:
    assert hit_ratio(POLICIES[policy], small(4), SMALLEST) > 0.05


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_seed_decides_all_that_is_printed(monkeypatch: pytest.MonkeyPatch, form: list[str]) -> None:
    monkeypatch.setattr(cache_policies, "REFERENCES", 11_000)
    command = ["--sizes", "3", *form, "--seed"]
    first, second, other = (printed(*command, seed).output for seed in ("1", "1", "2"))
    assert first == second != other


def printed(*arguments: str) -> Result:
    return CliRunner().invoke(cache, arguments)


def test_a_trace_is_read_or_reported_as_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache_policies, "REFERENCES", 11_000)
    path = tmp_path / "trace.txt"
    path.write_text("1\n2\n1\n")
    assert "pass --trace FILE" in printed("--sizes", "100").output
    with_trace = printed("--sizes", "100", "--trace", str(path)).output
    assert "pass --trace FILE" not in with_trace
    assert "33.33" in with_trace
    path.write_text("one\n")
    assert "cannot be read as a trace" in printed("--trace", str(path)).output


@pytest.mark.parametrize("sizes", ["", "0", "101", "1,x"])
def test_impossible_sizes_are_refused(sizes: str) -> None:
    assert printed("--sizes", sizes).exit_code == 2
