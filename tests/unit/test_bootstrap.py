"""Which peers are dialled, and when, if a stranger on the LAN announces many: in virtual time."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity.certificates import open_authority
from node.identity.credentials import Credentials
from node.identity.identity import Identity
from node.identity.verifier import Verifier
from node.membership.addresses import Target
from node.membership.bootstrap import MAX_DIALS, MAX_DISCOVERED, MAX_DISCOVERED_PER_HOST, Bootstrap, Timing
from protocol.ids import PeerId
from protocol.members import Member
from protocol.records import peer_id_of

OWN, SEED, TRUE = (Identity.of(Ed25519PrivateKey.generate()) for _ in range(3))
AUTHORITY = open_authority()
SEED_HOST, TRUE_HOST = "10.0.0.1", "10.0.0.2"


def stranger(number: int) -> PeerId:
    return peer_id_of(number.to_bytes(32, "big"))


class Lan:
    """The seed and the true find answer at their hosts. A dial of any other address hangs."""

    def __init__(self, *configured: str, revoked: frozenset[str] = frozenset()) -> None:
        self.members: list[Member] = []
        self.introduced: dict[PeerId, float] = {}
        self.dials: list[Target] = []
        self.hanging = self.most_hanging = 0
        credentials = Credentials.issued(AUTHORITY, OWN, "a")
        self.bootstrap = Bootstrap(
            configured,
            Verifier(credentials, revoked),
            lambda: tuple(self.members),
            self._dial,
            timing=Timing(),
            rng=random.Random(1),
        )

    async def _dial(self, target: Target) -> bool:
        self.dials.append(target)
        if (target.peer, target.host) in ((SEED.peer_id, SEED_HOST), (TRUE.peer_id, TRUE_HOST)):
            await trio.sleep(0.05)
            self.introduced.setdefault(target.peer, trio.current_time())
            self.members.append(Member(target.peer, "x", "site", ()))
            return True
        self.hanging += 1
        self.most_hanging = max(self.most_hanging, self.hanging)
        try:
            await trio.sleep_forever()
        finally:
            self.hanging -= 1
        raise AssertionError


def play(scenario: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await scenario(nursery)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def seed(host: str = SEED_HOST) -> str:
    return f"/ip4/{host}/tcp/1/p2p/{SEED.peer_id}"


@pytest.mark.parametrize("hosts", [1, 256], ids=["one host", "a host each"])
def test_256_announced_peers_that_hang_delay_neither_the_configured_peer_nor_a_true_find(hosts: int) -> None:
    """S-33"""

    async def scenario(nursery: trio.Nursery) -> None:
        lan = Lan(seed())
        for number in range(256):
            lan.bootstrap.discovered(nursery, (Target(stranger(number), f"10.1.0.{number % hosts}", 1),))
        await trio.sleep(1)
        began = trio.current_time()
        nursery.start_soon(lan.bootstrap.run)
        await trio.sleep(1)
        assert lan.introduced[SEED.peer_id] - began < 0.1
        lan.members.clear()
        await trio.sleep(30)
        began = trio.current_time()
        lan.bootstrap.discovered(nursery, (Target(TRUE.peer_id, TRUE_HOST, 1),))
        await trio.sleep(20)
        assert lan.introduced[TRUE.peer_id] - began < Timing().first_retry + 0.1

    play(scenario)


def test_a_true_find_among_256_that_are_announced_with_it_is_soon_met() -> None:
    """S-33: the worst case: hosts of their own, announced before the true one."""

    async def scenario(nursery: trio.Nursery) -> None:
        lan = Lan()
        for number in range(255):
            lan.bootstrap.discovered(nursery, (Target(stranger(number), f"10.1.0.{number}", 1),))
        lan.bootstrap.discovered(nursery, (Target(TRUE.peer_id, TRUE_HOST, 1),))
        await trio.sleep(20)
        assert lan.introduced[TRUE.peer_id] < 256 / 32 * Timing().find_deadline + 1

    play(scenario)


def test_an_announcement_of_the_configured_peer_at_an_address_that_hangs_does_not_keep_this_node_from_it() -> None:
    """S-33"""

    async def scenario(nursery: trio.Nursery) -> None:
        lan = Lan(seed())
        lan.bootstrap.discovered(nursery, (Target(SEED.peer_id, "10.1.0.1", 1),))
        await trio.sleep(1)
        assert lan.hanging == 1
        began = trio.current_time()
        nursery.start_soon(lan.bootstrap.run)
        await trio.sleep(1)
        assert lan.introduced[SEED.peer_id] - began < 0.1

    play(scenario)


def test_finds_are_bounded_and_those_that_failed_are_replaced() -> None:
    async def scenario(nursery: trio.Nursery) -> None:
        lan = Lan()
        for number in range(2 * MAX_DISCOVERED):
            lan.bootstrap.discovered(nursery, (Target(stranger(number), f"10.{number}.0.1", 1),))
        assert len(lan.bootstrap.finds) == MAX_DISCOVERED
        await trio.sleep(600)
        lan.bootstrap.discovered(nursery, (Target(TRUE.peer_id, TRUE_HOST, 1),))
        await trio.sleep(1)
        assert TRUE.peer_id in lan.introduced
        for number in range(1000, 2000):  # those that did not fail yet stay
            lan.bootstrap.discovered(nursery, (Target(stranger(number), f"10.{number}.0.2", 1),))
            await trio.sleep(3)
        assert TRUE.peer_id in lan.bootstrap.finds
        assert len(lan.bootstrap.finds) == MAX_DISCOVERED

    play(scenario)


def test_a_host_has_few_finds() -> None:
    async def scenario(nursery: trio.Nursery) -> None:
        lan = Lan()
        for number in range(100):
            lan.bootstrap.discovered(nursery, (Target(stranger(number), "10.1.0.1", 1),))
        await trio.sleep(60)
        assert len(lan.bootstrap.finds) == MAX_DISCOVERED_PER_HOST
        assert lan.most_hanging <= MAX_DISCOVERED_PER_HOST

    play(scenario)


def test_configured_peers_that_hang_are_given_up_so_that_all_have_their_turn() -> None:
    """S-33"""

    async def scenario(nursery: trio.Nursery) -> None:
        hanging = [f"/ip4/10.1.0.{n}/tcp/1/p2p/{stranger(n)}" for n in range(2 * MAX_DIALS)]
        lan = Lan(*hanging, seed())
        nursery.start_soon(lan.bootstrap.run)
        await trio.sleep(2 * Timing().deadline + 1)
        assert SEED.peer_id in lan.introduced
        assert lan.most_hanging <= MAX_DIALS

    play(scenario)
