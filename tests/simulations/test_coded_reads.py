"""Reads of blocks by the fetchers, keepers and homes of several nodes, in virtual time, with a counting registry."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from hashlib import sha256

import msgspec
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cache.store import READ_HERE, Held
from node.blocks.home import BACKGROUND_S
from node.blocks.values import LOOK_EVERY_S, BlockAddress, Stretch
from node.exchange.memory import MemoryNetwork
from node.identity.identity import Identity
from node.oci.references import Grant
from node.telemetry.sources import Source
from protocol.errors import DeniedError, UnavailableError
from protocol.fetch_plan import COLD_FLOOR_S, WARM_FLOOR_S
from protocol.health import QUICK_S, SpareBudget
from protocol.home_times import LEAST_S
from protocol.ids import BLOCK_SIZE, Buffer, ObjectRef, Piece, Shard
from protocol.messages import ShardFound
from protocol.records import make_record
from protocol.shard_proofs import make_proof
from tests.support.site_in_memory import (
    BODY,
    LOCATOR,
    REF,
    Node,
    Registry,
    WithMirror,
    all_read,
    flipped,
    home_of,
    keepers_of,
    not_keeping,
    play,
    read_whole,
    stretch,
)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 9])
def test_the_registry_sends_each_block_once_to_any_number_of_readers(count: int) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes)
        assert registry.asked == Counter(range(REF.block_count))

    play(count, scenario)


def test_held_blocks_are_read_without_the_registry() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].read_all()
        registry.down = True
        for node in nodes[1:]:
            obtained = await node.read_all()
            assert {block.source for block in obtained} <= {Source.PEER, Source.MEMORY, Source.DISK}

    play(6, scenario)


def test_a_killed_keeper_costs_no_copy_and_little_time() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes[:3])
        network.kill(nodes[2].own)
        before = trio.current_time()
        await nodes[3].read_all()
        assert trio.current_time() - before < 1
        assert registry.asked == Counter(range(REF.block_count))

    play(5, scenario)


def test_a_stopped_keeper_is_waited_for_once() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes[:3])
        network.stop(nodes[2].own)
        before = trio.current_time()
        await all_read(nodes[3:])
        assert trio.current_time() - before < 4
        assert registry.asked == Counter(range(REF.block_count))

    play(5, scenario)


def test_an_urgent_read_asks_for_a_spare_only_if_answers_are_uneven() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        asked: list[int] = []

        def count(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
            asked[-1] += 1
            return message, body

        network.latency_s = QUICK_S  # each way
        await all_read(nodes)
        reader = not_keeping(nodes, 0)
        for node in nodes:
            node.spoil = count
        for _ in range(60):
            asked.append(0)
            await reader.forget(0)
            await reader.read(0, urgent=True)
        assert asked[0] == 5
        assert asked[-5:] == [4] * 5

    play(6, scenario)


def test_an_urgent_read_waits_for_a_stopped_keeper_once_and_briefly() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes)
        reader = not_keeping(nodes, 0)
        took: list[float] = []
        for number in range(60):
            if number == 20:
                network.stop(keepers_of(nodes, 0)[1].own)
            await reader.forget(0)
            took.append((await reader.read(0, urgent=True)).seconds)
        slow = [seconds for seconds in took[20:] if seconds > 2 * took[19]]
        assert len(slow) <= 1
        assert max(took[20:]) < 2 * WARM_FLOOR_S

    play(6, scenario)


def test_a_spare_without_a_peer_to_ask_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes)
        reader = not_keeping(nodes, 0)
        await reader.forget(0)
        for keeper in keepers_of(nodes, 0):
            network.stop(keeper.own)
        spent.clear()
        await reader.read(0)
        assert len(spent) == 1

    spent: list[SpareBudget] = []
    spend = SpareBudget.spend
    monkeypatch.setattr("node.blocks.questions.SILENCE_S", 2 * COLD_FLOOR_S)  # so that a silent peer is late first
    monkeypatch.setattr(SpareBudget, "spend", lambda budget: spent.append(budget) or spend(budget))
    play(6, scenario)


def test_without_any_peer_that_answers_the_node_asks_the_registry() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes[1:]:
            network.stop(node.own)
        await nodes[0].read_all()
        assert registry.asked == Counter(range(REF.block_count))

    play(5, scenario)


def test_a_liar_is_detected_by_its_shards() -> None:
    """S-01"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes[:4])
        reader = nodes[4]
        homes = [home_of(nodes, index) for index in range(REF.block_count)]
        liar = next(node for node in nodes[:4] if node not in homes)
        liar.spoil = flipped
        await reader.read_all()
        assert set(reader.view.quarantined) == {liar.own}
        assert registry.asked == Counter(range(REF.block_count))

    play(5, scenario)


