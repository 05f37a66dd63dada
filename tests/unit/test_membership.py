"""The promises of the membership, and their times: sites of nodes over the in-memory exchange, in virtual time."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio
from trio.testing import MockClock

from node.exchange.contract import Answer
from node.exchange.memory import MemoryExchange
from node.membership.membership import Membership
from node.membership.peers_file import MAX_REMEMBERED, SAVE_EVERY_S, PeersFile
from protocol.admission import make_revocation
from protocol.errors import BadInputError, DeniedError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.members import News, State, Vouched
from protocol.messages import GetHoldings, Ping, PingRequest, Pong, Reply, Request, Sync
from protocol.statements import Author, check_alive
from protocol.swim_values import SwimConfig
from tests.support.membership_site import (
    LATENCY_S,
    QUARANTINE_S,
    Node,
    Site,
    identity,
    introduce,
    member,
    run,
    states,
    until,
)
from tests.support.passports import AUTHORITY, passports_of, stated

Handle = Callable[[PeerId, Request], Awaitable[Answer]]


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_nodes_with_one_bootstrap_find_each_other(count: int) -> None:
    async def scenario(site: Site) -> None:
        for index in range(count):
            introduce(await site.start(member(index)), site.nodes[0])
        took = await site.agree(3)
        for node in site.nodes:
            view = [peer.peer_id for peer in node.membership.site]
            assert view == sorted(view)
            assert set(node.membership.current()) == set(node.membership.site)
        print(f"{count} nodes agree after {took:.2f} s")

    run(scenario)


@pytest.mark.parametrize(("count", "seeds"), [(2, 10), (5, 30), (20, 6)])
@pytest.mark.parametrize("silent", [False, True])
def test_a_dead_node_leaves_every_view_within_10_s(count: int, seeds: int, silent: bool) -> None:
    times = []

    async def scenario(site: Site) -> None:
        await site.grow(count)
        await trio.sleep(site.rng.random() * 5)
        victim = site.nodes[site.rng.randrange(count)]
        if silent:
            site.network.stop(victim.own.peer_id)
            site.nodes.remove(victim)
        else:
            site.kill(victim)
        times.append(await site.agree(10))

    for seed in range(seeds):
        run(scenario, seed)
    print(f"{count} nodes, silent={silent}: mean {sum(times) / len(times):.2f} s, max {max(times):.2f} s")
    assert max(times) < 10


@pytest.mark.parametrize("pause_s", [1.5, 20.0, 400.0])
def test_a_stopped_node_is_back_within_10_s_of_resuming(pause_s: float) -> None:
    async def scenario(site: Site) -> None:
        await site.grow(5)
        victim = site.nodes[2]
        site.network.stop(victim.own.peer_id)
        await trio.sleep(pause_s)
        site.network.resume(victim.own.peer_id)
        took = await site.agree(10)
        print(f"back {took:.2f} s after a pause of {pause_s} s")

    run(scenario)


def test_both_sides_of_a_partition_continue_and_merge_again() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(10)
        left, right = site.nodes[:4], site.nodes[4:]
        site.islands = {node.own.peer_id: 1 for node in left}
        # Most members that would probe the lost nodes are lost too, so it takes longer than for a single node.
        await site.agree(15, left)
        await site.agree(15, right)
        await trio.sleep(60)
        site.islands = {}
        took = await site.agree(10)
        print(f"healed after {took:.2f} s")

    run(scenario)


def test_no_member_is_dropped_by_mistake_at_5_percent_loss(caplog: pytest.LogCaptureFixture) -> None:
    """5 % of the messages in each direction are lost, so 9.75 % of the pings fail."""
    suspicions = []

    async def scenario(site: Site) -> None:
        await site.grow(10)
        site.loss = 0.05
        caplog.clear()
        versions = [node.membership.version for node in site.nodes]
        await trio.sleep(600)
        assert [node.membership.version for node in site.nodes] == versions
        suspicions.append(sum(record.message == "suspected" for record in caplog.records))

    caplog.set_level(logging.INFO, "node.membership.membership")
    run(scenario)
    print(f"suspected {suspicions[0]} times (10 nodes, 10 minutes), dropped never")


def test_a_suspended_node_drops_no_member() -> None:
    """The clock jumps, so that all timers of all nodes end at once, as on a host that was suspended."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            site = Site(nursery, 1)
            await site.grow(5)
            for _ in range(5):
                await trio.sleep(site.rng.random() * 3)
                versions = [node.membership.version for node in site.nodes]
                clock.jump(300)
                await trio.sleep(20)
                assert [node.membership.version for node in site.nodes] == versions
            nursery.cancel_scope.cancel()

    clock = MockClock(autojump_threshold=0)
    trio.run(main, clock=clock)


