"""Whose turn it is to send, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from node.exchange.send_slots import SLOT_S, SLOTS, SLOTS_PER_PEER, SendSlots
from protocol.ids import PeerId


def play(scenario: Callable[[SendSlots], Awaitable[None]]) -> None:
    async def main() -> None:
        turns = SendSlots()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turns.run)
            await scenario(turns)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def peer_of(lot: trio.lowlevel.ParkingLot) -> PeerId:
    """Each its own."""
    return PeerId(str(id(lot)))


async def send(turns: SendSlots, lot: trio.lowlevel.ParkingLot, seconds: float, ended: list[float]) -> None:
    while not turns.take(lot, peer_of(lot)):
        await lot.park()
    await trio.sleep(seconds)
    turns.give(lot)
    ended.append(trio.current_time())


def test_all_that_want_to_send_do_so_a_few_at_a_time() -> None:
    async def scenario(turns: SendSlots) -> None:
        ended: list[float] = []
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3 * SLOTS):
                nursery.start_soon(send, turns, trio.lowlevel.ParkingLot(), 0.5, ended)
            await trio.testing.wait_all_tasks_blocked()
            assert turns.contended
        assert [round(at - start, 3) for at in ended] == [0.5] * SLOTS + [1.0] * SLOTS + [1.5] * SLOTS
        assert not turns.contended

    play(scenario)


def test_slow_receivers_hold_up_the_others_for_a_turn_only() -> None:
    async def scenario(turns: SendSlots) -> None:
        ended: list[float] = []
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(SLOTS):
                nursery.start_soon(send, turns, trio.lowlevel.ParkingLot(), 1000.0, [])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(send, turns, trio.lowlevel.ParkingLot(), 0.0, ended)
        assert SLOT_S <= ended[0] - start <= 1.5 * SLOT_S

    play(scenario)


def test_who_leaves_gives_up_turn_and_place() -> None:
    async def scenario(turns: SendSlots) -> None:
        lots = [trio.lowlevel.ParkingLot() for _ in range(SLOTS + 2)]
        assert [turns.take(lot, peer_of(lot)) for lot in lots] == [True] * SLOTS + [False] * 2
        turns.leave(lots[SLOTS])
        turns.leave(lots[0])
        assert turns.take(lots[SLOTS + 1], peer_of(lots[SLOTS + 1]))
        assert not turns.contended
        assert not turns.take(lots[0], peer_of(lots[0]))

    play(scenario)


def test_one_peer_leaves_turns_to_the_others() -> None:
    """S-40"""

    async def scenario(turns: SendSlots) -> None:
        hog, other = PeerId("hog"), PeerId("other")
        lots = [trio.lowlevel.ParkingLot() for _ in range(SLOTS)]
        assert sum(turns.take(lot, hog) for lot in lots) == SLOTS_PER_PEER
        free, waits = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        assert turns.take(free, other)
        turns.give(free)
        assert turns.take(waits, other), "though others of the hog wait for longer"
        turns.give(lots[0])
        assert turns.take(lots[SLOTS_PER_PEER], hog)

    play(scenario)
