"""The plan of a coded read, event by event."""

from __future__ import annotations

import math

from protocol.fetch_plan import (
    COLD_FLOOR_S,
    LAST_FACTOR,
    PATIENCE_FACTOR,
    PATIENCE_S,
    SETTLE_S,
    TURN_FACTOR,
    WARM_FLOOR_S,
    Ask,
    ShardPlan,
)
from protocol.health import (
    BACKOFF_FIRST_S,
    FADE_S,
    LATE_CAP_S,
    QUICK_S,
    UNFIT_S,
    UNKNOWN_LATE_S,
    Health,
    SpareBudget,
)
from protocol.ids import PeerId

KEEPERS = [PeerId(name) for name in "abcde"]


def plan_of(order: str = "abcde", k: int = 4, late_after_s: float = 0.0) -> ShardPlan:
    return ShardPlan(KEEPERS, [PeerId(name) for name in order], k, lambda peer: late_after_s)


def test_k_of_the_keepers_are_asked_each_for_its_own_shard() -> None:
    plan = plan_of("eabcd")
    assert plan.start(all_at_once=False, now=0.0) == [Ask("e", 4), Ask("a", 0), Ask("b", 1), Ask("c", 2)]


def test_an_urgent_read_asks_all_at_once() -> None:
    assert len(plan_of().start(all_at_once=True, now=0.0)) == 5


def test_any_k_distinct_shards_end_it() -> None:
    plan = plan_of()
    plan.start(all_at_once=True, now=0.0)
    for index in (4, 2, 1):
        assert plan.got(KEEPERS[index], index, 0.0) == []
        assert not plan.done
    plan.got("a", 0, 0.0)
    assert plan.done


def test_a_failure_asks_the_next_keeper_and_a_second_failure_ends_the_read() -> None:
    plan = plan_of()
    plan.start(all_at_once=False, now=0.0)
    assert plan.failed("a", 0.0) == [Ask("e", 4)]
    assert plan.failed("b", 0.0) == []
    assert not plan.stuck
    for peer in "cde":
        plan.got(peer, KEEPERS.index(peer), 0.0)
    assert plan.stuck
    assert plan.retries == 2


def test_a_spare_is_one_more_request() -> None:
    plan = plan_of()
    plan.start(all_at_once=False, now=0.0)
    assert plan.has_spare
    assert plan.spare(0.0) == [Ask("e", 4)]
    assert not plan.has_spare
    assert plan.spare(0.0) == []


def test_after_a_duplicate_the_exact_shard_is_asked_for() -> None:
    """After a change of the view a keeper may answer with the shard that it kept before."""
    plan = plan_of()
    plan.start(all_at_once=False, now=0.0)
    plan.got("b", 1, 0.0)
    assert plan.got("a", 1, 0.0) == [Ask("a", 0, exact=True)]


def test_answers_are_late_soon_after_the_first_and_a_cold_start_gets_more_time() -> None:
    plan = plan_of()
    plan.start(all_at_once=False, now=0.0)
    assert plan.next_check() == COLD_FLOOR_S
    plan.got(KEEPERS[0], 0, 0.01)
    assert plan.next_check() == WARM_FLOOR_S
    late, asks = plan.overdue(WARM_FLOOR_S)
    assert (late, asks) == (KEEPERS[1:4], [])


def test_the_clock_of_a_keeper_stands_still_while_it_waits_for_the_registry() -> None:
    plan = plan_of()
    plan.start(all_at_once=False, now=0.0)
    for peer in KEEPERS[:4]:
        plan.heard(peer, False, 0.25)
    assert plan.next_check() == math.inf
    assert plan.took_s(KEEPERS[1], 5.0) is None
    plan.got(KEEPERS[0], 0, 5.0)
    plan.heard(KEEPERS[1], False, 5.01)
    settled = 5.0 + SETTLE_S
    assert plan.next_check() == settled + WARM_FLOOR_S
    assert plan.took_s(KEEPERS[1], settled + 1.0) == 1.0


def test_a_peer_that_answers_other_requests_gets_more_time_but_not_forever() -> None:
    answered_at = -math.inf
    plan = ShardPlan(KEEPERS, KEEPERS, 1, lambda peer: 2.0, answered_at=lambda peer: answered_at)
    plan.start(all_at_once=False, now=10.0)
    assert plan.next_check() == 12.0
    answered_at = 11.5
    assert plan.next_check() == 13.5
    answered_at = 13.4
    assert plan.next_check() == 10.0 + TURN_FACTOR * 2.0


