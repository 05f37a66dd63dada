"""A site of nodes with the shipped membership, over a lossy network in memory and in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from random import Random

import trio
from trio.testing import MockClock

from node.exchange.contract import Answer, Heard, Lane
from node.exchange.memory import MemoryExchange, MemoryNetwork
from node.identity.identity import Identity
from node.identity.revocations import Revocations
from node.membership.gossip import Gossiper
from node.membership.membership import Membership
from protocol.errors import PeerUnavailableError
from protocol.ids import PeerId
from protocol.members import Member, State
from protocol.messages import Request
from protocol.swim_values import SwimConfig
from tests.support.passports import AUTHORITY, identity_of, passports_of

LATENCY_S = 0.002
NOWHERE = Path("nowhere")
QUARANTINE_S = 300.0


@cache
def identity(index: int) -> Identity:
    return identity_of(f"node-{index}")


def member(index: int, generation: int = 0) -> Member:
    return Member(identity(index).peer_id, f"node-{index}", "lab", (f"10.0.{generation}.{index % 250}:4502",))


class CountingNetwork(MemoryNetwork):
    def __init__(self) -> None:
        super().__init__(LATENCY_S)
        self.sent = 0
        """Bytes of all frames."""

    async def travel(self, sender: PeerId, receiver: PeerId, size: int) -> None:
        self.sent += size
        await super().travel(sender, receiver, size)


class Node:
    """A member, with its membership, and an exchange over a lossy network."""

    def __init__(self, site: Site, own: Member, incarnation: int, config: SwimConfig | None) -> None:
        self.site = site
        self.own = own
        rng = Random(site.rng.random())
        passports = passports_of(own, identity_of(own.name))
        self.membership = Membership(own, incarnation, rng, passports, config, quarantine_s=QUARANTINE_S)
        self.exchange = MemoryExchange(
            site.network, own.peer_id, refused=self.membership.is_refused, handler=self.handle
        )
        self.gossiper = Gossiper(self.membership, self, Revocations(site.folder / own.peer_id, AUTHORITY.der))
        self.scope = trio.CancelScope()
        self.asked: list[PeerId] = []

    async def request(
        self, peer: PeerId, message: Request, *, lane: Lane, silence_s: float, heard: Heard = None
    ) -> Answer:
        self.asked.append(peer)
        if self.site.loses(self.own.peer_id, peer):
            await trio.sleep(silence_s)
            raise PeerUnavailableError("the request was lost")
        answer = await self.exchange.request(peer, message, lane=lane, silence_s=silence_s, heard=heard)
        if self.site.loses(peer, self.own.peer_id):
            await trio.sleep(silence_s)
            raise PeerUnavailableError("the answer was lost")
        return answer

    def disconnect(self, peer: PeerId) -> None:
        self.exchange.disconnect(peer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.exchange.run)
                await nursery.start(self.gossiper.run)
                task_status.started()

    async def handle(self, peer: PeerId, request: Request) -> Answer:
        return await self.gossiper.handle(peer, request)

    def sees(self) -> set[PeerId]:
        return {peer.peer_id for peer in self.membership.site}


class Site:
    def __init__(self, nursery: trio.Nursery, seed: int, folder: Path = NOWHERE) -> None:
        self.nursery = nursery
        self.folder = folder
        self.rng = Random(seed)
        self.network = CountingNetwork()
        self.loss = 0.0
        self.islands: dict[PeerId, int] = {}
        self.nodes: list[Node] = []

    def loses(self, sender: PeerId, receiver: PeerId) -> bool:
        return self.islands.get(sender, 0) != self.islands.get(receiver, 0) or self.rng.random() < self.loss

    async def start(self, own: Member, incarnation: int = 1000, config: SwimConfig | None = None) -> Node:
        node = Node(self, own, incarnation, config)
        self.nodes.append(node)
        await self.nursery.start(node.run)
        return node

    async def grow(self, count: int) -> None:
        """Start `count` nodes, introduce all to the first, and wait until the views agree."""
        for index in range(count):
            introduce(await self.start(member(index)), self.nodes[0])
        await self.agree(15)

    def kill(self, node: Node) -> None:
        self.nodes.remove(node)
        node.scope.cancel()

    async def agree(self, within_s: float, among: list[Node] | None = None) -> float:
        """Wait until each node of `among` sees exactly these nodes. Returns the seconds that it took."""
        nodes = among if among is not None else self.nodes
        wanted = {node.own.peer_id for node in nodes}
        return await until(lambda: all(node.sees() == wanted for node in nodes), within_s)


def introduce(node: Node, other: Node) -> None:
    if node is not other:
        node.membership.introduced(other.membership.named())
        other.membership.introduced(node.membership.named())


async def until(holds: Callable[[], bool], within_s: float) -> float:
    started = trio.current_time()
    while not holds():
        assert trio.current_time() - started < within_s, f"not within {within_s} s"
        await trio.sleep(0.02)
    return trio.current_time() - started


def run(scenario: Callable[[Site], Awaitable[None]], seed: int = 1, folder: Path = NOWHERE) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await scenario(Site(nursery, seed, folder))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def states(node: Node) -> dict[PeerId, State]:
    return {row.member.peer_id: row.state for row in node.membership.table()}
