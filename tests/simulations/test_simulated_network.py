"""The links, losses and partitions of simulations/network.py, in exact times."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio
import trio.testing

from protocol.ids import PeerId
from simulations.network import QUEUE_BYTES, TIMEOUT_S, WIRE_SHARE, Link, Port, SimulatedNetwork, constant, lognormal

ONE, TWO, THREE = PeerId("12D3KooWone"), PeerId("12D3KooWtwo"), PeerId("12D3KooWthree")
RATE, LATENCY_S = 1e6, 0.01
BODY = 100_000
TOOK_S = BODY * WIRE_SHARE / RATE


def play(scenario: Callable[[SimulatedNetwork], Awaitable[None]], *, uplink: float = 1e9) -> None:
    async def main() -> None:
        network = SimulatedNetwork(Random(1), constant(LATENCY_S), uplink_latency=constant(0.1))
        for peer, site in ((ONE, "here"), (TWO, "here"), (THREE, "there")):
            network.plug(peer, site, Port(RATE, RATE))
        network.uplink("here").up.rate = uplink
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.alarms.run)
            await scenario(network)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def times(network: SimulatedNetwork, *frames: tuple[PeerId, PeerId, int]) -> list[float]:
    """The times at which these frames arrive. All are sent at the same moment, in this order."""
    began, came = trio.current_time(), [0.0] * len(frames)

    async def send(number: int, sender: PeerId, receiver: PeerId, size: int) -> None:
        await network.travel(sender, receiver, size)
        came[number] = trio.current_time() - began

    async with trio.open_nursery() as nursery:
        for number, frame in enumerate(frames):
            nursery.start_soon(send, number, *frame)
            await trio.testing.wait_all_tasks_blocked()
    return came


def test_a_frame_takes_its_size_over_the_slowest_rate_plus_the_latency() -> None:
    async def scenario(network: SimulatedNetwork) -> None:
        network.port(TWO).down.rate = RATE / 2
        assert await times(network, (ONE, TWO, BODY)) == [pytest.approx(2 * TOOK_S + LATENCY_S)]

    play(scenario)


def test_frames_that_share_a_link_use_it_one_after_the_other() -> None:
    async def scenario(network: SimulatedNetwork) -> None:
        came = await times(network, (ONE, TWO, BODY), (ONE, TWO, BODY), (ONE, TWO, BODY))
        assert came == pytest.approx([n * TOOK_S + LATENCY_S for n in (1, 2, 3)])

    play(scenario)


def test_a_small_frame_waits_at_most_for_a_switchs_queue() -> None:
    link = Link(RATE)
    for _ in range(10):
        link.send(0.0, BODY)
    assert link.send(0.0, 100)[0] == pytest.approx(QUEUE_BYTES / RATE)
    assert link.carried == 10 * BODY + 100


def test_a_frame_between_sites_passes_both_uplinks() -> None:
    async def scenario(network: SimulatedNetwork) -> None:
        came = await times(network, (ONE, THREE, BODY), (TWO, THREE, BODY))
        assert came == pytest.approx([10 * TOOK_S + LATENCY_S + 0.1, 20 * TOOK_S + LATENCY_S + 0.1])

    play(scenario, uplink=RATE / 10)


def test_frames_across_a_partition_arrive_when_it_is_healed() -> None:
    async def scenario(network: SimulatedNetwork) -> None:
        network.part([ONE], [TWO])
        assert not network.reaches(ONE, TWO)
        with trio.move_on_after(60) as waiting:
            await network.travel(ONE, TWO, 100)
        assert waiting.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.travel, ONE, TWO, 100)
            await trio.testing.wait_all_tasks_blocked()
            network.heal()
        assert network.reaches(ONE, TWO)

    play(scenario)


def test_a_site_without_its_uplink_reaches_only_itself() -> None:
    async def scenario(network: SimulatedNetwork) -> None:
        network.cut_uplink("there")
        assert network.reaches(ONE, TWO)
        assert not network.reaches(ONE, THREE)
        network.mend_uplink("there")
        assert network.reaches(ONE, THREE)

    play(scenario)


def test_lost_packets_cost_timeouts_at_the_end_and_rate_before() -> None:
    async def scenario(network: SimulatedNetwork) -> None:
        network.loss = 0.05
        small = [(await times(network, (ONE, TWO, 100)))[0] for _ in range(2000)]
        late = [took for took in small if took > TIMEOUT_S]
        assert 0.035 * len(small) < len(late) < 0.065 * len(small)
        body = (await times(network, (ONE, TWO, BODY)))[0]
        assert body > TOOK_S + 0.2  # Mathis: 1.22 * 1448 bytes / (20 ms * sqrt(0.05)) are 395 kB/s

    play(scenario)


def test_a_lognormal_latency_has_the_requested_median_and_tail() -> None:
    rng, latency = Random(2), lognormal(0.001, 0.02)
    drawn = sorted(latency(rng) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(0.001, rel=0.05)
    assert drawn[19_800] == pytest.approx(0.02, rel=0.25)
