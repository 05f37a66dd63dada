"""The plan of a coded read, event by event, and in random order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from protocol.fetch_plan import (
    COLD_FLOOR_S,
    LAST_FACTOR,
    PATIENCE_FACTOR,
    PATIENCE_S,
    SETTLE_S,
    TURN_FACTOR,
    WARM_FLOOR_S,
    Ask,
    StripePlan,
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
A, B, C, D, E = KEEPERS
STRIPE = (4, 5, 6, 7)


def plan_of(order: str = "abcde", k: int = 4, late_after_s: float = 0.0, blocks: Sequence[int] = (0,)) -> StripePlan:
    return StripePlan(KEEPERS, [PeerId(name) for name in order], k, blocks, lambda peer: late_after_s)


def started(now: float = 0.0, **settings: Any) -> StripePlan:
    plan = plan_of(**settings)
    plan.start(all_at_once=False, now=now)
    return plan


def test_k_of_the_keepers_are_asked_each_for_its_own_shard_of_all_blocks() -> None:
    plan = plan_of("eabcd", blocks=STRIPE)
    asks = [Ask(E, 4, STRIPE), Ask(A, 0, STRIPE), Ask(B, 1, STRIPE), Ask(C, 2, STRIPE)]
    assert plan.start(all_at_once=False, now=0.0) == asks


def test_an_urgent_read_asks_all_at_once() -> None:
    assert len(plan_of().start(all_at_once=True, now=0.0)) == 5


def test_any_k_distinct_shards_end_a_block_and_all_blocks_the_read() -> None:
    plan = plan_of(blocks=(0, 1))
    plan.start(all_at_once=True, now=0.0)
    assert [plan.got(peer, 0, 0.0) for peer in (E, C, B, A)] == [False, False, False, True]
    assert 0 not in plan.incomplete
    assert not plan.got(D, 0, 0.0), "a shard more completes nothing"
    assert not plan.done
    assert [plan.got(peer, 1, 0.0) for peer in (A, B, C, D)] == [False, False, False, True]
    assert plan.done


def test_a_failure_asks_the_next_keeper_and_a_second_failure_ends_the_read() -> None:
    plan = started()
    assert plan.failed(A, 0.0) == [Ask(E, 4, (0,))]
    assert plan.failed(B, 0.0) == []
    assert not plan.stuck
    for peer in (C, D, E):
        plan.got(peer, 0, 0.0)
    assert plan.stuck
    assert plan.retries == 2


def test_after_a_failure_another_is_asked_only_for_the_shards_that_are_missing() -> None:
    plan = started(blocks=STRIPE)
    for block in STRIPE[:2]:
        plan.got(A, block, 0.0)
    assert plan.failed(A, 0.0) == [Ask(E, 4, STRIPE[2:])]
    assert plan.failed(B, 0.0, 4) == [Ask(E, 4, (4,))], "a shard of no use, in a stream that goes on"
    assert plan.failed(B, 0.0) == [Ask(E, 4, (5,))]


def test_a_spare_is_a_request_for_the_late_shards_only() -> None:
    plan = started(blocks=STRIPE)
    plan.got(A, 4, 0.01)
    for block in STRIPE:
        plan.got(B, block, 0.01)
    assert plan.has_spare
    assert plan.spare(A, 0.02) == [Ask(E, 4, STRIPE[1:])]
    assert plan.spare(A, 0.02) == []
    assert plan.spare(C, 0.02) == [Ask(E, 4, STRIPE[:1])]
    assert not plan.has_spare


def test_answers_are_late_soon_after_the_first_and_a_cold_start_gets_more_time() -> None:
    plan = started()
    assert plan.next_check() == COLD_FLOOR_S
    plan.got(A, 0, 0.01)
    assert plan.next_check() == WARM_FLOOR_S
    assert plan.overdue(WARM_FLOOR_S) == ([B, C, D], [])


def test_the_clock_of_a_stream_starts_again_with_each_shard() -> None:
    plan = started(k=1, late_after_s=2.0, blocks=STRIPE)
    plan.got(A, 4, 1.5)
    assert plan.next_check() == 3.5
    assert plan.took_s(A, 2.0) == 0.5
    for block in STRIPE[1:]:
        plan.got(A, block, 3.0)
    assert plan.took_s(A, 3.0) is None
    assert plan.done


def test_a_shard_that_nobody_needs_any_more_also_starts_the_clock_again() -> None:
    """Else the next shard's time would count from the beginning of the stream."""
    plan = plan_of(blocks=(0, 1))
    plan.start(all_at_once=True, now=0.0)
    for peer in (A, B, C, D):
        plan.got(peer, 0, 0.01)
    plan.got(E, 0, 1.0)
    assert plan.took_s(E, 1.5) == 0.5


