"""A member that speaks for others: departures, suspicions, replays, and members that do not exist."""

from __future__ import annotations

import random

import pytest

from protocol.members import Statement
from tests.support.adversary import Attacker, ClosedError, Hole, lines, until
from tests.support.forgery import (
    LATEST,
    false_suspicions,
    forged,
    full_summary,
    gathered,
    ghosts,
    introduction,
    messages_with,
    own_statement,
    ping,
    suspicions,
    sync,
)
from tests.support.processes import wait_for
from tests.support.siege import Siege, alive, assert_no_slower, peers

GROWTH = 30 << 20
"""Bytes by which a daemon may grow in an attack that invents members."""
FEW = 64
"""Invented members of which each node hears all. Of more, a node hears its part."""


def tell_forged(siege: Siege, *, leaving: bool) -> None:
    """Each kind of forgery by a member of its own, since the first one that a node notices is also the last."""
    true = siege.gathered()
    kinds = zip(*(forged(siege.attacker, statement, LATEST, leaving=leaving) for statement in true), strict=True)
    for said in kinds:
        siege.tell(ping(said), *map(sync, said), attacker=Attacker.new(siege.key))


@pytest.mark.parametrize("leaving", [True, False])
def test_nobody_leaves_or_moves_because_another_member_says_so(siege: Siege, leaving: bool) -> None:
    """S-24: incarnation 2^53, which no later statement could exceed."""
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        tell_forged(siege, leaving=leaving)
        for _ in until(2.0):
            pass
        assert_no_slower(calm, siege.cold_pulls(1))
        for node in siege.honest:
            assert {other.name for other in siege.honest} - {node.name} <= alive(node)
            assert all(row["addresses"] != ["127.0.0.1:9"] for row in peers(node))


def test_a_member_that_restarts_is_seen_whatever_was_said_of_it(siege: Siege) -> None:
    """S-24"""
    tell_forged(siege, leaving=True)
    siege.honest[0].stop()
    siege.honest[0].start()
    with siege.unharmed():
        siege.pull_everywhere(siege.fresh())


def test_a_flood_of_suspicions_keeps_no_member_out(siege: Siege) -> None:
    """S-56: of everybody, at the incarnations that the members have, for ten seconds: longer than a suspicion."""
    calm, attacker, names = siege.cold_pulls(1), siege.attacker, {node.name for node in siege.honest}
    with siege.unharmed(), lines(attacker, siege.honest) as open_lines:
        dropped: list[str] = []
        attacked: list[float] = []
        said = siege.gathered()
        for count, _ in enumerate(until(10.0, every=0.1)):
            message = ping(suspicions=suspicions(attacker, said), doubted=True)
            for line in open_lines:
                line.ask(message)
            if not count % 20:
                said = siege.gathered()
                missing = {node.name: names - alive(node) - {node.name} for node in siege.honest}
                dropped += [f"{name}: {lost}" for name, lost in missing.items() if lost]
                attacked += siege.cold_pulls(1)
        assert not dropped
        assert_no_slower(calm, attacked)


def test_suspicions_in_the_name_of_others_count_for_nothing(siege: Siege) -> None:
    """S-56"""
    with siege.unharmed():
        said = siege.gathered()
        for suspicion in false_suspicions(siege.attacker, said):
            siege.tell(ping(suspicions=[suspicion]), nodes=siege.honest[:1], attacker=Attacker.new(siege.key))
        siege.pull_everywhere(siege.fresh())


def test_replayed_statements_change_nothing(siege: Siege) -> None:
    """S-22: the liar keeps all that it received before a restart of every honest member, and repeats it afterwards."""
    said = [*siege.gathered(), *gathered(siege.attacker, siege.honest[1], siege.statement)]
    for node in siege.honest:
        node.stop()
        node.start()
    with siege.unharmed():
        siege.tell(ping(said), *map(sync, said))
        siege.pull_everywhere(siege.fresh())


def assert_no_ghost(siege: Siege, said: list[Statement], hole: Hole) -> None:
    invented = {statement.peer_id for statement in said}
    for node in siege.honest:
        assert not invented & {row["peer_id"] for row in peers(node)}, "no table has an invented member"
    assert hole.visits() == 0, "no daemon connects to an invented member"


