"""Reads for clients that go straight to the registry, and what members tell each other of it, in virtual time."""

from __future__ import annotations

from collections import Counter

import pytest

from node.exchange.memory import MemoryNetwork
from node.telemetry.sources import Source
from protocol.ids import Piece
from protocol.ways import Choice, Reason, Way, Ways
from tests.support.site_in_memory import REF, Node, Registry, play

STRAIGHT = Choice(Way.REGISTRY, Reason.SOONER)
MEASURED = Choice(Way.SITE, Reason.UNKNOWN)


class News:
    """Says what the test wants, and notes what it is told."""

    def __init__(self) -> None:
        self.choice = MEASURED
        self.reached = False
        self.heard: list[str] = []
        self.both = Ways()

    def is_open(self, upstream: str) -> bool:
        return True

    def answers(self, upstream: str) -> bool:
        return self.reached

    def told(self, upstream: str) -> None:
        self.heard.append(upstream)

    def choose(self, upstream: str, length: int, nodes: int) -> Choice:
        return self.choice

    def ways(self, upstream: str) -> Ways:
        return self.both


class Knowing(Node):
    news_class = News
    news: News


def test_a_read_goes_straight_to_the_registry_and_is_held_and_served_like_others() -> None:
    async def scenario(nodes: list[Knowing], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].read_all()
        nodes[1].news.choice = STRAIGHT
        obtained = await nodes[1].read_all()
        assert {block.source for block in obtained} <= {Source.ORIGIN, Source.MEMORY}
        assert {block.way for block in obtained if block.source is Source.ORIGIN} == {STRAIGHT.text}
        assert max(registry.asked.values()) == 2
        assert all(nodes[1].tiers.holds(Piece(REF.block(index))) for index in range(REF.block_count))
        registry.down = True
        await nodes[2].read_all()

    play(5, scenario, make=Knowing)


def test_a_registry_that_fails_is_replaced_by_the_site_in_the_same_read() -> None:
    async def scenario(nodes: list[Knowing], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].read_all()
        registry.down = True
        nodes[1].news.choice = STRAIGHT
        assert {block.source for block in await nodes[1].read_all()} <= {Source.PEER, Source.MEMORY, Source.DISK}

    play(5, scenario, make=Knowing)


def test_reads_through_the_site_are_measured_and_marked() -> None:
    async def scenario(nodes: list[Knowing], registry: Registry, network: MemoryNetwork) -> None:
        obtained = await nodes[0].read_all()
        by_peers = [block for block in obtained if block.source is Source.PEER]
        assert {block.way for block in by_peers} == {MEASURED.text}
        gauge = nodes[0].news.both.site
        assert gauge.rate > 0
        assert (gauge.reads, gauge.owed) == (0, 0)

    play(5, scenario, make=Knowing)


def test_blocks_that_no_client_waits_for_leave_no_choice() -> None:
    async def scenario(nodes: list[Knowing], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes:
            node.news.choice = STRAIGHT
        for node in nodes:
            await node.read(0, background=True)
        assert registry.asked == Counter([0])

    play(5, scenario, make=Knowing)


@pytest.mark.parametrize("reached", [False, True])
def test_members_that_are_asked_for_blocks_hear_that_the_registry_answers(reached: bool) -> None:
    async def scenario(nodes: list[Knowing], registry: Registry, network: MemoryNetwork) -> None:
        nodes[0].news.reached = reached
        await nodes[0].read_all()
        assert nodes[0].news.heard == []
        assert any(node.news.heard for node in nodes[1:]) == reached

    play(5, scenario, make=Knowing)
