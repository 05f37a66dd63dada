"""SWIM's decisions: the order of statements, refutation, pauses, and bounds."""

from __future__ import annotations

import math
from itertools import permutations
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import wire
from protocol.dissemination import Rumours
from protocol.ids import PeerId
from protocol.member_table import supersedes
from protocol.members import Member, State, Update
from protocol.messages import Ping, Sync
from protocol.swim import Swim
from protocol.swim_values import Change, Disconnect, Event, Gossip, Probe, SwimConfig, SyncWith
from protocol.wire import MAX_INCARNATION

CONFIG = SwimConfig()


def member(name: str, address: str = "10.0.0.1:4502", site: str = "lab") -> Member:
    return Member(PeerId(name), name, site, (address,))


OWN = member("m")
NAMES = ("a", "b", "n", "z")

incarnations = st.integers(min_value=1, max_value=4)
states = st.sampled_from(State)
members = st.builds(member, st.sampled_from(NAMES), st.sampled_from(["1:1", "2:2"]), st.sampled_from(["lab", "far"]))
updates = st.builds(Update, members, states, incarnations)
about_one = st.builds(
    Update, st.builds(member, st.just("a"), st.sampled_from(["1:1", "2:2", "3:3"])), states, incarnations
)
about_own = st.builds(
    Update,
    st.builds(member, st.just("m"), st.sampled_from(["1:1", "10.0.0.1:4502"])),
    states,
    st.integers(min_value=0, max_value=MAX_INCARNATION - 1),
)


def make(*, peers: int = 0, now: float = 0.0, config: SwimConfig = CONFIG, incarnation: int = 1) -> Swim:
    swim = Swim(OWN, incarnation, config, Random(7), now=now)
    swim.received([alive(f"p{index:04}") for index in range(peers)], now)
    swim.take_changes()
    return swim


def alive(name: str, incarnation: int = 1) -> Update:
    return Update(member(name), State.ALIVE, incarnation)


def suspect(name: str, incarnation: int = 1) -> Update:
    return Update(member(name), State.SUSPECT, incarnation)


def dead(name: str, incarnation: int = 1) -> Update:
    return Update(member(name), State.DEAD, incarnation)


def held(swim: Swim, name: str) -> Update:
    return swim.known[PeerId(name)].update


# The order of statements


@given(about_one, about_one, about_one)
def test_statements_about_a_member_are_totally_ordered(a: Update, b: Update, c: Update) -> None:
    assert not supersedes(a, a)
    assert (a == b) == (not supersedes(a, b) and not supersedes(b, a))
    assert not (supersedes(a, b) and supersedes(b, a))
    if supersedes(a, b) and supersedes(b, c):
        assert supersedes(a, c)


@given(st.lists(about_one, min_size=1, max_size=4))
def test_the_order_and_the_repetition_of_statements_do_not_matter(heard: list[Update]) -> None:
    """S-22"""
    results = set()
    for order in permutations(heard):
        swim = make()
        swim.received([alive("a"), *order, *heard], 0.0)
        results.add(held(swim, "a"))
    assert len(results) == 1
    (result,) = results
    assert not any(supersedes(update, result) for update in heard)


@given(st.lists(updates, max_size=12))
def test_two_nodes_that_exchange_all_statements_agree(heard: list[Update]) -> None:
    first, second = make(), make()
    base = [alive(name) for name in NAMES]
    first.received(base + heard[::2], 0.0)
    second.received(base + heard[1::2], 0.0)
    for _ in range(2):
        first.received(second.view(), 0.0)
        second.received(first.view(), 0.0)
    assert {peer: entry.update for peer, entry in first.known.items()} == {
        peer: entry.update for peer, entry in second.known.items()
    }
    assert first.site == second.site


def test_at_equal_incarnation_the_graver_statement_wins() -> None:
    order = [alive("a"), suspect("a"), dead("a"), Update(member("a"), State.LEFT, 1), alive("a", 2)]
    for index, later in enumerate(order):
        assert all(supersedes(later, earlier) for earlier in order[:index])


# Refutation


