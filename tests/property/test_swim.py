"""SWIM's decisions: the order of statements, refutation, suspicion, pauses, and bounds.

`Swim` is given only what was checked, so most tests here sign with `unsigned`; tests/unit/test_passports.py has the
checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import sha512
from itertools import permutations
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import wire
from protocol.dissemination import Rumours
from protocol.failure_detector import ACCUSED_S, FALSE_S, MAX_ACCUSED, MAX_FALSE
from protocol.ids import PeerId
from protocol.member_table import NEW_S, key_of
from protocol.members import Member, News, State, Statement, Suspicion, Vouched
from protocol.messages import Ping, SyncReply
from protocol.statements import SEAL, Author
from protocol.summary import MAX_STATEMENTS, MAX_WANTED
from protocol.swim import Swim
from protocol.swim_values import Change, Disconnect, Event, Gossip, Probe, SwimConfig, SyncWith
from protocol.wire import MAX_INCARNATION

CONFIG = SwimConfig()


def member(name: str, address: str = "10.0.0.1:4502", site: str = "lab") -> Member:
    return Member(PeerId(name), name, site, (address,))


def unsigned(data: bytes) -> bytes:
    """In place of a signature: different for different statements."""
    return sha512(data).digest()


def author(name: str, certificate: bytes = b"") -> Author:
    return Author(PeerId(name), unsigned, lambda: certificate or name.encode())


def state(about: Member, incarnation: int = 1, *, leaving: bool = False, certificate: bytes = b"") -> Vouched:
    return author(about.peer_id, certificate).state(about, incarnation, leaving=leaving)


OWN = member("m")
NAMES = ("a", "b", "n", "z")

incarnations = st.integers(min_value=1, max_value=4)
members = st.builds(member, st.sampled_from(NAMES), st.sampled_from(["1:1", "2:2"]), st.sampled_from(["lab", "far"]))
statements = st.builds(state, members, incarnations, leaving=st.booleans())
addresses = st.sampled_from(["1:1", "2:2", "3:3"])
about_one = st.builds(state, st.builds(member, st.just("a"), addresses), incarnations, leaving=st.booleans())
about_own = st.builds(
    state,
    st.builds(member, st.just("m"), st.sampled_from(["1:1", "10.0.0.1:4502"])),
    st.integers(min_value=1, max_value=MAX_INCARNATION - 1),
    leaving=st.booleans(),
)


def swim_of(own: Member, *, now: float = 0.0, config: SwimConfig = CONFIG, incarnation: int = 1, seed: int = 7) -> Swim:
    return Swim(own, incarnation, author(own.peer_id), config=config, rng=Random(seed), now=now)


def make(*, peers: int = 0, now: float = 0.0, config: SwimConfig = CONFIG, incarnation: int = 1) -> Swim:
    swim = swim_of(OWN, now=now, config=config, incarnation=incarnation)
    swim.learned([alive(f"p{index:04}") for index in range(peers)], now)
    swim.take_changes()
    return swim


def alive(name: str, incarnation: int = 1) -> Vouched:
    return state(member(name), incarnation)


def left(name: str, incarnation: int = 1) -> Vouched:
    return state(member(name), incarnation, leaving=True)


def suspicion(name: str, incarnation: int = 1, *, by: str) -> Suspicion:
    return author(by).suspect(PeerId(name), incarnation)


def make_dead(swim: Swim, names: Iterable[str], now: float = 0.0) -> None:
    """Have this node conclude that these members are dead, as after suspicions that nobody refuted."""
    for name in names:
        swim._conclude(PeerId(name), State.DEAD, now)  # noqa: SLF001 # the way there has tests of its own
    swim._gossip.clear()  # noqa: SLF001


def held(swim: Swim, name: str) -> tuple[State, int]:
    entry = swim.known[PeerId(name)]
    return entry.state, entry.statement.incarnation


def deliver(news: News, sender: str, swim: Swim, now: float = 0.0) -> None:
    """Hand over a message as `Membership` does, certificates restored."""
    swim.learned(map(vouched, news.statements), now)
    swim.accused(news.suspicions, now)
    swim.contacted(PeerId(sender), news, now)


def vouched(statement: Statement) -> Vouched:
    return Vouched.of(statement, statement.certificate or statement.peer_id.encode())


def sync(asker: Swim, replier: Swim, now: float = 0.0) -> None:
    """One comparison, as `Gossiper` does it."""
    answer = replier.compared(asker.own.peer_id, asker.summary(), now)
    asker.learned(answer.statements, now)
    asker.doubt_all(replier.own.peer_id, answer.doubts, now)
    replier.learned(map(vouched, asker.wanted_by(replier.own.peer_id, answer.wanted).statements), now)


# The order of statements


@given(about_one, about_one, about_one)
def test_statements_of_a_member_are_totally_ordered(a: Statement, b: Statement, c: Statement) -> None:
    assert (a == b) == (a.rank == b.rank)
    assert max(a.rank, b.rank, c.rank) == max(max(a.rank, b.rank), c.rank)
    assert (a.incarnation, a.leaving) <= (b.incarnation, b.leaving) or a.rank > b.rank


@given(st.lists(about_one, min_size=1, max_size=4))
def test_the_order_and_the_repetition_of_statements_do_not_matter(heard: list[Vouched]) -> None:
    """S-22"""
    results = set()
    for order in permutations(heard):
        swim = make()
        swim.learned([alive("a"), *order, *heard], 0.0)
        results.add((swim.known[PeerId("a")].statement, swim.known[PeerId("a")].state))
    assert len(results) == 1
    ((result, _),) = results
    assert all(statement.rank <= result.rank for statement in heard)


@given(st.lists(statements, max_size=12))
def test_two_nodes_that_compare_their_views_agree(heard: list[Vouched]) -> None:
    first, second = make(), swim_of(member("w"))
    base = [alive(name) for name in NAMES]
    first.learned(base + heard[::2], 0.0)
    second.learned(base + heard[1::2], 0.0)
    for _ in range(2):
        sync(first, second)
        sync(second, first)
    for name in NAMES:
        assert held(first, name) == held(second, name)
    shared = {peer.peer_id for peer in first.site} - {"m", "w"}
    assert shared == {peer.peer_id for peer in second.site} - {"m", "w"}
    assert first.summary() != second.summary()  # each knows itself first
    assert first.compared(PeerId("w"), second.summary(), 0.0).statements == ()
    assert first.compared(PeerId("w"), second.summary(), 0.0).wanted == b""


def test_a_departure_overrides_only_its_own_incarnation() -> None:
    order = [alive("a"), left("a"), alive("a", 2), left("a", 2), alive("a", 3)]
    assert sorted(order, key=lambda statement: statement.rank) == order


# Refutation


@given(st.lists(about_own, min_size=1, max_size=6))
def test_a_node_overrides_all_statements_of_its_former_lives(said: list[Vouched]) -> None:
    """Also if its clock was set back."""
    victim, witness = make(), swim_of(member("b"))
    witness.learned([victim.own], 0.0)
    witness.learned(said, 0.0)
    victim.learned(said, 0.0)
    assert not victim.own.leaving
    assert victim.own.member == OWN
    assert all(statement.rank <= victim.own.rank for statement in said)
    deliver(victim.news_for(PeerId("b")), "m", witness)
    assert witness.known[PeerId("m")].statement == victim.own
    assert OWN in witness.site


def test_a_replayed_departure_expels_no_member_that_came_back() -> None:
    swim = make()
    swim.learned([alive("a", 5), left("a", 3), alive("a", 2)], 0.0)
    assert held(swim, "a") == (State.ALIVE, 5)


def test_a_suspect_learns_of_the_suspicion_and_its_answer_clears_it() -> None:
    accuser, victim = make(peers=1), swim_of(member("a"), incarnation=5)
    accuser.learned([victim.own], 0.0)
    victim.learned([accuser.own], 0.0)
    accuser.accused([suspicion("a", 5, by="p0000")], 0.0)
    assert held(accuser, "a") == (State.SUSPECT, 5)
    deliver(accuser.news_for(PeerId("a")), "m", victim)
    deliver(victim.news_for(OWN.peer_id), "a", accuser)
    assert held(accuser, "a") == (State.ALIVE, 6)
    assert [change.event for change in accuser.take_changes()] == [Event.JOINED, Event.SUSPECTED, Event.REFUTED]


def test_nothing_but_an_own_statement_raises_the_own_incarnation_by_more_than_one() -> None:
    """Doubts of another incarnation than the current one are of former lives, or lies."""
    swim = make(peers=3)
    for incarnation in (2, 5, MAX_INCARNATION):
        swim.contacted(PeerId("p0000"), News(held=incarnation, doubted=True), 0.0)
        swim.accused([suspicion("m", incarnation, by="p0001")], 0.0)
    assert swim.own.incarnation == 1
    swim.accused([suspicion("m", 1, by="p0001")], 0.0)
    assert swim.own.incarnation == 2


def test_a_member_that_left_refutes_nothing_and_does_nothing() -> None:
    swim = make(peers=10)
    assert len(swim.leave()) == CONFIG.leave_fanout
    own = swim.own
    assert (own.incarnation, own.leaving) == (1, True)
    swim.accused([suspicion("m", 1, by="p0003")], 1.0)
    swim.learned([state(OWN, 9)], 1.0)
    assert swim.own == own
    assert swim.news_for(PeerId("p0001")).statements[0] == own
    assert swim.tick(1000.0) == []
    assert swim.due(1000.0) == math.inf


@pytest.mark.parametrize("incarnation", [MAX_INCARNATION, MAX_INCARNATION + 9])
def test_the_own_incarnation_stays_within_the_wire(incarnation: int) -> None:
    swim = make(incarnation=incarnation, peers=1)
    swim.accused([suspicion("m", MAX_INCARNATION, by="p0000")], 0.0)
    assert swim.own.incarnation == MAX_INCARNATION


# What others may say


def test_a_suspicion_counts_only_of_a_live_member_about_the_current_incarnation() -> None:
    swim = make(peers=4)
    make_dead(swim, ["p0003"])
    swim.learned([alive("p0000", 7)], 0.0)
    for wrong in (
        suspicion("p0000", 6, by="p0001"),  # refuted already
        suspicion("p0000", 8, by="p0001"),
        suspicion("p0000", 7, by="stranger"),
        suspicion("p0000", 7, by="p0003"),  # dead
        suspicion("p0000", 7, by="p0000"),
        suspicion("stranger", 1, by="p0001"),
        suspicion("p0003", 1, by="p0001"),
    ):
        assert not swim.heeds(wrong, 0.0)
        swim.accused([wrong], 0.0)
    swim.exclude(PeerId("p0002"), 50.0)
    assert not swim.heeds(suspicion("p0000", 7, by="p0002"), 0.0)
    assert held(swim, "p0000") == (State.ALIVE, 7)
    assert swim.heeds(suspicion("p0000", 7, by="p0001"), 0.0)


def test_a_liar_that_accuses_all_is_heeded_a_few_times_and_others_still_are() -> None:
    """S-56"""
    swim = make(peers=100)
    accusations = [suspicion(f"p{index:04}", by="p0099") for index in range(90)]
    swim.accused(accusations * 3, 0.0)
    suspects = [peer for peer, entry in swim.known.items() if entry.state is State.SUSPECT]
    assert len(suspects) == MAX_ACCUSED
    swim.accused([suspicion("p0095", by="p0098")], 0.1)
    assert held(swim, "p0095") == (State.SUSPECT, 1)
    assert swim.heeds(accusations[50], ACCUSED_S + 0.1)


def test_an_accuser_that_was_wrong_too_often_is_not_heeded_for_a_while() -> None:
    """S-56"""
    swim, now = make(peers=30), 0.0
    for number in range(MAX_FALSE):
        accused = suspicion(f"p{number:04}", by="p0029")
        assert swim.heeds(accused, now)
        swim.accused([accused], now)
        if number % 2:
            swim.acked(accused.peer_id, now, 0.01)
        else:
            swim.learned([alive(accused.peer_id, 2)], now)
        assert held(swim, accused.peer_id)[0] is State.ALIVE
        now += ACCUSED_S / 4
    now += ACCUSED_S
    assert not swim.heeds(suspicion("p0020", by="p0029"), now)
    assert swim.heeds(suspicion("p0020", by="p0028"), now)
    assert swim.heeds(suspicion("p0020", by="p0029"), FALSE_S)


def test_statements_go_before_suspicions() -> None:
    swim = make(peers=60)
    while swim.news_for(PeerId("p0059")).statements[1:]:
        pass
    for accuser in range(6):
        accused = range(8 * accuser, 8 * accuser + 8)
        swim.accused([suspicion(f"p{index:04}", by=f"p{50 + accuser:04}") for index in accused], 0.0)
    assert len(swim.news_for(PeerId("p0059")).suspicions) == CONFIG.piggyback
    swim.learned([alive(f"q{index:04}") for index in range(CONFIG.piggyback)], 0.0)
    news = swim.news_for(PeerId("p0059"))
    assert len(news.statements) == CONFIG.piggyback + 1
    assert news.suspicions == ()


def test_doubts_of_others_cause_a_bounded_number_of_probes() -> None:
    swim = make(peers=100)
    swim.doubt_all(PeerId("p0000"), b"".join(key_of(PeerId(f"p{index:04}")) for index in range(100)), 0.0)
    probes = [action for action in swim.tick(0.0) if isinstance(action, Probe)]
    assert CONFIG.parallel_probes <= len(probes) <= CONFIG.parallel_probes + 1
    assert swim.due(0.0) > 0.0
    assert not [action for action in swim.tick(0.1) if isinstance(action, Probe)]


# What messages leave out


def test_a_message_carries_only_what_its_receiver_lacks() -> None:
    first, second = make(), swim_of(member("a"))
    news = first.news_for(PeerId("a"))
    assert news.statements == (first.own,), "with its certificate"
    deliver(news, "m", second)
    answer = second.news_for(PeerId("m"))
    assert answer.statements == (second.own,)
    assert answer.held == 1
    deliver(answer, "a", first)
    assert first.news_for(PeerId("a")) == News(held=1)
    first.accused([suspicion("m", 1, by="a")], 0.0)
    assert first.news_for(PeerId("a")).statements == (first.own.bare(),), "the receiver has the certificate"
    first.renewed()
    assert first.news_for(PeerId("a")).statements == (first.own,)


def test_certificates_are_passed_on_where_members_may_lack_them() -> None:
    swim = make(peers=1)
    swim.learned([alive("a")], 0.0)
    assert alive("a") in swim.news_for(PeerId("p0000")).statements
    swim.learned([alive("a", 2)], NEW_S - 1)
    assert alive("a", 2) in swim.news_for(PeerId("p0000")).statements, "others may still miss the first"
    swim.learned([alive("a", 3)], NEW_S)
    assert alive("a", 3).bare() in swim.news_for(PeerId("p0000")).statements
    renewed = state(member("a"), 4, certificate=b"later")
    swim.learned([renewed], 100.0)
    assert renewed in swim.news_for(PeerId("p0000")).statements
    make_dead(swim, ["a"], 200.0)
    back = state(member("a"), 5, certificate=b"later")
    swim.learned([back], 300.0)
    assert back in swim.news_for(PeerId("p0000")).statements, "who came in the meantime lacks the certificate"


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 300))
@settings(max_examples=20)
def test_repeated_comparisons_bring_any_difference(first: int, second: int, common: int) -> None:
    left_side, right_side = make(), swim_of(member("w"))
    shared = [alive(f"c{index}") for index in range(common)]
    left_side.learned([*shared, *(alive(f"l{index}") for index in range(first))], 0.0)
    right_side.learned([*shared, *(alive(f"r{index}") for index in range(second))], 0.0)
    for _ in range(2 + max(first, second) // MAX_WANTED):
        answer = right_side.compared(PeerId("m"), left_side.summary(), 0.0)
        wire.encode_head(1, SyncReply(answer.statements, answer.doubts, answer.wanted), 0)
        sync(left_side, right_side)
    assert {peer.peer_id for peer in left_side.site} == {peer.peer_id for peer in right_side.site}
    assert len(left_side.site) == first + second + common + 2


# Suspicion


def probes_of(swim: Swim, peer: str, now: float, until: float) -> Probe:
    """Run until the next probe of `peer`, and return it. All other probes are answered."""
    while now < until:
        for action in swim.tick(now):
            if isinstance(action, Probe):
                if action.peer == peer:
                    return action
                swim.acked(action.peer, now, 0.001)
            elif isinstance(action, SyncWith):
                swim.synced(action.peer)
        now = swim.due(now + 0.01)
    raise AssertionError(f"{peer} was not probed")


def next_probe(swim: Swim, now: float) -> Probe:
    while True:
        now = swim.due(now)
        for action in swim.tick(now):
            if isinstance(action, Probe):
                return action


def test_a_failed_probe_makes_a_member_suspected_and_a_timeout_dead() -> None:
    swim = make(peers=4)
    probe = probes_of(swim, "p0002", 0.0, 10.0)
    swim.failed(probe, probe.at + 0.5, helpers_answered=True)
    assert held(swim, "p0002") == (State.SUSPECT, 1)
    assert swim.news_for(PeerId("p0001")).suspicions == (suspicion("p0002", by="m"),)
    assert member("p0002") in swim.site
    end = probe.at + 0.5 + CONFIG.suspicion_s(5)
    now = probe.at
    while now < end:
        assert member("p0002") in swim.site
        swim.tick(now)
        now = swim.due(now)
    swim.tick(end)
    assert held(swim, "p0002") == (State.DEAD, 1)
    assert member("p0002") not in swim.site
    assert [change.event for change in swim.take_changes()] == [Event.SUSPECTED, Event.DROPPED]


def test_a_late_answer_makes_a_failure_void() -> None:
    swim = make(peers=4)
    probe = probes_of(swim, "p0002", 0.0, 10.0)
    swim.acked(PeerId("p0002"), probe.at + 0.4)
    swim.failed(probe, probe.at + 0.5, helpers_answered=True)
    assert held(swim, "p0002") == (State.ALIVE, 1)


def test_every_member_is_probed_within_two_rings_and_the_successor_every_other_time() -> None:
    swim = make(peers=9)
    targets, now = [], 0.0
    while len(targets) < 36:
        for action in swim.tick(now):
            if isinstance(action, Probe):
                targets.append(action.peer)
                assert len(action.via) == CONFIG.indirect_probes
                assert action.peer not in action.via
                swim.acked(action.peer, now)
            elif isinstance(action, SyncWith):
                swim.synced(action.peer)
        now = swim.due(now)
    assert set(targets[::2]) == {"p0000"}
    assert len(set(targets[1::2][:9])) == 9


@given(st.integers(min_value=1, max_value=300))
def test_timings_keep_detection_within_10_s(count: int) -> None:
    watched = 2 * CONFIG.probe_interval_s + 2 * CONFIG.probe_timeout_s
    assert watched + CONFIG.suspicion_s(count) + 1.0 < 10
    assert CONFIG.retransmit_limit(count) >= CONFIG.retransmit_factor
    assert CONFIG.sync_pause_s(count) >= CONFIG.sync_interval_s
    assert CONFIG.retry_pause_s(count) >= CONFIG.retry_interval_s


def test_a_node_without_any_answer_blames_itself_and_recovers() -> None:
    swim = make(peers=4)
    timeouts, now = [], 0.0
    for helped in (False, False, True, None, None):
        probe = next_probe(swim, now)
        now = probe.at
        timeouts.append(probe.timeout_s)
        if helped is None:
            swim.acked(probe.peer, now)
        else:
            swim.failed(probe, now, helpers_answered=helped)
    assert timeouts == [0.5, 1.0, 1.5, 1.5, 1.0]


# Pauses


@given(st.floats(min_value=10, max_value=1e6), st.integers(min_value=1, max_value=30))
def test_a_node_that_was_stopped_declares_no_member_dead(gap: float, peers: int) -> None:
    swim = make(peers=peers + 1)
    now = 0.0
    outstanding = []
    for _ in range(30):
        now = swim.due(now)
        outstanding += [action for action in swim.tick(now) if isinstance(action, Probe)]
    swim.accused([suspicion("p0000", by=f"p{peers:04}")], now)
    site = swim.site
    now += gap
    for probe in outstanding:  # after the pause their timers run first
        swim.failed(probe, now, helpers_answered=False)
    actions = swim.tick(now)
    assert swim.site is site
    assert sum(entry.state is State.SUSPECT for entry in swim.known.values()) == 1
    assert any(isinstance(action, Probe) for action in actions)
    swim.tick(now + CONFIG.suspicion_s(peers + 2) * 0.9)
    assert len(swim.site) == peers + 2


# Learning from others


def test_a_death_in_the_view_of_another_is_checked_and_not_believed() -> None:
    swim, other = make(peers=1), swim_of(member("w"))
    other.learned([alive("p0000"), alive("p0001")], 0.0)
    make_dead(other, ["p0000", "p0001"])
    sync(swim, other)
    assert held(swim, "p0000") == (State.ALIVE, 1)
    assert "p0001" not in swim.known
    assert any(isinstance(action, Probe) and action.peer == "p0000" for action in swim.tick(0.0))


def test_unknown_dead_members_are_not_learned_and_known_ones_are_forgotten_in_time() -> None:
    swim = make(peers=2)
    swim.learned([left("y"), left("p0000")], 0.0)
    assert set(swim.known) == {"p0000", "p0001"}
    now = 0.0
    while now < CONFIG.forget_s + 600:
        for action in swim.tick(now):
            if isinstance(action, SyncWith):
                swim.synced(action.peer)
        now = max(swim.due(now), now + 500)
    assert set(swim.known) == {"p0001"}


def test_a_hinted_member_is_asked_but_neither_shown_nor_gossiped() -> None:
    swim = make()
    swim.hint(alive("a", 9), 0.0)
    assert swim.site == (OWN,)
    assert swim.tick(0.0) == [SyncWith(PeerId("a"), CONFIG.sync_timeout_s)]
    assert len(swim.summary()) == 16
    assert swim.news_for(PeerId("b")).statements == (swim.own,)
    swim.learned([alive("a", 8)], 1.0)
    assert swim.site == (OWN,), "an earlier statement than the named one proves nothing"
    swim.learned([alive("a", 9)], 1.0)
    assert swim.take_changes() == [Change(member("a"), Event.JOINED)]
    assert member("a") in swim.site


def test_an_introduced_member_is_shown_and_asked_at_once_even_with_a_new_address() -> None:
    swim = make()
    swim.introduced(alive("a"), 0.0, "192.0.2.7")
    assert member("a") in swim.site
    assert swim.known[PeerId("a")].observed == "192.0.2.7"
    assert SyncWith(PeerId("a"), CONFIG.sync_timeout_s) in swim.tick(0.0)
    swim.synced(PeerId("a"))
    moved = member("a", "10.9.9.9:1")
    swim.learned([state(moved, 12)], 0.0)
    assert moved in swim.site
    assert swim.known[PeerId("a")].observed == "", "it may be seen elsewhere now"
    swim.introduced(state(moved, 12), 1.0)
    assert SyncWith(PeerId("a"), CONFIG.sync_timeout_s) in swim.tick(1.0)
    swim.introduced(swim.own, 1.0)
    assert set(swim.known) == {"a"}


def test_dead_members_are_tried_again_one_by_one() -> None:
    swim = make(peers=3)
    make_dead(swim, ["p0000", "p0001", "p0002"])
    tried: list[str] = []
    now = 0.0
    while now < 20:
        for action in swim.tick(now):
            assert isinstance(action, SyncWith)
            tried.append(action.peer)
            swim.synced(action.peer)
        now = swim.due(now)
    assert len(tried) == pytest.approx(20 / CONFIG.retry_interval_s, abs=1)
    assert set(tried[:3]) == set(tried[3:6]) == {"p0000", "p0001", "p0002"}


def test_an_excluded_peer_gets_no_message_until_the_exclusion_ends() -> None:
    swim = make(peers=3)
    swim.exclude(PeerId("p0001"), 50.0)
    assert swim.tick(0.0)[0] == Disconnect(PeerId("p0001"))
    now = 0.0
    while now < 49:
        for action in swim.tick(now):
            assert action.peer != "p0001"
            if isinstance(action, Probe):
                assert "p0001" not in action.via
                swim.acked(action.peer, now)
            elif isinstance(action, SyncWith):
                swim.synced(action.peer)
        now = swim.due(now)
    swim.tick(50.0)
    assert member("p0001") in swim.site
    assert swim.take_changes() == [Change(member("p0001"), Event.READMITTED)]


# Bounds


def test_messages_carry_a_bounded_number_of_items_and_news_ends() -> None:
    swim = make(peers=500)
    swim.accused([suspicion("p0003", by="p0004")], 0.0)
    limit = CONFIG.retransmit_limit(501)
    said: dict[PeerId, int] = {}
    for _ in range(1000):
        news = swim.news_for(PeerId("p0009"))
        assert len(news.statements) + len(news.suspicions) <= CONFIG.piggyback + 1
        for item in (*news.statements[1:], *news.suspicions):
            said[item.peer_id] = said.get(item.peer_id, 0) + 1
    assert swim.news_for(PeerId("p0009")) == News((swim.own,), held=1)
    assert said.pop(PeerId("p0003")) >= limit, "as a statement, and as a suspicion"
    assert set(said.values()) == {limit}
    assert PeerId("p0009") not in said
    assert swim.news_for(PeerId("p0003")) == News((swim.own,), held=1, doubted=True)


@given(st.lists(st.sampled_from(NAMES), max_size=20), st.integers(1, 4), st.integers(1, 3))
def test_the_least_sent_rumours_are_sent_first(added: list[str], count: int, limit: int) -> None:
    rumours = Rumours()
    sent: dict[PeerId, int] = {}
    for name in added:
        rumours.add(PeerId(name))
        sent[PeerId(name)] = 0
    while rumours:
        picked = rumours.pick(count)
        assert max(sent[peer] for peer in picked) <= min(
            (sent[peer] for peer in sent if peer not in picked and sent[peer] < limit), default=limit
        )
        rumours.count(picked, limit)
        for peer in picked:
            sent[peer] += 1
    assert set(sent.values()) <= {limit}


def test_the_largest_statements_still_fit_one_message() -> None:
    swim = make()
    certificate = bytes(wire.MAX_CERTIFICATE)
    for index in range(2 * MAX_STATEMENTS):
        big = Member(PeerId(f"h{index}"), "n" * 255, "lab", tuple(f"{index}-{'a' * 250}" for _ in range(8)))
        swim.learned([state(big, 1, certificate=certificate)], 0.0)
    answer = swim.compared(PeerId("b"), b"", 0.0)
    assert 1 <= len(answer.statements) < 3
    assert answer.more
    everything = tuple(entry.statement for entry in swim.known.values())[:MAX_STATEMENTS]
    wire.encode_head(1, SyncReply(everything), 0)
    wire.encode_head(1, Ping(News(everything)), 0)
    wire.encode_head(1, Ping(swim.news_for(PeerId("h1"))), 0)
    assert len(swim.own.seal) == SEAL


def test_a_full_table_replaces_dead_members_with_living_ones_only() -> None:
    """S-24"""
    with patch("protocol.member_table.MAX_MEMBERS", 11), patch("protocol.swim.MAX_MEMBERS", 11):
        swim = make(peers=10)
        swim.learned([alive("x")], 0.0)
        assert "x" not in swim.known
        make_dead(swim, ["p0004"])
        swim.learned([alive("x")], 0.0)
        assert "x" in swim.known
        assert "p0004" not in swim.known
        for name in NAMES * 5:
            swim.exclude(PeerId(name * 7), 10.0)
            swim.hint(alive(name), 0.0)
            swim.introduced(alive(name), 0.0)
        assert len(swim.known) == 10


EVENTS = [
    st.tuples(st.just("learned"), st.lists(statements, max_size=4)),
    st.tuples(st.just("accused"), st.sampled_from([*NAMES, "m"]), incarnations, st.sampled_from(NAMES)),
    st.tuples(st.just("contacted"), st.sampled_from(NAMES), incarnations, st.booleans()),
    st.tuples(st.just("introduced"), statements),
    st.tuples(st.just("hint"), statements),
    st.tuples(st.just("doubt"), st.sampled_from(NAMES)),
    st.tuples(st.just("exclude"), st.sampled_from(NAMES), st.floats(0, 5)),
    st.tuples(st.just("finish"), st.sampled_from(["acked", "helped", "alone"])),
    st.tuples(st.just("wait"), st.floats(0, 30)),
]


@settings(max_examples=150)
@given(st.lists(st.one_of(EVENTS), max_size=40))
def test_the_invariants_hold_after_any_events(happening: list[tuple[object, ...]]) -> None:
    swim, now = make(), 0.0
    probes: list[Probe] = []
    syncs: list[SyncWith] = []
    for event in happening:
        match event:
            case ("learned", heard):
                swim.learned(heard, now)
            case ("accused", name, incarnation, accuser):
                swim.accused([suspicion(name, incarnation, by=accuser)], now)
            case ("contacted", name, incarnation, doubted):
                swim.contacted(name, News(held=incarnation, doubted=doubted), now)
            case ("introduced", met):
                swim.introduced(met, now)
            case ("hint", named):
                swim.hint(named, now)
            case ("doubt", name):
                swim.doubt(name, now)
            case ("exclude", name, seconds):
                swim.exclude(name, now + seconds)
            case ("finish", how):
                for probe in probes:
                    if how == "acked":
                        swim.acked(probe.peer, now, 0.01)
                    swim.failed(probe, now, helpers_answered=how == "helped")
                for sync in syncs:
                    swim.synced(sync.peer)
                probes, syncs = [], []
            case ("wait", seconds):
                now += seconds
        actions = swim.tick(now)
        probes += [action for action in actions if isinstance(action, Probe)]
        syncs += [action for action in actions if isinstance(action, SyncWith)]
        assert len(syncs) <= CONFIG.parallel_syncs
        assert sum(isinstance(action, Gossip) for action in actions) <= CONFIG.gossip_fanout
        assert swim.due(now) > now  # after a tick no action is due at once
        expected = [OWN] + [
            entry.member
            for peer, entry in swim.known.items()
            if entry.is_live and entry.member.site == "lab" and peer not in swim.excluded
        ]
        assert swim.site == tuple(sorted(expected, key=lambda member: member.peer_id))
        for action in actions:
            assert action.peer != OWN.peer_id
            assert isinstance(action, Disconnect) or action.peer not in swim.excluded
            assert not isinstance(action, Probe | Gossip) or swim.known[action.peer].is_live


def test_two_nodes_run_out_of_news() -> None:
    swim = make(peers=1)
    for _ in range(CONFIG.retransmit_limit(2)):
        swim.news_for(PeerId("p0000"))
    assert not any(isinstance(action, Gossip) for action in swim.tick(0.5))
