"""A site with more members than its keepers can serve: its cells, reads across cells, and their failures.

Virtual time, real codes and records. The names S-nn are lines of docs/SECURITY.md.
"""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing

from node.exchange.contract import Sender
from node.exchange.memory import MemoryNetwork
from node.telemetry.sources import Source
from protocol.ids import PeerId, Piece, Shard
from protocol.messages import GetShards
from protocol.placement import HOME_HOPS
from tests.support.site_in_memory import REF, Node, Registry, Spoiling, all_read, flipped, play, route_of, signing

MANY = 60
"""Members. They make at least four cells."""


def deep(nodes: list[Node], index: int) -> Node:
    """A member that keeps nothing of a block, with the most cells between it and the block's home."""
    readers = (node for node in nodes if node.own not in route_of(node, index).keepers)
    return max(readers, key=lambda node: route_of(node, index).depth)


def by_id(nodes: list[Node]) -> dict[PeerId, Node]:
    return {node.own: node for node in nodes}


def test_a_large_site_reads_each_block_once_and_no_node_answers_for_all() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        answers: Counter[PeerId] = Counter()

        def counted(node: Node) -> None:

            async def count(peer: PeerId, request: GetShards, sender: Sender) -> None:
                answers[node.own] += 1
                await node.serve(peer, request, sender)

            node.server = count

        for node in nodes:
            counted(node)
        await all_read(nodes)
        assert registry.asked == Counter(range(REF.block_count))
        assert max(route_of(node, 0).depth for node in nodes) > 0
        assert max(answers.values()) < 25 * REF.block_count  # of 60 readers

    play(MANY, scenario)


def test_a_cell_serves_its_members_when_all_cells_above_are_dead() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader = deep(nodes, 0)
        own = route_of(reader, 0)
        before = next(node for node in nodes if node is not reader and route_of(node, 0).cells == own.cells)
        await before.read(0)
        for cell in own.cells[1:]:
            for peer in cell:
                network.kill(peer)
        registry.down = True
        assert (await reader.read(0)).source is Source.PEER

    play(MANY, scenario)


def test_a_reader_that_its_own_cell_fails_asks_the_root_cell() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader = deep(nodes, 0)
        for peer in route_of(reader, 0).keepers[:2]:
            network.kill(peer)
        obtained = await reader.read(0)
        assert obtained.source is Source.PEER
        assert set(obtained.peers) <= set(route_of(reader, 0).root.keepers)
        assert registry.asked == Counter([0])

    play(MANY, scenario)


def test_a_source_that_hangs_costs_a_moment_and_no_copy() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader = deep(nodes, 0)
        network.stop(route_of(reader, 0).cells[1][2])
        before = trio.current_time()
        await reader.read(0)
        assert trio.current_time() - before < 4
        assert registry.asked == Counter([0])

    play(MANY, scenario)


def test_one_member_acts_for_a_dead_home_and_all_reads_succeed() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        home = route_of(nodes[0], 0).home
        network.kill(home)
        alive = [node for node in nodes if node.own != home]
        async with trio.open_nursery() as nursery:
            for node in alive:
                nursery.start_soon(node.read, 0)
        assert registry.asked == Counter([0])

    play(MANY, scenario)


def test_members_with_different_views_wait_in_no_circle() -> None:
    """Half of the members see only the first half of the site."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        members = nodes[0].view.site
        for node in nodes[::2]:
            node.view.see(members[: len(members) // 2])
        await all_read(nodes)
        assert max(registry.asked.values()) <= 4

    play(MANY, scenario)


@pytest.mark.parametrize("kind", ["altered", "signed"])
def test_a_liar_between_the_cells_is_identified_at_once_and_no_honest_member_blamed(kind: str) -> None:
    """S-04"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader = deep(nodes, 0)
        liar = by_id(nodes)[route_of(reader, 0).cells[1][0]]
        spoil = flipped if kind == "altered" else signing(liar.identity)

        async def lie(peer: PeerId, request: GetShards, sender: Sender) -> None:
            await liar.serve(peer, request, Spoiling(sender, spoil) if request.keep else sender)

        liar.server = lie
        await reader.read(0)
        await trio.testing.wait_all_tasks_blocked()
        accused = {peer for node in nodes for peer in node.view.quarantined}
        assert accused == {liar.own}
        await all_read([node for node in nodes if node is not liar])
        assert {peer for node in nodes for peer in node.view.quarantined} == {liar.own}

    play(MANY, scenario)


def test_a_shard_keeps_the_proof_of_the_home_that_made_it_through_all_cells() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader = deep(nodes, 0)
        route = route_of(reader, 0)
        await reader.read(0)
        for rank, peer in enumerate(route.keepers):
            shard = Shard(route.shape.k, route.shape.m, rank)
            kept = await by_id(nodes)[peer].tiers.get(Piece(REF.block(0), shard))
            assert kept is None or (kept[0].proof and kept[0].proof.maker == route.home)
        assert route.depth > 1

    play(MANY, scenario)


def test_a_request_that_a_request_causes_has_fewer_hops() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        hops: list[int] = []

        def watched(node: Node) -> None:
            async def serve(peer: PeerId, request: GetShards, sender: Sender) -> None:
                hops.append(request.hops)
                await node.serve(peer, request, sender)

            node.server = serve

        for node in nodes:
            watched(node)
        reader = deep(nodes, 0)
        await reader.read(0)
        depth = route_of(reader, 0).depth
        assert set(hops) == set(range(HOME_HOPS - 1, HOME_HOPS + depth + 1))

    play(MANY, scenario)
