"""A member that speaks for others: departures, suspicions, replays, and members that do not exist."""

from __future__ import annotations

import random

import pytest

from protocol.members import State
from tests.support import adversary
from tests.support.adversary import Hole, invented_members, lines, said_of, until
from tests.support.processes import wait_for
from tests.support.siege import Siege, alive, assert_no_slower, peers

LATEST = 1 << 53
GROWTH = 30 << 20
"""Bytes by which a daemon may grow in an attack that invents members."""


def statements_about_honest(siege: Siege, state: State, incarnation: int) -> list[object]:
    rows = [row for row in peers(siege.liar) if row["name"] != siege.liar.name]
    return [said_of(siege.attacker, row, state, incarnation) for row in rows]


def test_nobody_leaves_or_dies_because_another_member_says_so(siege: Siege) -> None:
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        for state in (State.LEFT, State.DEAD, State.SUSPECT):
            said = statements_about_honest(siege, state, LATEST)
            siege.tell(adversary.ping(siege.attacker, said), adversary.sync(siege.attacker, said))
            for _ in until(2.0):
                pass
            assert_no_slower(calm, siege.cold_pulls(1))
        for node in siege.honest:
            assert {other.name for other in siege.honest} - {node.name} <= alive(node)


def test_a_restart_is_seen_after_a_member_claimed_the_latest_incarnation(siege: Siege) -> None:
    said = statements_about_honest(siege, State.LEFT, LATEST)
    siege.tell(adversary.ping(siege.attacker, said))
    siege.honest[0].stop()
    siege.honest[0].start()
    with siege.unharmed():
        siege.pull_everywhere(siege.fresh())


def test_a_flood_of_suspicions_keeps_no_member_out(siege: Siege) -> None:
    """Ten seconds of suspicions of everybody, at the incarnations that the members have: longer than a suspicion."""
    calm = siege.cold_pulls(1)
    with siege.unharmed(), lines(siege.attacker, siege.honest) as open_lines:
        names = {node.name for node in siege.honest}
        dropped: list[str] = []
        attacked: list[float] = []
        for count, _ in enumerate(until(10.0, every=0.1)):
            said = adversary.suspicions(siege.attacker, open_lines[0], peers(siege.liar) if not count % 10 else None)
            for line in open_lines:
                line.ask(adversary.ping(siege.attacker, said))
            if not count % 20:
                dropped += [
                    f"{node.name}: {names - alive(node)}" for node in siege.honest if names - alive(node) - {node.name}
                ]
                attacked += siege.cold_pulls(1)
        assert not dropped
        assert_no_slower(calm, attacked)


def test_replayed_statements_change_nothing(siege: Siege) -> None:
    """The liar keeps all that it received before a restart of every honest member, and repeats it afterwards."""
    replies = [siege.attacker.ask(node, adversary.sync(siege.attacker, ())) for node in siege.honest]
    for node in siege.honest:
        node.stop()
        node.start()
    with siege.unharmed():
        said = [statement for reply in replies for statement in adversary.statements_of(reply)]
        siege.tell(*(adversary.ping(siege.attacker, said[begin : begin + 16]) for begin in range(0, len(said), 16)))
        siege.pull_everywhere(siege.fresh())


@pytest.mark.parametrize(("count", "fat"), [(64, False), (2000, False), (16_300, True)])
def test_invented_members_cost_nothing(siege: Siege, count: int, fat: bool) -> None:
    """Members of the largest weight, at addresses that accept a connection and say nothing, in syncs and pings."""
    calm = siege.cold_pulls(1)
    with Hole(ports=8) as hole, siege.unharmed():
        before = {node: node.rss_bytes() for node in siege.honest}
        seen = {node: len(peers(node)) for node in siege.honest}
        said = invented_members(siege.attacker, count, hole.addresses, fat=fat)
        siege.tell(*adversary.messages_with(siege.attacker, said))
        assert_no_slower(calm, siege.cold_pulls(2))
        for node in siege.honest:
            assert len(peers(node)) == seen[node], "no table has an invented member"
            assert node.status()["peers_alive"] == len(siege.honest)
            assert node.rss_bytes() < before[node] + GROWTH
        assert hole.visits() == 0, "no daemon connects to an invented member"


def test_an_introduction_invents_no_members(siege: Siege) -> None:
    with Hole(ports=4) as hole, siege.unharmed():
        node = siege.honest[0]
        seen = {row["peer_id"] for row in peers(node)}
        newcomer = adversary.Attacker.new(siege.key)
        assert newcomer.introduce(node, *adversary.introduction(newcomer, 1000, hole.addresses))
        siege.pull_everywhere(siege.fresh())
        assert {row["peer_id"] for row in peers(node)} <= seen | {newcomer.peer}
        assert hole.visits() == 0


def test_the_uplinks_share_is_divided_among_members_only(siege: Siege) -> None:
    """`p2pctl status` shows the rate that this node may use: with ghosts it would be a 2000th."""
    node = siege.honest[0]
    text = node.config.read_text()
    node.config.write_text(text.replace("[cluster]", 'rate = "50MiB"\n[cluster]'))
    try:
        assert node.ctl("reload").returncode == 0
        before = node.status()["upstreams"][0]["uplink"]
        with Hole() as hole, siege.unharmed():
            said = invented_members(siege.attacker, 2000, hole.addresses, fat=False)
            siege.tell(*adversary.messages_with(siege.attacker, said), nodes=[node])
            siege.pull(node, siege.fresh())
            assert node.status()["upstreams"][0]["uplink"]["rate"] == before["rate"]
    finally:
        node.config.write_text(text)
        node.ctl("reload")


def test_a_member_that_changes_its_statement_all_the_time_costs_only_itself(siege: Siege) -> None:
    """Weights, addresses and departures of the liar itself, properly signed, each with a later incarnation."""
    calm, rng = siege.cold_pulls(1), random.Random(1)
    with Hole() as hole, siege.unharmed(), lines(siege.attacker, siege.honest) as open_lines:
        attacked: list[float] = []
        began_cpu = [node.cpu_s() for node in siege.honest]
        for count, _ in enumerate(until(5.0, every=0.01)):
            said = adversary.own_statement(siege.attacker, rng, hole.addresses)
            for line in open_lines:
                line.ask(adversary.ping(siege.attacker, [said]))
            if not count % 100:
                attacked += siege.cold_pulls(1)
        used = max(node.cpu_s() - cpu for node, cpu in zip(siege.honest, began_cpu, strict=True))
        print(f"processor time of a daemon in the attack: {used:.2f} s")
        assert_no_slower(calm, attacked)
    wait_for("the liar has spoken for itself again", lambda: siege.liar.name in alive(siege.honest[0]))