@pytest.mark.parametrize(("count", "fat"), [(64, False), (2000, False), (16_300, True)])
def test_invented_members_cost_nothing(siege: Siege, count: int, fat: bool) -> None:
    """S-55: members of the largest weight, at addresses that accept a connection and say nothing. Each message comes
    from another member, since a member that is caught is not heard again."""
    calm = siege.cold_pulls(1)
    with Hole(ports=8) as hole, siege.unharmed():
        before = {node: node.rss_bytes() for node in siege.honest}
        said = ghosts(siege.attacker, count, hole.addresses, fat=fat)
        for number, message in enumerate(messages_with(siege.statement, said)):
            nodes = [siege.honest[number % len(siege.honest)]] if count > FEW else siege.honest
            siege.tell(message, nodes=nodes, attacker=Attacker.new(siege.key))
        assert_no_slower(calm, siege.cold_pulls(2))
        for node in siege.honest:
            assert node.rss_bytes() < before[node] + GROWTH
        assert_no_ghost(siege, said, hole)


def test_summaries_of_invented_views_cost_little(siege: Siege) -> None:
    """S-55"""
    calm = siege.cold_pulls(1)
    with siege.unharmed(), lines(siege.attacker, siege.honest) as open_lines:
        before = {node: node.rss_bytes() for node in siege.honest}
        for _ in range(10):
            for line in open_lines:
                line.ask(sync(siege.statement, full_summary(16_384)))
        assert_no_slower(calm, siege.cold_pulls(1))
        for node in siege.honest:
            assert node.rss_bytes() < before[node] + GROWTH


def test_an_introduction_invents_no_members(siege: Siege) -> None:
    """S-30"""
    node = siege.honest[0]
    with Hole(ports=4) as hole, siege.unharmed():
        said = ghosts(siege.attacker, 63, hole.addresses)
        for others in ([said[0]], said[1:3], said):
            newcomer = Attacker.new(siege.key)
            own = own_statement(newcomer, ["127.0.0.1:9"], random.Random(), leaving=False)
            assert newcomer.introduce(node, *introduction(newcomer, own, others))
        siege.pull_everywhere(siege.fresh())
        assert_no_ghost(siege, said, hole)


def test_the_uplinks_share_is_divided_among_members_only(siege: Siege) -> None:
    """S-55: `p2pctl status` shows the rate that this node may use: with ghosts it would be a 2000th. Admitted members
    of earlier tests may come or go meanwhile, so it may change a little."""
    node = siege.honest[0]
    text = node.config.read_text()
    node.config.write_text(text.replace("[cluster]", 'rate = "50MiB"\n[cluster]'))
    try:
        assert node.ctl("reload").returncode == 0
        before = node.status()["upstreams"][0]["uplink"]["rate"]
        with Hole() as hole, siege.unharmed():
            for message in messages_with(siege.statement, ghosts(siege.attacker, 2000, hole.addresses)):
                siege.tell(message, nodes=[node], attacker=Attacker.new(siege.key))
            siege.pull(node, siege.fresh())
            assert node.status()["upstreams"][0]["uplink"]["rate"] > before / 2
    finally:
        node.config.write_text(text)
        node.ctl("reload")


def test_a_member_that_changes_its_statement_all_the_time_costs_only_itself(siege: Siege) -> None:
    """S-57: weights, addresses and departures of the liar itself, properly signed, each with a later incarnation."""
    calm, rng, attacker = siege.cold_pulls(1), random.Random(1), siege.attacker
    with Hole() as hole, siege.unharmed(), lines(attacker, siege.honest) as open_lines:
        attacked: list[float] = []
        began = [node.cpu_s() for node in siege.honest]
        for count, _ in enumerate(until(5.0, every=0.01)):
            message = ping([own_statement(attacker, hole.addresses, rng)])
            try:
                for line in open_lines:
                    line.ask(message)
            except ClosedError:
                break
            if not count % 100:
                attacked += siege.cold_pulls(1)
        used = max(node.cpu_s() - cpu for node, cpu in zip(siege.honest, began, strict=True))
        print(f"processor time of a daemon in the attack: {used:.2f} s")
        assert_no_slower(calm, attacked)
    wait_for("the liar has spoken for itself again", lambda: siege.liar.name in alive(siege.honest[0]))
