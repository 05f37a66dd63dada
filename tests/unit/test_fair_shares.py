"""Fair shares: if any number of peers want all of a resource, each leaves as much to others as it has itself."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from node.exchange.fair_shares import Shares
from protocol.ids import PeerId

PEERS = [PeerId(name) for name in "abcdefgh"]


@pytest.mark.parametrize("hogs", range(1, 8))
def test_greedy_peers_leave_a_share_to_the_next_peer(hogs: int) -> None:
    """S-41"""
    shares = Shares(2520)
    while sum(shares.take(peer, 1) for peer in PEERS[:hogs]):
        pass
    assert shares.free == pytest.approx(2520 / (hogs + 1), abs=hogs)
    assert shares.take(PEERS[-1], 1)


@given(st.lists(st.tuples(st.sampled_from(PEERS), st.integers(0, 50), st.booleans()), max_size=60))
def test_shares_add_up_and_no_peer_has_more_than_was_free(steps: list[tuple[PeerId, int, bool]]) -> None:
    """S-41"""
    shares, taken = Shares(100), Counter[PeerId]()
    for peer, amount, gives in steps:
        if gives:
            shares.give(peer, given := min(amount, taken[peer]))
            taken[peer] -= given
        elif shares.take(peer, amount):
            taken[peer] += amount
            assert amount == 0 or taken[peer] <= shares.free + amount
        assert shares.free == 100 - taken.total() >= 0


def test_a_waiting_peer_continues_when_a_share_is_returned() -> None:
    """S-41"""

    async def main() -> None:
        shares = Shares(2)
        first, second = PEERS[:2]
        await shares.wait(first, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shares.wait, first, 1)
            nursery.start_soon(shares.wait, second, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert shares.free == 0
            shares.give(second, 1)
            await trio.testing.wait_all_tasks_blocked()
            shares.give(first, 1)
        assert shares.free == 1

    trio.run(main)