def test_the_clock_of_a_keeper_stands_still_while_it_waits_for_the_registry() -> None:
    plan = started()
    for peer in KEEPERS[:4]:
        plan.heard(peer, False, 0.25)
    assert plan.next_check() == math.inf
    assert plan.took_s(B, 5.0) is None
    plan.got(A, 0, 5.0)
    plan.heard(B, False, 5.01)
    settled = 5.0 + SETTLE_S
    assert plan.next_check() == settled + WARM_FLOOR_S
    assert plan.took_s(B, settled + 1.0) == 1.0


def test_the_clock_stands_still_between_the_blocks_of_a_stream_that_come_from_the_registry() -> None:
    plan = started(k=2, blocks=(0, 1))
    for peer in (A, B):
        plan.heard(peer, False, 0.25)
    plan.got(A, 0, 5.0)
    assert plan.took_s(A, 6.0) is None
    assert plan.took_s(B, 8.0) == 8.0 - (5.0 + SETTLE_S), "another keeper's shard shows that the block is in the site"
    plan.got(B, 0, 5.5)
    assert plan.next_check() == math.inf
    plan.got(A, 1, 9.0)
    assert plan.took_s(B, 9.0 + SETTLE_S + 0.5) == 0.5


def test_a_keeper_that_was_beaten_to_a_block_may_still_wait_for_the_next() -> None:
    plan = plan_of(blocks=(0, 1))
    plan.start(all_at_once=True, now=0.0)
    for peer in KEEPERS:
        plan.heard(peer, False, 0.25)
    for peer in (A, B, C, D):
        plan.got(peer, 0, 5.0)
    plan.heard(E, False, 5.1)
    assert plan.took_s(E, 60.0) is None


def test_a_peer_that_answers_other_requests_gets_more_time_but_not_forever() -> None:
    answered_at = -math.inf
    plan = StripePlan(KEEPERS, KEEPERS, 1, (0,), lambda peer: 2.0, answered_at=lambda peer: answered_at)
    plan.start(all_at_once=False, now=10.0)
    assert plan.next_check() == 12.0
    answered_at = 11.5
    assert plan.next_check() == 13.5
    answered_at = 13.4
    assert plan.next_check() == 10.0 + TURN_FACTOR * 2.0


def test_an_answer_that_takes_no_longer_than_its_siblings_is_not_late() -> None:
    plan = started(late_after_s=0.1)
    plan.heard(A, True, 0.0)
    plan.got(A, 0, 1.0)
    assert plan.next_check() == 1.0


def test_the_clock_runs_on_once_the_answer_is_ready() -> None:
    plan = started(k=1)
    plan.heard(A, False, 0.25)
    plan.heard(A, True, 2.0)
    plan.heard(A, True, 2.3)
    assert plan.next_check() == 2.0 + COLD_FLOOR_S


def test_a_late_peer_is_given_up_and_another_asked_but_it_may_still_answer() -> None:
    plan = started(k=1, late_after_s=2.0, blocks=(0, 1))
    plan.got(A, 0, 0.0)
    assert plan.overdue(2.0) == ([A], [])
    given_up_at = 2.0 + PATIENCE_FACTOR * 2.0 + PATIENCE_S
    assert plan.next_check() == given_up_at
    assert plan.overdue(given_up_at) == ([], [Ask(B, 1, (1,))])
    assert plan.waited_for == [B]
    plan.got(A, 1, 7.0)
    assert plan.done