@given(st.lists(about_own, min_size=1, max_size=6))
def test_a_refutation_overrides_all_earlier_statements(said: list[Update]) -> None:
    victim, witness = make(), Swim(member("b"), 1, CONFIG, Random(1), now=0.0)
    witness.received([victim.own], 0.0)
    witness.received(said, 0.0)
    victim.received(said, 0.0)
    assert victim.own.state is State.ALIVE
    assert victim.own.member == OWN
    assert not any(supersedes(update, victim.own) for update in said)
    witness.received(victim.updates_for(PeerId("b")), 0.0)
    assert held(witness, "m") == victim.own
    assert OWN in witness.site


def test_a_suspect_learns_of_the_suspicion_and_its_answer_clears_it() -> None:
    accuser, victim = make(), Swim(member("a"), 5, CONFIG, Random(1), now=0.0)
    accuser.received([victim.own, suspect("a", 5)], 0.0)
    victim.received(accuser.updates_for(PeerId("a")), 0.0)
    accuser.received(victim.updates_for(OWN.peer_id), 0.0)
    assert held(accuser, "a") == alive("a", 6)
    assert [change.event for change in accuser.take_changes()] == [Event.JOINED, Event.SUSPECTED, Event.REFUTED]


def test_a_member_that_left_refutes_nothing_and_does_nothing() -> None:
    swim = make(peers=10)
    assert len(swim.leave()) == CONFIG.leave_fanout
    swim.received([Update(OWN, State.DEAD, 9)], 1.0)
    assert swim.own == Update(OWN, State.LEFT, 1)
    assert swim.updates_for(PeerId("p0001"))[0] == swim.own
    assert swim.tick(1000.0) == []
    assert swim.due(1000.0) == math.inf


@pytest.mark.parametrize("incarnation", [MAX_INCARNATION, MAX_INCARNATION + 9])
def test_the_own_incarnation_stays_within_the_wire(incarnation: int) -> None:
    swim = make(incarnation=incarnation)
    swim.received([Update(OWN, State.DEAD, MAX_INCARNATION)], 0.0)
    assert swim.own.incarnation == MAX_INCARNATION


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
    assert held(swim, "p0002") == suspect("p0002")
    assert member("p0002") in swim.site
    end = probe.at + 0.5 + CONFIG.suspicion_s(5)
    now = probe.at
    while now < end:
        assert member("p0002") in swim.site
        swim.tick(now)
        now = swim.due(now)
    swim.tick(end)
    assert held(swim, "p0002") == dead("p0002")
    assert member("p0002") not in swim.site
    assert [change.event for change in swim.take_changes()] == [Event.SUSPECTED, Event.DROPPED]


def test_a_late_answer_makes_a_failure_void() -> None:
    swim = make(peers=4)
    probe = probes_of(swim, "p0002", 0.0, 10.0)
    swim.acked(PeerId("p0002"), probe.at + 0.4)
    swim.failed(probe, probe.at + 0.5, helpers_answered=True)
    assert held(swim, "p0002") == alive("p0002")


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
    swim = make(peers=peers)
    now = 0.0
    outstanding = []
    for _ in range(30):
        now = swim.due(now)
        outstanding += [action for action in swim.tick(now) if isinstance(action, Probe)]
    swim.received([suspect("p0000")], now)
    site = swim.site
    now += gap
    for probe in outstanding:  # after the pause their timers run first
        swim.failed(probe, now, helpers_answered=False)
    actions = swim.tick(now)
    assert swim.site is site
    assert sum(entry.update.state is State.SUSPECT for entry in swim.known.values()) == 1
    assert any(isinstance(action, Probe) for action in actions)
    swim.tick(now + CONFIG.suspicion_s(peers + 1) * 0.9)
    assert len(swim.site) == peers + 1


# Learning from others


def test_a_death_in_a_whole_view_counts_as_suspicion() -> None:
    swim = make(peers=1)
    swim.received([dead("p0000")], 0.0, whole_view=True)
    assert held(swim, "p0000") == suspect("p0000")
    swim.received([dead("p0000")], 0.0)
    assert held(swim, "p0000") == dead("p0000")


def test_unknown_dead_members_are_not_learned_and_known_ones_are_forgotten_in_time() -> None:
    swim = make(peers=2)
    swim.received([dead("x"), Update(member("y"), State.LEFT, 1), dead("p0000")], 0.0)
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
    swim.hint(member("a"), 0.0)
    assert swim.site == (OWN,)
    assert swim.tick(0.0) == [SyncWith(PeerId("a"), CONFIG.sync_timeout_s)]
    assert swim.view() == (swim.own,)
    assert swim.updates_for(PeerId("b")) == (swim.own,)
    swim.received([alive("a", 12)], 1.0)
    assert swim.take_changes() == [Change(member("a"), Event.JOINED)]
    assert member("a") in swim.site


