"""Properties of the choice between the site and the registry, and the choice in a closed loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ways import (
    FIRST_PAUSE_S,
    FRESH_S,
    LEAST_READS,
    LONGEST_PAUSE_S,
    MARGIN,
    PROBE_EVERY,
    Gauge,
    Reason,
    Way,
    Ways,
)

STRIPE = 1 << 21
RATES = st.floats(1e4, 1e9)


def fed(gauge: Gauge, rate: float, first_s: float, now: float, reads: int = 2 * LEAST_READS) -> float:
    """Read stripes one after the other at a rate. Returns the time at the end."""
    for _ in range(reads):
        reading = gauge.begin(STRIPE, now)
        now += first_s
        reading.came(1, now)
        now += STRIPE / rate
        reading.came(STRIPE - 1, now)
        reading.ended(now)
    return now


def known(site_rate: float, registry_rate: float, first_s: float = 0.0) -> tuple[Ways, float]:
    ways = Ways()
    return ways, max(fed(ways.site, site_rate, first_s, 0.0), fed(ways.registry, registry_rate, first_s, 0.0))


@given(RATES, st.floats(0.0, 1.0))
def test_a_gauge_measures_a_steady_way(rate: float, first_s: float) -> None:
    gauge = Gauge()
    fed(gauge, rate, first_s, 100.0)
    took_s = first_s + STRIPE / rate
    assert gauge.rate == pytest.approx(STRIPE / took_s, rel=0.5)
    assert gauge.owed == gauge.reads == 0
    assert gauge.seconds(STRIPE) <= first_s + 2.1 * took_s


@given(st.lists(st.tuples(st.integers(0, 3 * STRIPE), st.floats(0, 10), st.booleans())))
def test_whatever_comes_a_gauge_owes_what_its_reads_lack(events: list[tuple[int, float, bool]]) -> None:
    gauge, now, reading = Gauge(), 0.0, None
    for count, pause_s, ends in events:
        now += pause_s
        if reading is None:
            reading = gauge.begin(STRIPE, now)
        reading.came(count, now)
        assert 0 <= gauge.owed <= STRIPE
        if ends:
            reading.ended(now)
            reading = None
            assert (gauge.owed, gauge.reads) == (0, 0)
        assert gauge.rate >= 0
        assert gauge.seconds(1) >= 0


@given(RATES, RATES)
def test_the_registry_is_chosen_only_if_it_is_clearly_faster(site_rate: float, registry_rate: float) -> None:
    ways, now = known(site_rate, registry_rate)
    if abs(now) > FRESH_S:
        return
    choice = ways.choose(STRIPE, now)
    faster = MARGIN * ways.registry.seconds(STRIPE) < ways.site.seconds(STRIPE)
    faster &= ways.registry.peak > MARGIN * ways.site.rate
    assert (choice.way is Way.REGISTRY) == (faster and ways.site.knows(now) and ways.registry.knows(now))


def test_nothing_is_preferred_of_which_too_little_is_known_lately() -> None:
    ways = Ways()
    fed(ways.site, 1e6, 0.0, 0.0)
    assert ways.choose(STRIPE, 20.0).reason is Reason.UNKNOWN
    now = fed(ways.registry, 1e9, 0.0, 20.0)
    assert ways.choose(STRIPE, now).way is Way.REGISTRY
    assert ways.choose(STRIPE, now + FRESH_S + 1).reason is Reason.UNKNOWN


def test_the_uplink_must_be_wide_enough_for_all_nodes() -> None:
    ways, now = known(1e6, 1e7)
    assert ways.choose(STRIPE, now, nodes=5).way is Way.REGISTRY
    assert ways.choose(STRIPE, now, nodes=10).way is Way.SITE


def test_a_budget_is_never_spent_on_speed() -> None:
    ways, now = known(1e6, 1e9)
    assert ways.choose(STRIPE, now).way is Way.REGISTRY
    assert ways.choose(STRIPE, now, budget=True).reason is Reason.BUDGET


def test_one_read_in_a_few_measures_the_site() -> None:
    ways, now = known(1e6, 1e9)
    chosen = [ways.choose(STRIPE, now) for _ in range(4 * PROBE_EVERY)]
    assert [choice.reason for choice in chosen].count(Reason.PROBE) == 4
    assert sum(choice.way is Way.SITE for choice in chosen) == 4


def test_a_registry_that_pushes_back_is_left_at_once_and_for_longer_each_time() -> None:
    ways, now = known(1e6, 1e9)
    pauses: list[int] = []
    for _ in range(8):
        left_at = now
        assert ways.choose(STRIPE, now, pushed_at=now).reason is Reason.PUSHED_BACK
        while ways.choose(STRIPE, now, pushed_at=left_at).reason is Reason.PUSHED_BACK:
            now += 1
        pauses.append(round(now - left_at))
        assert ways.choose(STRIPE, now, pushed_at=left_at).reason is Reason.UNKNOWN, "it is measured anew"
        fed(ways.site, 1e6, 0.0, now)
        now = fed(ways.registry, 1e9, 0.0, now) + 20
        assert ways.choose(STRIPE, now, pushed_at=left_at).way is Way.REGISTRY
    assert pauses[0] == pytest.approx(FIRST_PAUSE_S, abs=1)
    assert pauses == sorted(pauses), "each is as long as the one before, or longer"
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S, abs=1)


def test_a_growing_time_to_the_first_byte_counts_as_pushing_back() -> None:
    ways, now = known(1e6, 1e9, first_s=0.02)
    fed(ways.site, 1e6, 0.0, now)
    assert ways.choose(STRIPE, now).way is Way.REGISTRY
    now = fed(ways.registry, 1e9, 2.0, now, reads=2)
    assert ways.choose(STRIPE, now).reason is Reason.PUSHED_BACK


def test_a_node_that_is_busy_itself_blames_no_registry() -> None:
    ways, now = known(1e6, 1e9, first_s=0.02)
    now = max(fed(ways.site, 1e6, 3.0, now), fed(ways.registry, 1e9, 2.0, now, reads=2))
    assert ways.choose(STRIPE, now).reason is not Reason.PUSHED_BACK


# A crowd that pulls one image at once. All of it is arithmetic: in each step every node reads some stripes, and the
# shared links decide how long the step takes.


@dataclass
class Crowd:
    """`uplink`, `link` and `serve` (what a node's processor sends or receives of members) in bytes a second."""

    nodes: int
    uplink: float
    link: float
    serve: float
    stripes: int = 200

    def copies(self) -> float:
        """Copies that cross the uplink."""
        ways = [Ways() for _ in range(self.nodes)]
        now, read, crossed = 0.0, 0, 0.0
        window = 8
        while read < self.stripes:
            now, direct = self._step(ways, now, window)
            crossed += window + direct
            read += window
        return crossed / read

    def _step(self, ways: list[Ways], now: float, window: int) -> tuple[float, int]:
        """All nodes read the next `window` stripes. Each stripe crosses the uplink to its home once."""
        direct = 0
        chosen = [[node.choose(STRIPE, now, nodes=self.nodes) for _ in range(window)] for node in ways]
        for choices in chosen:
            direct += sum(choice.way is Way.REGISTRY for choice in choices)
        at_homes = max(1.0, window / self.nodes)
        own = [at_homes + sum(choice.way is Way.REGISTRY for choice in choices) for choices in chosen]
        cold_s = (window + direct) * STRIPE / self.uplink
        ends = now
        for node, choices, count in zip(ways, chosen, own, strict=True):
            registry_s = max(cold_s, count * STRIPE / self.link)
            by_site = sum(choice.way is Way.SITE for choice in choices)
            site_s = max(cold_s, by_site * STRIPE / min(self.link, self.serve))
            for gauge, reads, took_s in ((node.registry, math.ceil(count), registry_s), (node.site, by_site, site_s)):
                readings = [gauge.begin(STRIPE, now) for _ in range(reads)]
                for reading in readings:
                    reading.came(1, now + 0.01)
                for reading in readings:
                    reading.came(STRIPE - 1, now + took_s + 0.01)
                    reading.ended(now + took_s + 0.01)
            ends = max(ends, now + 0.01 + max(registry_s, site_s))
        return ends, direct


@given(st.integers(2, 40), st.sampled_from([1.25e6, 2.5e6, 5e6]), st.sampled_from([2.5e6, 5e6, 12.5e6]))
def test_a_thin_uplink_carries_one_copy(nodes: int, uplink: float, link: float) -> None:
    assert Crowd(nodes, uplink, link, 3e7).copies() <= 1.05
    assert Crowd(nodes, uplink, link, uplink / nodes).copies() <= 1.05, "if processors are slow"


def test_a_fast_registry_is_used_where_processors_are_few() -> None:
    assert Crowd(5, 1e9, 1e9, 2e7).copies() > 3