def test_the_last_shard_is_late_relative_to_its_siblings() -> None:
    """A peer's history may be from a busier time, but its siblings share the links with it now."""
    plan = started(late_after_s=5.0)
    for peer in (A, B):
        plan.got(peer, 0, 0.1)
    assert plan.next_check() == 5.0
    plan.got(C, 0, 0.3)
    assert plan.next_check() == LAST_FACTOR * 0.3
    assert plan.overdue(LAST_FACTOR * 0.3) == ([D], [])


def test_a_read_lists_the_peers_that_it_beat() -> None:
    plan = started(k=1, late_after_s=2.0)
    plan.overdue(2.0)
    plan.spare(A, 2.0)
    plan.got(B, 0, 2.1)
    assert plan.beaten == [A]


def test_a_caller_can_give_up_a_cold_peer_and_the_next_peer_is_asked() -> None:
    plan = started(now=3.0, k=1, late_after_s=1.0)
    assert plan.cold == []
    plan.heard(A, False, 5.0)
    assert plan.next_check() == math.inf
    assert plan.cold == [(A, 3.0)]
    assert plan.give_up(A, 20.0) == [Ask(B, 1, (0,))]
    assert plan.given_up == [A]
    assert plan.cold == []


@given(st.data())
def test_in_any_order_of_events_a_plan_ends_and_asks_nobody_twice(data: st.DataObject) -> None:
    keepers = [PeerId(str(rank)) for rank in range(data.draw(st.integers(1, 6)))]
    k, blocks = data.draw(st.integers(1, len(keepers))), range(3, 3 + data.draw(st.integers(1, 4)))
    plan = StripePlan(keepers, data.draw(st.permutations(keepers)), k, blocks, lambda peer: 1.0)
    streams: list[tuple[PeerId, set[int]]] = []
    asked: set[tuple[PeerId, int]] = set()
    shards = {block: set[PeerId]() for block in blocks}
    left_out: set[PeerId] = set()
    now = 0.0

    def make(asks: list[Ask]) -> None:
        for ask in asks:
            pairs = {(ask.peer, block) for block in ask.blocks}
            assert pairs
            assert not asked & pairs
            assert ask.want == keepers.index(ask.peer)
            asked.update(pairs)
            streams.append((ask.peer, set(ask.blocks)))

    make(plan.start(data.draw(st.booleans()), now))
    while not plan.done and not plan.stuck:
        assert streams, "a plan that is neither done nor stuck has something to wait for"
        peer, missing = data.draw(st.sampled_from(streams))
        match data.draw(st.sampled_from(("got", "got", "lost", "failed", "heard", "give up", "overdue"))):
            case "heard":
                plan.heard(peer, data.draw(st.booleans()), now)
            case "give up":
                left_out.add(peer)
                make(plan.give_up(peer, now))
            case "overdue":
                now = max(now, min(plan.next_check(), now + 100.0))
                late, asks = plan.overdue(now)
                make(asks)
                left_out.update(late, plan.given_up)
                assert plan.next_check() > now
                for slow in late:
                    make(plan.spare(slow, now))
            case "failed":
                streams = [stream for stream in streams if stream[0] != peer]
                make(plan.failed(peer, now))
            case event:
                block = missing.pop()
                if not missing:
                    streams.remove((peer, missing))
                if event == "lost":
                    make(plan.failed(peer, now, block))
                else:
                    shards[block].add(peer)
                    assert plan.got(peer, block, now) == (len(shards[block]) == k)
        assert [block not in plan.incomplete for block in blocks] == [len(shards[block]) >= k for block in blocks]
    assert plan.done == all(len(shards[block]) >= k for block in blocks)
    if plan.stuck:
        incomplete = [block for block in blocks if len(shards[block]) < k]
        assert all((peer, block) in asked for peer in set(keepers) - left_out for block in incomplete)


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
    health.asked(PeerId("a"), answers=4)
    health.asked(PeerId("b"), answers=2)
    health.dropped(PeerId("a"), answers=3)
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


def test_a_home_that_was_given_up_is_asked_last_and_is_not_home_for_a_while() -> None:
    health = Health()
    health.gave_up(KEEPERS[0], 100.0)
    assert health.order(KEEPERS, 101.0) == [*KEEPERS[1:], KEEPERS[0]]
    assert health.usable(KEEPERS, 101.0) == KEEPERS[1:]
    assert health.usable(KEEPERS, 100.0 + UNFIT_S) == KEEPERS
