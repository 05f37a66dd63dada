"""Outages of the uplink that are shorter than a client's patience, and the end of longer ones, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from random import Random

import pytest
import trio

from node.registry.retry import BODY, Breaker
from node.registry.upstreams import REACHED_S, Upstreams
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE, PeerId
from simulations import uplink_cut
from simulations.network import SimulatedNetwork, constant
from simulations.registry import PART, PORTION_BYTES, UPSTREAM, Registry, locator, wired
from simulations.run import play, silent
from simulations.scenario import SITE
from simulations.uplink_cut import UplinkCut

BLOBS = locator("blobs")
RATE = 1_000_000.0
"""Bytes a second of the uplink: a block takes half a second."""


class Site:
    """Nodes without each other, on one uplink."""

    def __init__(self, count: int) -> None:
        self.registry, self.network = Registry(1, constant(0.01)), SimulatedNetwork(Random(1), constant(0.001))
        self.network.uplink(SITE).down.rate = RATE
        (self.blob,) = self.registry.push("v1", [4 * BLOCK_SIZE]).layers
        self.nodes = [
            Upstreams(
                [PART],
                count=lambda name, count: None,
                rng=Random(number),
                connect=wired(self.registry, self.network, PeerId(f"node {number}"), SITE),
            )
            for number in range(count)
        ]

    @property
    def received(self) -> int:
        return self.registry.bytes_by_site[SITE]

    async def read(self, node: int, first: int = 0, count: int = 1) -> bytes:
        async with aclosing(self.nodes[node].blocks(BLOBS, self.blob, first, count)) as blocks:
            return b"".join([bytes(block) async for block in blocks])


def simulate(scenario: Callable[[Site], Awaitable[None]], count: int = 1) -> None:
    play(1, lambda: scenario(Site(count)))


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("at_s", [0.005, 0.3, 0.9])
def test_a_cut_of_3_seconds_costs_a_read_no_more_than_time(at_s: float, resets: bool) -> None:
    async def scenario(site: Site) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(site.read, 0, 0, 4)
            await trio.sleep(at_s)
            site.network.cut_uplink(SITE, resets=resets)
            await trio.sleep(3)
            site.network.mend_uplink(SITE)
        assert trio.current_time() < at_s + BODY.patience_s + 3
        assert site.blob.size <= site.received <= site.blob.size + PORTION_BYTES

    simulate(scenario)


@pytest.mark.parametrize("resets", [False, True])
def test_a_failed_read_is_continued_within_its_block_by_the_next_read(resets: bool) -> None:
    async def scenario(site: Site) -> None:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(UnavailableError):
                    await site.read(0)

            nursery.start_soon(read)
            await trio.sleep(0.3)
            site.network.cut_uplink(SITE, resets=resets)
        site.network.mend_uplink(SITE)
        await trio.sleep(Breaker.LONGEST_PAUSE_S)
        assert site.received > BLOCK_SIZE / 3
        data = await site.read(0)
        assert site.received <= BLOCK_SIZE + PORTION_BYTES
        assert data == await site.read(0), "the bytes from two answers make the block"

    simulate(scenario)


def test_a_cancelled_read_is_continued_but_not_after_a_minute() -> None:
    async def scenario(site: Site) -> None:
        for pause_s, most in ((1, BLOCK_SIZE + PORTION_BYTES), (61, 1.7 * BLOCK_SIZE)):
            before = site.received
            with trio.move_on_after(0.3):
                await site.read(0)
            await trio.sleep(pause_s)
            await site.read(0)
            assert site.received - before <= most
        assert most > BLOCK_SIZE + PORTION_BYTES

    simulate(scenario)


async def fails(site: Site, node: int) -> bool:
    try:
        await site.read(node)
    except UnavailableError:
        return True
    return False


def test_a_node_that_hears_that_the_registry_answers_tries_at_once() -> None:
    async def scenario(site: Site) -> None:
        ours, other = site.nodes
        site.network.cut_uplink(SITE, resets=True)
        while trio.current_time() < 60:
            assert await fails(site, 0)
            await trio.sleep(0.5)
        site.network.mend_uplink(SITE)
        assert not ours.answers(UPSTREAM)
        assert not other.answers(UPSTREAM)
        await site.read(1)
        assert other.answers(UPSTREAM)
        asked = len(site.registry.attempts)
        for _ in range(5):
            ours.told(UPSTREAM)
        assert len(site.registry.attempts) == asked, "a hint alone asks nothing"
        assert not await fails(site, 0)
        await trio.sleep(REACHED_S)
        assert not other.answers(UPSTREAM)
        ours.told("unknown.test")

    simulate(scenario, 2)


def test_false_hints_cost_one_probe_a_pause() -> None:
    async def scenario(site: Site) -> None:
        site.network.cut_uplink(SITE, resets=True)
        while trio.current_time() < 600:
            site.nodes[0].told(UPSTREAM)
            assert await fails(site, 0)
            await trio.sleep(0.1)
        assert len(site.registry.attempts) <= 2 * 600 / Breaker.LONGEST_PAUSE_S + 20

    simulate(scenario)


@pytest.mark.parametrize("resets", [False, True])
def test_a_cut_of_3_seconds_costs_a_crowd_a_fifth_of_a_copy_at_most_and_fails_no_pull(resets: bool) -> None:
    result = uplink_cut.run(UplinkCut(nodes=8, image=8_000_000, at_s=0.5, cut_s=3.0, resets=resets), silent)
    assert not any(pull.error for pull in result.pulls)
    assert result.copies <= 1.2