@pytest.mark.parametrize("incarnation", [2000, 1])
@pytest.mark.parametrize("away_s", [0.5, 30.0])
def test_a_restarted_node_is_known_by_its_new_address(incarnation: int, away_s: float) -> None:
    """Also if its clock went backwards, so that its incarnation is lower than before the restart."""

    async def scenario(site: Site) -> None:
        await site.grow(5)
        old = site.nodes[3]
        site.kill(old)
        await trio.sleep(away_s)
        new = await site.start(member(3, generation=1), incarnation)
        introduce(new, site.nodes[0])
        await until(lambda: all(new.own in node.membership.site for node in site.nodes), 5)
        await trio.sleep(20)
        assert all(old.own not in node.membership.site for node in site.nodes)
        await site.agree(0.1)

    run(scenario)


def test_a_node_that_leaves_is_out_of_all_views_within_2_s() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(20)
        leaver = site.nodes[7]
        started = trio.current_time()
        await leaver.gossiper.leave()
        assert trio.current_time() - started <= SwimConfig().probe_timeout_s
        site.kill(leaver)
        took = await site.agree(2)
        assert {states(node)[leaver.own.peer_id] for node in site.nodes} == {State.LEFT}
        print(f"gone after {took:.2f} s")

    run(scenario)


def test_a_quarantined_peer_is_not_in_the_view_and_not_contacted_for_a_time() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(5)
        node, bad = site.nodes[0], site.nodes[1]
        version = node.membership.version
        node.membership.quarantine(bad.own.peer_id, "signed a false record")
        assert node.membership.is_quarantined(bad.own.peer_id)
        assert bad.own not in node.membership.site
        assert node.membership.version == version + 1
        assert node.membership.changed_at == trio.current_time()
        assert node.membership.find(bad.own.peer_id) == bad.own
        row = next(row for row in node.membership.table() if row.member == bad.own)
        assert row.quarantine == "signed a false record"
        with pytest.raises(DeniedError):
            await node.gossiper.handle(bad.own.peer_id, Ping())
        await trio.sleep(1)
        node.asked.clear()
        await trio.sleep(120)
        assert bad.own.peer_id not in node.asked
        assert all(bad.own in other.membership.site for other in site.nodes[2:])
        await trio.sleep(QUARANTINE_S - 121.5)
        assert bad.own not in node.membership.site
        await site.agree(10)
        assert all(not row.quarantine for row in node.membership.table())

    run(scenario)


def revoke(node: Node, subject: str) -> list[str]:
    return node.gossiper.revoke((make_revocation(AUTHORITY.cluster, subject, 1, AUTHORITY.key.sign),))


def test_a_revoked_node_leaves_every_view_and_stays_out(tmp_path: Path) -> None:
    """S-66"""

    async def scenario(site: Site) -> None:
        await site.grow(20)
        gone = site.nodes[7]
        others = [node for node in site.nodes if node is not gone]
        assert revoke(site.nodes[3], gone.own.peer_id) == [gone.own.peer_id]
        assert revoke(site.nodes[3], gone.own.peer_id) == []
        await site.agree(1, others)
        for node in others:
            assert node.membership.find(gone.own.peer_id) is None
            assert node.membership.is_refused(gone.own.peer_id)
        introduce(gone, site.nodes[0])
        await site.nodes[0].membership.received(others[1].own.peer_id, (stated(gone.own, identity(7), 9999),))
        await until(lambda: gone.sees() == {gone.own.peer_id}, 240)
        assert gone.own.peer_id not in states(site.nodes[0])

    run(scenario, folder=tmp_path)