def test_an_answer_that_takes_no_longer_than_its_siblings_is_not_late() -> None:
    plan = plan_of(late_after_s=0.1)
    plan.start(all_at_once=False, now=0.0)
    plan.heard(KEEPERS[0], True, 0.0)
    plan.got(KEEPERS[0], 0, 1.0)
    assert plan.next_check() == 1.0


def test_the_clock_runs_on_once_the_answer_is_ready() -> None:
    plan = plan_of(k=1)
    plan.start(all_at_once=False, now=0.0)
    plan.heard(KEEPERS[0], False, 0.25)
    plan.heard(KEEPERS[0], True, 2.0)
    plan.heard(KEEPERS[0], True, 2.3)
    assert plan.next_check() == 2.0 + COLD_FLOOR_S


def test_a_late_peer_is_given_up_and_another_asked_but_it_may_still_answer() -> None:
    plan = plan_of(k=1, late_after_s=2.0)
    plan.start(all_at_once=False, now=0.0)
    assert plan.overdue(2.0) == ([KEEPERS[0]], [])
    given_up_at = 2.0 + PATIENCE_FACTOR * 2.0 + PATIENCE_S
    assert plan.next_check() == given_up_at
    assert plan.overdue(given_up_at) == ([], [Ask(KEEPERS[1], 1)])
    plan.got(KEEPERS[0], 0, 7.0)
    assert plan.done


def test_a_slow_peer_is_left_out_until_its_history_fades() -> None:
    health = Health()
    for peer in KEEPERS:
        for _ in range(30):
            health.answered(peer, 5.0 if peer == "c" else 0.05, 100.0)
    assert health.usable(KEEPERS, 100.0) == [peer for peer in KEEPERS if peer != "c"]
    assert health.usable(KEEPERS, 100.0 + 3 * FADE_S) == KEEPERS


def test_no_peer_lags_when_all_are_slow() -> None:
    health = Health()
    for peer in KEEPERS:
        health.overdue(peer, 20.0, 100.0)
    assert health.usable(KEEPERS, 100.0) == KEEPERS


def test_the_quickest_is_asked_first_and_the_failing_last() -> None:
    health = Health()
    for peer, seconds in (("a", 0.5), ("b", 0.001)):
        for _ in range(20):
            health.asked(PeerId(peer))
            health.answered(PeerId(peer), seconds, 10.0)
    health.asked(PeerId("c"))
    health.failed(PeerId("c"), 10.0)
    assert health.order([PeerId("c"), PeerId("a"), PeerId("b")], 10.0) == ["b", "a", "c"]
    assert health.avoided(PeerId("c"), 10.0 + BACKOFF_FIRST_S / 2)
    assert not health.avoided(PeerId("c"), 10.0 + BACKOFF_FIRST_S * 1.01)


def test_a_beaten_peer_is_asked_after_the_others_until_it_answers_in_time() -> None:
    """Its open request was given up, so that by its mean alone it would be asked first."""
    health = Health()
    health.answered(PeerId("a"), 0.01, 9.0)
    for peer in "bc":
        for _ in range(8):
            health.asked(PeerId(peer))
    health.failed(PeerId("c"), 10.0)
    health.beaten(PeerId("a"), 10.0)
    assert health.order([PeerId(name) for name in "abc"], 10.0) == ["b", "a", "c"]
    assert not health.avoided(PeerId("a"), 10.0)
    health.answered(PeerId("a"), 0.1, 11.0)
    assert health.order([PeerId(name) for name in "ab"], 11.0) == ["b", "a"]
    health.answered(PeerId("a"), 0.01, 11.0)
    assert health.order([PeerId(name) for name in "ab"], 11.0) == ["a", "b"]


def test_a_peer_that_is_beaten_repeatedly_is_tried_less_often() -> None:
    health = Health()
    now = 0.0
    for wait_s in (BACKOFF_FIRST_S, 2 * BACKOFF_FIRST_S):
        health.beaten(PeerId("a"), now)
        health.beaten(PeerId("a"), now)
        health.asked(PeerId("b"))
        assert health.order([PeerId(name) for name in "ab"], now + 0.99 * wait_s) == ["b", "a"]
        now += 1.01 * wait_s
        assert health.order([PeerId(name) for name in "ab"], now) == ["a", "b"]