def test_a_record_that_no_member_signed_is_not_accepted() -> None:
    """S-23"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        stranger = Identity.of(Ed25519PrivateKey.generate())
        forged = bytearray(BLOCK_SIZE)
        sha = sha256(forged).digest()
        signed = make_record(REF, 0, sha, signer=stranger.peer_id, sign=stranger.sign)
        record = msgspec.structs.replace(signed, signature=b"")
        for node in nodes[1:]:
            await node.tiers.put(Piece(REF.block(0)), forged, record, kept_for=READ_HERE)
        held: Held = (await nodes[0].read(0)).held
        assert bytes(held.data) == BODY[:BLOCK_SIZE]

    play(5, scenario)


def test_a_new_home_asks_the_previous_keepers_before_the_registry() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes[:2])
        for node in nodes:
            network.kill(nodes[4].own)
            node.view.see(member for member in node.view.site if member.peer_id != nodes[4].own)
            node.view.changed_at = trio.current_time()
        registry.down = True
        await all_read(nodes[2:4])

    play(5, scenario)


def test_a_keeper_that_kept_another_shard_in_an_earlier_view_obtains_the_one_that_is_asked_for() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes)
        keeper = next(node for node in nodes if node is not home_of(nodes, 0))
        await keeper.tiers.discard(Piece(REF.block(0)))
        kept = next(shard for shard, bits in keeper.tiers.holdings(REF.digest).shards.items() if bits & 1)
        other = Shard(4, 1, (kept.index + 1) % 5)
        asker = next(node for node in nodes if node not in (keeper, home_of(nodes, 0)))
        with pytest.raises(UnavailableError, match="not held"):
            await asker.ask_shard(keeper.own, stretch(0), other, hops=0)
        for hops in (2, 1):
            assert (await asker.ask_shard(keeper.own, stretch(0), other, hops=hops)).index == other.index

    play(5, scenario)


@pytest.mark.parametrize("maker", ["nobody", "a member in quarantine"])
def test_a_keeper_passes_on_no_shard_for_which_no_accepted_member_answers(maker: str) -> None:
    """It obtains the shard anew: by a wrong one without a right signature, the keeper would answer for it itself."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].read(0)
        home, piece = home_of(nodes, 0), Piece(REF.block(0), Shard(4, 1, 1))
        keeper = keepers_of(nodes, 0)[1]
        record = (await home.tiers.get(Piece(REF.block(0))))[0].record  # type: ignore[index]
        wrong, liar = bytes(BLOCK_SIZE // 4), nodes[0] if nodes[0] not in (keeper, home) else nodes[1]
        proof = make_proof(record, Shard(4, 1, 1), wrong, maker=liar.own, sign=liar.identity.sign)
        await keeper.tiers.discard(Piece(REF.block(0)))
        await keeper.tiers.discard(piece)
        await keeper.tiers.put(piece, wrong, record, proof if maker != "nobody" else None, kept_for=READ_HERE)
        keeper.view.quarantine(liar.own, "a wrong shard")
        held = await keeper.own_shard(0, Shard(4, 1, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert bytes(held.data) == BODY[BLOCK_SIZE // 4 : BLOCK_SIZE // 2]
        kept = await keeper.tiers.get(piece)
        assert kept is not None
        assert kept[0].proof is not None
        assert kept[0].proof.maker == home.own

    play(6, scenario)


def test_another_member_acts_for_a_home_with_a_bad_link() -> None:
    """S-19"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        home, bad = home_of(nodes, 0), Registry(block_s=1000.0)
        home.registry.target = bad
        reader = next(node for node in nodes if node is not home)
        with trio.fail_after(LEAST_S + 2 * LOOK_EVERY_S):
            assert (await reader.read(0)).source is Source.PEER
        assert registry.asked[0] == 1

    play(5, scenario)


def test_a_slow_uplink_makes_all_homes_slow_and_no_block_is_read_twice() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.block_s = LEAST_S / 2
        for index in range(3):
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(node.read, index)
            registry.block_s = min(2 * registry.block_s, 2 * LEAST_S)
        assert registry.asked == Counter(range(3))

    play(5, scenario)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_a_background_block_is_read_by_its_home_or_by_no_member(count: int) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.background = 0
        for node in nodes:
            with pytest.raises(UnavailableError, match="not at this hour"):
                await node.read(0, background=True)
        assert not registry.asked
        registry.background = BACKGROUND_S / 2
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(partial(node.read, 0, background=True))
        assert registry.asked == Counter([0])

    play(count, scenario)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_a_background_block_keeps_no_client_waiting(count: int) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.background = 1000.0

        async def ahead() -> None:
            with pytest.raises(UnavailableError, match="go first"):
                await nodes[0].read(0, background=True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ahead)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(1):
                for node in nodes:
                    await node.read(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("node.blocks.home.BACKGROUND_S", 30.0)
        play(count, scenario)


def test_a_wrong_size_has_no_effect_on_other_reads() -> None:
    """A manifest may name a held digest with any size. With another size it names another object."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes[:4])
        wrong = Stretch(LOCATOR, ObjectRef(REF.digest, REF.size + 1), (0,))
        order = nodes[4].fetcher.begin(wrong, False, lambda index, obtained: None)
        await order.wait()
        order.release()
        assert not any(node.view.quarantined for node in nodes)
        await all_read(nodes)

    play(5, scenario)


def test_a_member_that_passes_on_a_strangers_record_is_no_liar() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes[:4])
        nodes[4].view.forget(nodes[0].own)
        await nodes[4].read_all()
        assert not nodes[4].view.quarantined

    play(5, scenario)


def test_two_concurrent_rereads_of_one_block_both_end() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        address = BlockAddress(LOCATOR, REF, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nodes[0].blocks.home.reread, address)
            nursery.start_soon(nodes[0].blocks.home.reread, address)
        assert registry.asked[0] == 2

    play(1, scenario)


async def some_read_granted(nodes: list[Node]) -> None:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(node.read_granted)


@pytest.mark.parametrize(
    ("count", "readers"), [(1, 1), (2, 1), (3, 2), (5, 1), (5, 2), (5, 5), (20, 1), (20, 5), (20, 20)]
)
def test_a_private_object_is_read_once_by_one_of_its_readers(count: int, readers: int) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.private = True
        await some_read_granted(nodes[:readers])
        assert registry.asked == Counter(range(REF.block_count))
        registry.down = True
        await some_read_granted(nodes[readers:])

    play(count, scenario)


def test_a_reader_that_dies_does_not_stop_the_others() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.private, registry.block_s = True, 0.5
        nodes[0].registry.target = dead = Registry(block_s=0.5)
        dead.private = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nodes[0].read_granted)
            await trio.sleep(0.7)
            nursery.start_soon(nodes[1].read_granted)
            await trio.sleep(0.1)
            network.kill(nodes[0].own)
            with trio.move_on_after(30):
                await nodes[2].read_granted()
                assert copies(registry) <= 2
                nursery.cancel_scope.cancel()

    play(5, scenario)


@pytest.mark.parametrize("mirrored", ["everywhere", "at home"])
def test_a_member_deceived_by_a_mirror_is_no_liar_and_the_object_is_repaired(mirrored: str) -> None:
    """S-13"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        bad = WithMirror()
        home = home_of(nodes, 1).own
        for node in nodes:
            if mirrored == "everywhere" or node.own == home:
                node.registry.target = bad
        reader = next(node for node in nodes if node.own != home)
        assert await read_whole(reader.library) == BODY
        assert list(reader.view.quarantined) == ([] if mirrored == "everywhere" else [home])

    play(5, scenario)


def test_a_member_reads_for_others_only_content_that_its_own_client_reads() -> None:
    """S-27"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.private = True
        elsewhere = replace(LOCATOR, repository="other", grant=Grant("Bearer of another repository"))
        with nodes[0].blocks.grants.granted(elsewhere, REF.digest):
            for reader in ("", nodes[0].own):
                with pytest.raises(DeniedError):
                    await nodes[1].blocks.home.blocks(stretch(0, reader=reader), lambda index, obtained: None)
        assert not registry.asked

    play(2, scenario)


def copies(registry: Registry) -> float:
    return registry.asked.total() / REF.block_count
