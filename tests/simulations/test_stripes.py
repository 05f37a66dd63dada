"""Reads of a stripe of several blocks: one request a keeper, one read at the registry, and failures in mid-stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from hashlib import sha256
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from node.blocks.values import Obtained, Stretch
from node.exchange.contract import Sender
from node.exchange.memory import MemoryNetwork
from node.telemetry.sources import Source
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, PeerId
from protocol.messages import GetShards, ShardFound
from tests.support import site_in_memory
from tests.support.site_in_memory import LOCATOR, Node, Spoiling, flipped, play

BODY = Random(8).randbytes(12 * BLOCK_SIZE)
REF = ObjectRef(Digest("sha256", sha256(BODY).hexdigest()), len(BODY))
STRIPE = range(4, 8)


class Registry(site_in_memory.Registry):
    """Gives BODY, and notes the runs of blocks that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[range] = []

    async def blocks(
        self, locator: object, ref: object, first: int, count: int, **_: Any
    ) -> AsyncGenerator[bytearray, None]:
        self.runs.append(range(first, first + count))
        for index in range(first, first + count):
            if self.down:
                raise UnavailableError("the registry is down")
            self.asked[index] += 1
            await trio.sleep(self.block_s)
            yield bytearray(BODY[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])


def stretch(indices: Sequence[int] = STRIPE) -> Stretch:
    return Stretch(LOCATOR, REF, tuple(indices))


async def read(node: Node, indices: Sequence[int] = STRIPE, *, urgent: bool = False) -> dict[int, Obtained]:
    blocks: dict[int, Obtained] = {}
    order = node.fetcher.begin(stretch(indices), urgent, blocks.__setitem__)
    try:
        await order.wait()
    finally:
        order.release()
    assert {index: bytes(block.held.data) for index, block in blocks.items()} == {
        index: BODY[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE] for index in indices
    }
    return blocks


def keepers_of(nodes: list[Node]) -> list[Node]:
    _, keepers = nodes[0].site.placement().keepers(stretch().stripe, stretch().length)
    return [next(node for node in nodes if node.own == peer) for peer in keepers]


def watch(nodes: list[Node]) -> Counter[tuple[PeerId, PeerId]]:
    """Count the requests by asker and keeper."""
    asked: Counter[tuple[PeerId, PeerId]] = Counter()

    def watched(node: Node) -> None:
        async def serve(peer: PeerId, request: GetShards, sender: Sender) -> None:
            asked[peer, node.own] += 1
            await node.serve(peer, request, sender)

        node.server = serve

    for node in nodes:
        watched(node)
    return asked


def test_a_stripe_is_one_request_a_keeper_and_one_read_at_the_registry() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        asked = watch(nodes)
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(read, node)
        assert registry.runs == [STRIPE]
        assert set(asked.values()) == {1}

    play(7, scenario, registry=Registry())


@pytest.mark.parametrize("parts", [[(4, 5), (5, 6, 7), (4, 7)], [(7,), (6,), (5,), (4,)]], ids=str)
def test_reads_of_parts_of_a_stripe_share_what_overlaps(parts: list[tuple[int, ...]]) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        async with trio.open_nursery() as nursery:
            for number, node in enumerate(nodes):
                nursery.start_soon(read, node, parts[number % len(parts)])
        assert registry.asked == Counter(STRIPE)

    play(7, scenario, registry=Registry())


class Failing:
    """A `Sender` of a member that dies before its third part."""

    def __init__(self, sender: Sender, network: MemoryNetwork, own: PeerId) -> None:
        self._sender, self._network, self._own, self._left = sender, network, own, 2

    def send(self, message: ShardFound, body: Buffer) -> None:
        self._left -= 1
        if self._left == -1:
            self._network.kill(self._own)
        if self._left >= 0:
            self._sender.send(message, body)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sender, name)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_keeper_that_dies_in_the_middle_of_a_stream_is_replaced_for_the_rest(rank: int) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader = next(node for node in nodes if node not in keepers_of(nodes))
        victim = keepers_of(nodes)[rank]

        async def serve(peer: PeerId, request: GetShards, sender: Sender) -> None:
            await victim.serve(peer, request, Failing(sender, network, victim.own))  # type: ignore[arg-type]

        victim.server = serve
        blocks = await read(reader)
        assert {block.source for block in blocks.values()} == {Source.PEER}
        assert max(registry.asked.values()) <= 2

    play(7, scenario, registry=Registry())


def test_one_wrong_shard_in_a_stream_spoils_only_its_block_and_shows_the_liar() -> None:
    """S-01"""

    def lie(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
        return flipped(message, body) if message.record.index == 5 else (message, body)

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader = next(node for node in nodes if node not in keepers_of(nodes))
        liar = keepers_of(nodes)[1]
        liar.server = lambda peer, request, sender: liar.serve(peer, request, Spoiling(sender, lie))
        await read(reader)
        await trio.testing.wait_all_tasks_blocked()
        assert set(reader.view.quarantined) == {liar.own}
        assert registry.asked == Counter(STRIPE)

    play(7, scenario, registry=Registry())


def test_a_home_does_not_read_what_its_client_no_longer_waits_for() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.block_s = 10.0
        with trio.move_on_after(15.0):
            await read(keepers_of(nodes)[0])
        await trio.sleep(30.0)
        assert registry.asked.total() <= 2

    play(5, scenario, registry=Registry(), limit_s=100.0)