def test_a_node_that_was_off_learns_of_a_revocation_and_keeps_it(tmp_path: Path) -> None:
    """S-66"""

    async def scenario(site: Site) -> None:
        await site.grow(3)
        off, gone, witness = site.nodes
        site.kill(off)
        revoke(witness, gone.own.peer_id)
        site.kill(gone)
        back = await site.start(off.own, 2000)
        introduce(back, witness)
        await until(lambda: back.membership.is_refused(gone.own.peer_id), 5)
        site.kill(back)
        again = await site.start(off.own, 3000)
        assert again.membership.is_refused(gone.own.peer_id)

    run(scenario, folder=tmp_path)


def test_other_sites_hear_of_a_revocation(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        near, far, gone = member(0), member(1), member(2)
        far = msgspec.structs.replace(far, site="elsewhere")
        here, there = await site.start(near), await site.start(far)
        introduce(here, there)
        await trio.sleep(3)
        revoke(here, gone.peer_id)
        await until(lambda: there.membership.is_refused(gone.peer_id), 3)

    run(scenario, folder=tmp_path)


def test_a_member_that_sends_a_forged_revocation_is_quarantined(tmp_path: Path) -> None:
    """S-66"""

    async def scenario(site: Site) -> None:
        await site.grow(2)
        node, liar = site.nodes
        forged = make_revocation(AUTHORITY.cluster, member(9).peer_id, 1, lambda data: bytes(64))
        with pytest.raises(PeerMisbehavedError):
            node.gossiper.revoke((forged,))
        await node.gossiper.handle(liar.own.peer_id, Sync(liar.membership.swim.own, b"", (forged,)))
        assert "not signed" in node.membership.table()[0].quarantine
        assert not node.membership.is_refused(member(9).peer_id)

    run(scenario, folder=tmp_path)


def test_a_node_logs_that_it_is_revoked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(site: Site) -> None:
        await site.grow(1)
        revoke(site.nodes[0], site.nodes[0].own.peer_id)
        assert site.nodes[0].membership.find(site.nodes[0].own.peer_id) is not None

    run(scenario, folder=tmp_path)
    assert "the certificate of this node is revoked" in caplog.text


def test_a_node_cannot_quarantine_itself() -> None:
    async def scenario(site: Site) -> None:
        node = await site.start(member(0))
        node.membership.quarantine(node.own.peer_id, "a bug")
        assert node.membership.site == (node.own,)
        assert not node.membership.is_quarantined(node.own.peer_id)

    run(scenario)


def test_a_failed_read_speeds_detection() -> None:
    config = SwimConfig(probe_interval_s=30.0, suspicion_base=0.1)

    async def scenario(site: Site) -> None:
        for index in range(3):
            introduce(await site.start(member(index), config=config), site.nodes[0])
        await site.agree(5)
        await trio.sleep(31 - trio.current_time() % 30)
        victim = site.nodes[2]
        site.network.stop(victim.own.peer_id)
        before = len(site.nodes[0].asked)
        for _ in range(50):
            site.nodes[0].membership.report_failure(victim.own.peer_id)
        await until(lambda: states(site.nodes[0])[victim.own.peer_id] is State.SUSPECT, 1.2)
        pings = [peer for peer in site.nodes[0].asked[before:] if peer == victim.own.peer_id]
        assert 1 <= len(pings) <= 2  # one probe, and perhaps the ring's

    run(scenario)


def test_reports_about_strangers_and_the_dead_do_nothing() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(2)
        node = site.nodes[0]
        node.membership.report_failure(member(9).peer_id)
        dead = site.nodes[1].own.peer_id
        site.kill(site.nodes[1])
        await site.agree(10)
        node.membership.report_failure(dead)
        await trio.sleep(1)
        assert node.sees() == {node.own.peer_id}
        assert node.membership.find(member(9).peer_id) is None

    run(scenario)


def test_members_of_other_sites_are_remembered_and_not_probed() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(3)
        stranger = msgspec.structs.replace(member(7), site="elsewhere")
        far = await site.start(stranger)
        introduce(far, site.nodes[0])
        await trio.sleep(5)
        for node in site.nodes[:3]:
            assert stranger not in node.membership.site
            assert node.membership.find(stranger.peer_id) == stranger
            node.asked.clear()
        assert far.membership.site == (stranger,)
        await trio.sleep(60)
        assert not any(stranger.peer_id in node.asked for node in site.nodes[:3])

    run(scenario)


def test_a_helper_pings_for_others_and_only_members() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(3)
        helper, asker, target = site.nodes
        nonce = b"n" * 16

        async def ask(peer: PeerId) -> Reply:
            return (await helper.gossiper.handle(asker.own.peer_id, PingRequest(peer, nonce))).message

        answer = await ask(target.own.peer_id)
        assert isinstance(answer, Pong)
        check_alive(target.own.peer_id, nonce, answer.liveness)
        codes = []
        for peer in (member(9).peer_id, helper.own.peer_id):
            codes.append((await ask(peer)).code)
        site.network.stop(target.own.peer_id)
        codes.append((await ask(target.own.peer_id)).code)
        assert codes == ["not-found", "not-found", "unavailable"]
        with pytest.raises(BadInputError):
            await helper.gossiper.handle(asker.own.peer_id, GetHoldings("sha256:" + "0" * 64))

    run(scenario)


def test_a_helper_cannot_keep_a_dead_node_alive() -> None:
    """S-56"""

    async def scenario(site: Site) -> None:
        await site.grow(5)
        dead, *others = site.nodes
        for liar in others[:3]:

            async def lie(peer: PeerId, request: Request, handle: Handle = liar.handle) -> Answer:
                if isinstance(request, PingRequest):
                    return Answer(Pong(News(), bytes(64)))
                return await handle(peer, request)

            liar.handle = lie  # type: ignore[method-assign]
        site.kill(dead)
        await until(lambda: dead.own.peer_id not in others[3].sees(), 10)

    run(scenario)


def test_helpers_keep_a_node_alive_that_one_link_cannot_reach() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(4)
        first, second = site.nodes[0].own.peer_id, site.nodes[1].own.peer_id
        versions = [node.membership.version for node in site.nodes]
        loses = site.loses
        site.loses = lambda sender, receiver: {sender, receiver} == {first, second} or loses(sender, receiver)
        await trio.sleep(60)
        assert [node.membership.version for node in site.nodes] == versions

    run(scenario)


def test_the_view_stays_whole_after_any_cancellation() -> None:
    """Cancel one node at many moments of its start; the same membership then serves a new run."""

    async def scenario(site: Site) -> None:
        await site.grow(4)
        node = site.nodes[1]
        for step in range(60):
            node.scope.cancel()
            await trio.sleep(0.001)
            node.scope = trio.CancelScope()
            node.exchange = MemoryExchange(
                site.network, node.own.peer_id, refused=node.membership.is_refused, handler=node.handle
            )
            await site.nursery.start(node.run)
            await trio.sleep(step * 0.0371)
        node.asked.clear()
        await site.agree(10)
        await trio.sleep(10)
        assert set(node.asked) == {other.own.peer_id for other in site.nodes if other is not node}

    run(scenario)


def test_waiting_for_a_change() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(2)
        watched = site.nodes[0].membership
        version = watched.version
        site.nursery.start_soon(site.start, member(5))
        await trio.sleep(0.1)
        introduce(site.nodes[2], site.nodes[1])
        with trio.fail_after(5):
            await watched.wait_changed()
        assert watched.version > version
        assert member(5) in watched.site

    run(scenario)


def test_the_table_shows_ages_and_round_trips() -> None:
    async def scenario(site: Site) -> None:
        await site.grow(3)
        await trio.sleep(30)
        for row in site.nodes[0].membership.table():
            assert row.state is State.ALIVE
            assert row.incarnation == 1000
            assert 25 < row.since_s < 40
            assert row.seen_s is not None
            assert row.seen_s < 5
            assert row.rtt_s is not None
            assert math.isclose(row.rtt_s, 2 * LATENCY_S, rel_tol=0.1)

    run(scenario)


def test_a_restarted_node_finds_its_site_without_bootstrap(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "peers"

    async def scenario(site: Site) -> None:
        await site.grow(5)
        node = site.nodes[4]
        with trio.CancelScope() as scope:
            await site.nursery.start(run_scoped, scope, PeersFile(path), node.membership)
            await trio.sleep(1)
            site.kill(node)
            scope.cancel()
            await trio.sleep(0.1)
        assert {statement.peer_id for statement in PeersFile(path).load()} == {node.own.peer_id for node in site.nodes}
        await trio.sleep(60)
        again = await site.start(member(4), 2000)
        await site.nursery.start(PeersFile(path).run, again.membership)
        assert again.sees() == {again.own.peer_id}  # a remembered member is not shown before it has answered
        took = await site.agree(5)
        print(f"back in the site after {took:.2f} s")

    run(scenario)


async def run_scoped(
    scope: trio.CancelScope,
    peers: PeersFile,
    membership: Membership,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(peers.run, membership)
        task_status.started()


def test_the_peers_file_is_written_at_most_once_a_minute(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "peers"

    async def scenario(site: Site) -> None:
        await site.grow(2)
        await site.nursery.start(PeersFile(path).run, site.nodes[0].membership)
        await trio.sleep(1)
        introduce(await site.start(member(2)), site.nodes[1])
        await site.agree(5)
        assert len(PeersFile(path).load()) == 1
        await trio.sleep(SAVE_EVERY_S)
        assert len(PeersFile(path).load()) == 2

    run(scenario)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\x02\x91\x91\x01", b"\x92\x02\x91\x96" + b"\xa1\xff" * 6])
def test_a_damaged_peers_file_is_skipped(tmp_path: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path / "peers"
    path.write_bytes(data)
    assert PeersFile(path).load() == ()


def test_a_peers_file_of_an_earlier_version_is_set_aside(
    tmp_path: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers"
    path.write_bytes(msgspec.msgpack.encode((1, (member(1),))))
    assert PeersFile(path).load() == ()
    assert [record.message for record in caplog.records] == [
        "remembered peers are ignored: they have version 1, and this node reads 2"
    ]


def test_a_peers_file_can_invent_no_members(tmp_path: pytest.TempPathFactory) -> None:
    """S-55"""
    path = tmp_path / "peers"
    genuine = stated(member(1), identity(1))
    moved = msgspec.structs.replace(genuine, member=member(1, generation=1))
    path.write_bytes(msgspec.msgpack.encode((2, (moved, stated(member(2), identity(3)), genuine))))

    async def main() -> None:
        assert await PeersFile(path).read(passports_of(member(0))) == [genuine]

    trio.run(main)


def test_remembered_peers_are_bounded_and_not_forgotten_without_a_reason(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "peers"

    async def main() -> None:
        membership = Membership(member(0), 1, Random(1), passports_of(member(0)))
        membership.remembered(statements(range(1, MAX_REMEMBERED + 50)))
        PeersFile(path).save(membership)
        PeersFile(path).save(Membership(member(0), 1, Random(1), passports_of(member(0))))

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(PeersFile(path).load()) == MAX_REMEMBERED


def statements(indexes: Iterable[int]) -> list[Vouched]:
    return [stated(member(index), identity(index)) for index in indexes]


def test_a_renewed_certificate_reaches_all(tmp_path: pytest.TempPathFactory) -> None:
    async def scenario(site: Site) -> None:
        await site.grow(8)
        node = site.nodes[3]
        later = passports_of(node.own, identity(3), serial=2).author.certificate()
        renewing = Author(node.own.peer_id, identity(3).sign, lambda: later)
        node.membership.swim._author = renewing  # noqa: SLF001 # as if `Renewal` had changed what `certificate` returns
        node.membership.renewed()
        others = [other.membership for other in site.nodes if other is not node]
        took = await until(lambda: all(certificate_of(other, node) == later for other in others), 3)
        print(f"all have it after {took:.2f} s")

    run(scenario)


def certificate_of(membership: Membership, node: Node) -> bytes:
    return membership.swim.known[node.own.peer_id].statement.certificate
