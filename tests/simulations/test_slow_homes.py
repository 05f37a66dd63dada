"""Homes that only say that they work, or that bytes come on at them, and homes on a slow link, in virtual time."""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from node.exchange.contract import Sender
from node.exchange.memory import MemoryNetwork
from protocol.home_times import LEAST_S, OVERTAKEN_S
from protocol.ids import PeerId
from protocol.messages import GetShards
from tests.support.site_in_memory import REF, Node, Registry, play

LOOKS_S = 2.0
"""A read looks once a second whether a home is slow, and then asks another."""


@pytest.mark.parametrize("claims", [False, True], ids=["works", "bytes come on"])
def test_a_member_that_only_says_so_costs_a_first_pull_little_time(claims: bool) -> None:
    """S-19"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        async def never(peer: PeerId, request: GetShards, sender: Sender) -> None:
            while True:
                if claims:
                    sender.coming()
                await trio.sleep(0.25)

        nodes[0].server = never
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for node in nodes[1:]:
                for index in range(REF.block_count):
                    nursery.start_soon(node.read, index)
        assert trio.current_time() - began <= max(OVERTAKEN_S, LEAST_S) + LOOKS_S
        assert not any(node.view.quarantined for node in nodes), "slowness does not count as a lie"
        assert max(registry.asked.values()) == 1

    play(6, scenario)


def test_homes_on_a_slow_uplink_are_waited_for() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.block_s = 20.0
        async with trio.open_nursery() as nursery:
            for node in nodes:
                for index in range(REF.block_count):
                    nursery.start_soon(node.read, index)
        assert registry.asked == Counter(range(REF.block_count))

    play(5, scenario, limit_s=300.0)
