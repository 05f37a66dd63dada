"""Faults of the memory network, and the exact times at which both sides of a request act."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from node.exchange.contract import Answer, Handler, Lane, State
from node.exchange.keep_alive import WAITING_EVERY_S, WAITING_FIRST_S, KeepAlive, OpenWork, Work
from node.exchange.memory import MemoryExchange, MemoryNetwork
from protocol.errors import PeerUnavailableError
from protocol.ids import PeerId
from protocol.messages import Ping, Pong, Request

ONE, TWO = PeerId("12D3KooWone"), PeerId("12D3KooWtwo")
PING, PONG = Ping(), Answer(Pong())


def play(scenario: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await scenario(nursery)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def after(seconds: float) -> Handler:
    async def handler(peer: PeerId, request: Request) -> Answer:
        await trio.sleep(seconds)
        return PONG

    return handler


async def pair(nursery: trio.Nursery, network: MemoryNetwork, handler: Handler) -> MemoryExchange:
    """The exchange of ONE; TWO runs beside it and answers with `handler`."""
    exchanges = [MemoryExchange(network, peer, refused=lambda peer: False, handler=handler) for peer in (ONE, TWO)]
    for exchange in exchanges:
        await nursery.start(exchange.run)
    return exchanges[0]


def test_waiting_messages_are_sent_at_their_times() -> None:
    times: list[float] = []

    async def scenario(nursery: trio.Nursery) -> None:
        asker = await pair(nursery, MemoryNetwork(), after(1.4))
        start = trio.current_time()
        await asker.request(
            TWO, PING, lane=Lane.BULK, silence_s=0.6, heard=lambda state: times.append(trio.current_time() - start)
        )

    play(scenario)
    assert times == pytest.approx([WAITING_FIRST_S, WAITING_EVERY_S, 2 * WAITING_EVERY_S])


def test_a_connection_says_that_it_works_on_all_its_requests_at_once() -> None:
    said: list[tuple[str, float, list[int]]] = []

    async def scenario(nursery: trio.Nursery) -> None:
        keep_alive = KeepAlive[str, int]()
        busy, quick = OpenWork[int](), OpenWork[int]()

        def say(link: str, report: list[tuple[int, State]]) -> None:
            said.append((link, round(trio.current_time() - start, 6), [number for number, _ in report]))

        nursery.start_soon(keep_alive.run, say)
        start = trio.current_time()
        for number in range(3):
            for link, work in (("busy", busy), ("quick", quick)):
                work.by_number[number] = Work()
                keep_alive.begin(link, work)
            await trio.sleep(0.2)
            del quick.by_number[number]
            await trio.sleep(0.1)
        del busy.by_number[1]
        await trio.sleep(0.7)

    play(scenario)
    assert said == [
        ("busy", 0.25, [0]),
        ("busy", 0.5, [0, 1]),
        ("busy", 0.875, [0, 1, 2]),
        ("busy", 1.0, [0, 2]),
        ("busy", 1.5, [0, 2]),
    ]


def test_latency_is_paid_both_ways() -> None:
    async def scenario(nursery: trio.Nursery) -> None:
        asker = await pair(nursery, MemoryNetwork(latency_s=0.2), after(0.1))
        start = trio.current_time()
        assert await asker.request(TWO, PING, lane=Lane.BULK, silence_s=1.0) == PONG
        assert trio.current_time() - start == pytest.approx(0.5)

    play(scenario)


def test_a_stopped_peer_is_silent_and_answers_once_resumed() -> None:
    async def scenario(nursery: trio.Nursery) -> None:
        network = MemoryNetwork()
        asker = await pair(nursery, network, after(0.0))
        network.stop(TWO)
        start = trio.current_time()
        with pytest.raises(PeerUnavailableError):
            await asker.request(TWO, PING, lane=Lane.BULK, silence_s=2.0)
        assert trio.current_time() - start == pytest.approx(2.0)
        with trio.move_on_after(1.0):
            await asker.request(TWO, PING, lane=Lane.BULK, silence_s=2.0)
        network.resume(TWO)
        assert await asker.request(TWO, PING, lane=Lane.BULK, silence_s=2.0) == PONG

    play(scenario)


def test_a_killed_peer_is_unavailable_until_it_restarts() -> None:
    async def scenario(nursery: trio.Nursery) -> None:
        network = MemoryNetwork()
        asker = await pair(nursery, network, after(10.0))

        async def kill() -> None:
            await trio.sleep(1.0)
            network.kill(TWO)

        nursery.start_soon(kill)
        start = trio.current_time()
        for _ in range(2):
            with pytest.raises(PeerUnavailableError):
                await asker.request(TWO, PING, lane=Lane.BULK, silence_s=5.0)
        assert trio.current_time() - start == pytest.approx(1.0)
        again = MemoryExchange(network, TWO, refused=lambda peer: False, handler=after(0.0))
        await nursery.start(again.run)
        assert await asker.request(TWO, PING, lane=Lane.BULK, silence_s=5.0) == PONG

    play(scenario)


def test_a_killed_peer_can_send_no_request() -> None:
    async def scenario(nursery: trio.Nursery) -> None:
        network = MemoryNetwork()
        asker = await pair(nursery, network, after(10.0))
        with trio.move_on_after(1.0):
            await asker.request(TWO, PING, lane=Lane.BULK, silence_s=5.0)
        network.kill(ONE)
        with pytest.raises(PeerUnavailableError):
            await asker.request(TWO, PING, lane=Lane.BULK, silence_s=5.0)

    play(scenario)