def test_an_introduced_member_is_shown_and_asked_at_once_even_with_a_new_address() -> None:
    swim = make()
    swim.introduced(member("a"), 0.0)
    assert member("a") in swim.site
    assert SyncWith(PeerId("a"), CONFIG.sync_timeout_s) in swim.tick(0.0)
    swim.synced(PeerId("a"))
    swim.received([alive("a", 12)], 0.0)
    moved = member("a", "10.9.9.9:1")
    swim.introduced(moved, 1.0)
    assert moved in swim.site
    assert SyncWith(PeerId("a"), CONFIG.sync_timeout_s) in swim.tick(1.0)
    swim.introduced(OWN, 1.0)
    assert set(swim.known) == {"a"}


def test_dead_members_are_tried_again_one_by_one() -> None:
    swim = make(peers=3)
    swim.received([dead("p0000"), dead("p0001"), dead("p0002")], 0.0)
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


def test_messages_carry_a_bounded_number_of_statements_and_news_ends() -> None:
    swim = make(peers=500)
    swim.received([suspect("p0003")], 0.0)
    limit = CONFIG.retransmit_limit(501)
    said: dict[PeerId, int] = {}
    for _ in range(1000):
        updates = swim.updates_for(PeerId("p0009"))
        assert len(updates) <= CONFIG.piggyback + 2 <= wire.MAX_PIGGYBACK
        for update in updates[1:]:
            said[update.member.peer_id] = said.get(update.member.peer_id, 0) + 1
    assert swim.updates_for(PeerId("p0009")) == (swim.own,)
    assert set(said.values()) == {limit}
    assert PeerId("p0009") not in said
    accused = swim.updates_for(PeerId("p0003"))
    assert accused == (swim.own, suspect("p0003"))


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


def test_a_view_of_hostile_members_still_fits_one_message() -> None:
    swim = make()
    for index in range(2500):
        big = Member(PeerId(f"h{index}"), "n" * 255, "lab", tuple(f"{index}-{'a' * 250}" for _ in range(8)))
        swim.received([Update(big, State.ALIVE, 1)], 0.0)
    wire.encode_head(1, Sync(swim.view()), 0)
    wire.encode_head(1, Ping(swim.updates_for(PeerId("h1"))), 0)
    assert swim.view()[0] == swim.own


def test_a_full_table_replaces_dead_members_with_living_ones_only() -> None:
    """S-24"""
    with patch("protocol.member_table.MAX_MEMBERS", 11), patch("protocol.swim.MAX_MEMBERS", 11):
        swim = make(peers=10)
        swim.received([alive("x")], 0.0)
        assert "x" not in swim.known
        swim.received([dead("p0004"), alive("x")], 0.0)
        assert "x" in swim.known
        assert "p0004" not in swim.known
        for name in NAMES * 5:
            swim.exclude(PeerId(name * 7), 10.0)
            swim.hint(member(name), 0.0)
            swim.introduced(member(name), 0.0)
        assert len(swim.known) == 10


EVENTS = [
    st.tuples(st.just("received"), st.lists(updates, max_size=4), st.booleans()),
    st.tuples(st.just("introduced"), members),
    st.tuples(st.just("hint"), members),
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
            case ("received", heard, whole_view):
                swim.received(heard, now, whole_view=whole_view)
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
            entry.update.member
            for peer, entry in swim.known.items()
            if entry.is_live and entry.update.member.site == "lab" and peer not in swim.excluded
        ]
        assert swim.site == tuple(sorted(expected, key=lambda member: member.peer_id))
        for action in actions:
            assert action.peer != OWN.peer_id
            assert isinstance(action, Disconnect) or action.peer not in swim.excluded
            assert not isinstance(action, Probe | Gossip) or swim.known[action.peer].is_live


def test_two_nodes_run_out_of_news() -> None:
    swim = make(peers=1)
    for _ in range(CONFIG.retransmit_limit(2)):
        swim.updates_for(PeerId("p0000"))
    assert not any(isinstance(action, Gossip) for action in swim.tick(0.5))
