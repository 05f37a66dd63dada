"""The schedule of a chaos run: the seed determines it, and it never has impossible faults."""

from __future__ import annotations

from itertools import combinations, islice

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.schedule import QUIET_S, Fault, faults, pulls

SEEDS = st.integers(0, 2**32)


@given(SEEDS, st.integers(4, 20), st.integers(60, 1200))
def test_a_seed_determines_the_schedule(seed: int, nodes: int, seconds: int) -> None:
    schedule = faults(seed, nodes, seconds)
    assert schedule == faults(seed, nodes, seconds)
    assert schedule != faults(seed + 1, nodes, seconds)
    assert list(islice(pulls(seed, 1, ["a", "b"]), 9)) == list(islice(pulls(seed, 1, ["a", "b"]), 9))
    assert {fault.kind for fault in schedule} >= {"all cold", "liar"}


@given(SEEDS, st.integers(4, 20), st.integers(60, 1200))
def test_no_node_has_two_faults_at_a_time_and_the_start_and_the_end_are_quiet(
    seed: int, nodes: int, seconds: int
) -> None:
    schedule = faults(seed, nodes, seconds)
    assert all(QUIET_S <= fault.start <= fault.end <= seconds - QUIET_S for fault in schedule)
    for first, second in combinations(schedule, 2):
        if "partition" not in (first.kind, second.kind) and set(first.nodes) & set(second.nodes):
            assert first.end < second.start


def test_only_faults_that_a_client_cannot_avoid_excuse_a_failure() -> None:
    def excused(kind: str, node: int, began: float, ended: float) -> bool:
        return Fault(10, 20, kind, (1,)).excuses(node, began, ended, 5)  # type: ignore[arg-type]

    assert excused("kill", 1, 12, 13)
    assert not excused("kill", 2, 12, 13)
    assert excused("uplink dead", 2, 24, 26)
    assert not excused("uplink dead", 2, 26, 27)
    assert not any(excused(kind, 1, 12, 13) for kind in ("partition", "lossy link", "full disk", "slow link"))