def test_the_last_shard_is_late_relative_to_its_siblings() -> None:
    """A peer's history may be from a busier time, but its siblings share the links with it now."""
    plan = plan_of(late_after_s=5.0)
    plan.start(False, 0.0)
    for index in range(2):
        plan.got(KEEPERS[index], index, 0.1)
    assert plan.next_check() == 5.0
    plan.got(KEEPERS[2], 2, 0.3)
    assert plan.next_check() == LAST_FACTOR * 0.3
    assert plan.overdue(LAST_FACTOR * 0.3) == ([KEEPERS[3]], [])


def test_a_read_lists_the_peers_that_it_beat() -> None:
    plan = plan_of(k=1, late_after_s=2.0)
    plan.start(False, 0.0)
    plan.overdue(2.0)
    plan.spare(2.0)
    plan.got(KEEPERS[1], 1, 2.1)
    assert plan.beaten == [KEEPERS[0]]


def test_answers_are_steady_once_they_are_even() -> None:
    health = Health()
    health.answered(PeerId("a"), 0.1, 1.0)
    assert not health.steady([PeerId("a"), PeerId("c")])
    for _ in range(20):
        health.answered(PeerId("a"), 0.04, 1.0)
        health.answered(PeerId("b"), 0.04, 1.0)
    assert health.steady([PeerId("a"), PeerId("b")])
    health.answered(PeerId("b"), 0.3, 1.0)
    assert not health.steady([PeerId("a"), PeerId("b")])


def test_very_quick_answers_are_not_steady() -> None:
    """Asking for all five at once is better then: it takes far less than WARM_FLOOR_S, after which a spare is asked."""
    health = Health()
    for _ in range(100):
        health.answered(PeerId("a"), QUICK_S / 2, 1.0)
        health.answered(PeerId("b"), QUICK_S * 2, 1.0)
    assert not health.steady([PeerId("a")])
    assert health.steady([PeerId("b")])


def test_among_equal_peers_the_one_with_the_fewest_open_requests_is_asked() -> None:
    health = Health()
    health.asked(PeerId("a"))
    assert health.order([PeerId("a"), PeerId("b")], 0.0) == ["b", "a"]
    health.dropped(PeerId("a"))
    assert health.order([PeerId("a"), PeerId("b")], 0.0) == ["a", "b"]


def test_lateness_follows_measured_times_up_to_a_cap() -> None:
    health = Health()
    assert health.late_after_s(PeerId("a")) == UNKNOWN_LATE_S
    for _ in range(50):
        health.answered(PeerId("a"), 30.0, 0.0)
    assert health.late_after_s(PeerId("a")) == LATE_CAP_S


def test_spares_are_a_share_of_all_requests() -> None:
    budget = SpareBudget(share=0.05, burst=2.0)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    budget.earned(19)
    assert not budget.spend()
    budget.earned(1)
    assert budget.spend()


def test_a_caller_can_give_up_a_cold_peer_and_the_next_peer_is_asked() -> None:
    plan = ShardPlan(KEEPERS, KEEPERS, 1, lambda peer: 1.0)
    plan.start(False, 3.0)
    assert plan.cold == []
    plan.heard(KEEPERS[0], False, 5.0)
    assert plan.next_check() == math.inf
    assert plan.cold == [(KEEPERS[0], 3.0)]
    assert plan.give_up(KEEPERS[0], 20.0) == [Ask(KEEPERS[1], 1)]
    assert plan.given_up == [KEEPERS[0]]
    assert plan.cold == []


def test_a_home_that_was_given_up_is_asked_last_and_is_not_home_for_a_while() -> None:
    health = Health()
    health.gave_up(KEEPERS[0], 100.0)
    assert health.order(KEEPERS, 101.0) == [*KEEPERS[1:], KEEPERS[0]]
    assert health.usable(KEEPERS, 101.0) == KEEPERS[1:]
    assert health.usable(KEEPERS, 100.0 + UNFIT_S) == KEEPERS
