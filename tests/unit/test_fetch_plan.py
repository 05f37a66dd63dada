"""The plan of a coded read, event by event."""

from __future__ import annotations

from protocol.fetch_plan import Ask, ShardPlan
from protocol.health import BACKOFF_FIRST_S, LATE_CAP_S, LATE_FLOOR_S, Health, SpareBudget
from protocol.ids import PeerId

KEEPERS = [PeerId(name) for name in "abcde"]


def test_k_of_the_keepers_are_asked_each_for_its_own_shard() -> None:
    plan = ShardPlan(KEEPERS, ["e", "a", "b", "c", "d"], 4)
    assert plan.start(urgent=False) == [Ask("e", 4), Ask("a", 0), Ask("b", 1), Ask("c", 2)]


def test_an_urgent_read_asks_all_at_once() -> None:
    assert len(ShardPlan(KEEPERS, KEEPERS, 4).start(urgent=True)) == 5


def test_any_k_distinct_shards_end_it() -> None:
    plan = ShardPlan(KEEPERS, KEEPERS, 4)
    plan.start(urgent=True)
    for index in (4, 2, 1):
        assert plan.got(KEEPERS[index], index) == []
        assert not plan.done
    plan.got("a", 0)
    assert plan.done


def test_a_failure_asks_the_next_keeper_and_a_second_one_is_the_end() -> None:
    plan = ShardPlan(KEEPERS, KEEPERS, 4)
    plan.start(urgent=False)
    assert plan.failed("a") == [Ask("e", 4)]
    assert plan.failed("b") == []
    assert not plan.stuck
    for peer in "cde":
        plan.got(peer, KEEPERS.index(peer))
    assert plan.stuck
    assert plan.retries == 2


def test_a_spare_is_one_more_request() -> None:
    plan = ShardPlan(KEEPERS, KEEPERS, 4)
    plan.start(urgent=False)
    assert plan.late() == [Ask("e", 4)]
    assert plan.late() == []


def test_a_shard_that_was_there_already_is_asked_for_by_its_number() -> None:
    """After a change of the view a keeper may answer with the shard that it kept before."""
    plan = ShardPlan(KEEPERS, KEEPERS, 4)
    plan.start(urgent=False)
    plan.got("b", 1)
    assert plan.got("a", 1) == [Ask("a", 0, exact=True)]


def test_the_quickest_is_asked_first_and_the_failing_last() -> None:
    health = Health()
    for peer, seconds in (("a", 0.5), ("b", 0.001)):
        for _ in range(20):
            health.asked(PeerId(peer))
            health.answered(PeerId(peer), seconds)
    health.asked(PeerId("c"))
    health.failed(PeerId("c"), 10.0)
    assert health.order([PeerId("c"), PeerId("a"), PeerId("b")], 10.0) == ["b", "a", "c"]
    assert health.avoided(PeerId("c"), 10.0 + BACKOFF_FIRST_S / 2)
    assert not health.avoided(PeerId("c"), 10.0 + BACKOFF_FIRST_S * 1.01)


def test_of_equals_the_one_with_the_least_outstanding_is_asked() -> None:
    health = Health()
    health.asked(PeerId("a"))
    assert health.order([PeerId("a"), PeerId("b")], 0.0) == ["b", "a"]
    health.dropped(PeerId("a"))
    assert health.order([PeerId("a"), PeerId("b")], 0.0) == ["a", "b"]


def test_lateness_follows_what_was_seen_between_floor_and_cap() -> None:
    health = Health()
    assert health.late_after_s(PeerId("a")) == LATE_FLOOR_S
    for _ in range(50):
        health.answered(PeerId("a"), 30.0)
    assert health.late_after_s(PeerId("a")) == LATE_CAP_S


def test_spares_are_a_share_of_what_was_asked() -> None:
    budget = SpareBudget(share=0.05, burst=2.0)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    budget.earned(19)
    assert not budget.spend()
    budget.earned(1)
    assert budget.spend()
