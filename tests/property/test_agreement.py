"""What the answers of several members are worth: properties of votes by host."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.content.agreement import Witness, agreements, decided
from node.oci.manifests import Resolved
from protocol.ids import Digest, ObjectRef, PeerId

TRUE, FALSE = "0", "1"


def resolved(name: str, size: int = 5, age_s: float = 1.0) -> Resolved:
    return Resolved(ObjectRef(Digest("sha256", name * 64), size), "a/b", age_s)


answers = st.builds(resolved, st.sampled_from("012"), st.integers(1, 3), st.floats(0, 1e6))
witnesses = st.builds(Witness, st.sampled_from("abcdefgh").map(PeerId), st.sampled_from("1234"), answers)
votes = st.lists(witnesses, max_size=12)
needed = st.integers(1, 4)


@given(votes, needed, st.randoms())
def test_the_order_of_answers_changes_nothing(votes: list[Witness], needed: int, rng) -> None:
    shuffled = [*votes]
    rng.shuffle(shuffled)
    first, second = decided(votes, needed), decided(shuffled, needed)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first.resolved.ref.digest == second.resolved.ref.digest
        assert (first.hosts, first.resolved.age_s) == (second.hosts, second.resolved.age_s)


@given(votes, needed)
def test_a_decision_has_enough_hosts_and_more_than_any_other(votes: list[Witness], needed: int) -> None:
    """S-46"""
    hosts = {
        digest: {vote.host for vote in votes if vote.resolved.ref.digest == digest}
        for digest in {vote.resolved.ref.digest for vote in votes}
    }
    most = max(map(len, hosts.values()), default=0)
    winners = [digest for digest, named in hosts.items() if len(named) == most]
    agreement = decided(votes, needed)
    if most >= needed and len(winners) == 1:
        assert agreement is not None
        assert agreement.resolved.ref.digest == winners[0]
        assert {vote.peer for vote in votes if vote.resolved.ref.digest == winners[0]} == set(agreement.peers)
    else:
        assert agreement is None


@given(st.lists(st.floats(10, 1e6), min_size=2, max_size=6), votes, st.integers(2, 4))
def test_hosts_too_few_to_decide_make_no_answer_young(ages: list[float], lies: list[Witness], needed: int) -> None:
    """S-46: whatever the members on `needed` - 1 hosts say, an honest answer keeps the age of an honest host."""
    honest = [Witness(PeerId(f"p{n}"), f"honest {n}", resolved(TRUE, age_s=age)) for n, age in enumerate(ages)]
    few = sorted({vote.host for vote in lies})[: needed - 1]
    agreement = decided([*honest, *(vote for vote in lies if vote.host in few)], needed)
    if agreement is not None and agreement.resolved.ref.digest == resolved(TRUE).ref.digest:
        assert agreement.resolved.age_s >= min(ages)


@given(st.integers(1, 5), votes, st.integers(1, 4))
def test_liars_on_fewer_hosts_than_honest_members_never_choose(honest: int, lies: list[Witness], needed: int) -> None:
    """S-46"""
    truth = [Witness(PeerId(f"p{n}"), f"honest {n}", resolved(TRUE)) for n in range(honest)]
    few = sorted({vote.host for vote in lies})[: honest - 1]
    agreement = decided([*truth, *(vote for vote in lies if vote.host in few)], needed)
    assert agreement is None or agreement.resolved.ref.digest == resolved(TRUE).ref.digest


@given(votes)
def test_a_doubted_descriptor_has_no_votes(votes: list[Witness]) -> None:
    doubted = {vote.resolved.ref for vote in votes[:2]}
    left = [vote for vote in votes if vote.resolved.ref not in doubted]
    assert list(agreements(votes, 1, doubted)) == list(agreements(left, 1))
