"""Send slots (node/exchange/send_slots.py), in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from node.exchange.send_slots import SLOT_S, SLOTS, SLOTS_PER_PEER, SendSlots
from protocol.ids import PeerId


def play(scenario: Callable[[SendSlots], Awaitable[None]]) -> None:
    async def main() -> None:
        slots = SendSlots()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slots.run)
            await scenario(slots)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def peer_of(lot: trio.lowlevel.ParkingLot) -> PeerId:
    return PeerId(str(id(lot)))


async def send(slots: SendSlots, seconds: float, ended: list[float]) -> None:
    """Send on a new connection with a peer of its own."""
    lot = trio.lowlevel.ParkingLot()
    while not slots.take(lot, peer_of(lot)):
        await lot.park()
    await trio.sleep(seconds)
    slots.give(lot)
    ended.append(trio.current_time())


def test_all_senders_get_a_slot_a_few_at_a_time() -> None:
    async def scenario(slots: SendSlots) -> None:
        ended: list[float] = []
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3 * SLOTS):
                nursery.start_soon(send, slots, 0.5, ended)
            await trio.testing.wait_all_tasks_blocked()
            assert slots.contended
        assert [round(at - start, 3) for at in ended] == [0.5] * SLOTS + [1.0] * SLOTS + [1.5] * SLOTS
        assert not slots.contended

    play(scenario)


def test_slow_receivers_delay_the_others_by_one_turn_only() -> None:
    async def scenario(slots: SendSlots) -> None:
        ended: list[float] = []
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(SLOTS):
                nursery.start_soon(send, slots, 1000.0, [])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(send, slots, 0.0, ended)
        assert SLOT_S <= ended[0] - start <= 1.5 * SLOT_S

    play(scenario)


def test_a_sender_that_leaves_gives_up_its_slot_and_its_turn() -> None:
    async def scenario(slots: SendSlots) -> None:
        lots = [trio.lowlevel.ParkingLot() for _ in range(SLOTS + 2)]
        assert [slots.take(lot, peer_of(lot)) for lot in lots] == [True] * SLOTS + [False] * 2
        slots.leave(lots[SLOTS])
        slots.leave(lots[0])
        assert slots.take(lots[SLOTS + 1], peer_of(lots[SLOTS + 1]))
        assert not slots.contended
        assert not slots.take(lots[0], peer_of(lots[0]))

    play(scenario)


def test_one_peer_leaves_turns_to_the_others() -> None:
    """S-40"""

    async def scenario(slots: SendSlots) -> None:
        hog, other = PeerId("hog"), PeerId("other")
        lots = [trio.lowlevel.ParkingLot() for _ in range(SLOTS)]
        assert sum(slots.take(lot, hog) for lot in lots) == SLOTS_PER_PEER
        free, waits = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        assert slots.take(free, other)
        slots.give(free)
        assert slots.take(waits, other), "although requests of the hog have waited longer"
        slots.give(lots[0])
        assert slots.take(lots[SLOTS_PER_PEER], hog)

    play(scenario)
