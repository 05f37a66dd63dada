"""Policies to read a block from its keepers: the one that ships, and four plain ones to compare it with.

All of them ask the same questions over the same exchange. tests/benchmarks/tail.py runs them over sockets,
simulations/tail.py in virtual time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

import trio

from node.blocks.values import Stretch
from node.exchange.contract import Lane
from node.stages import Blocks
from protocol.erasure import decode_block
from protocol.errors import ShoalError, UnavailableError
from protocol.fetch_plan import StripePlan
from protocol.ids import Buffer, PeerId, Shard
from protocol.messages import ShardFound
from protocol.placement import Route
from protocol.records import Record


@dataclass(frozen=True, slots=True)
class Reader:
    """Parts of a node that keeps none of the blocks that it reads. `late_after_s`: seconds after which a copy is late,
    and another is requested. `far`: keepers obtain shards that they lack."""

    blocks: Blocks
    lane: Lane
    rng: Random
    late_after_s: Callable[[PeerId], float]
    far: bool = False

    def route(self, stretch: Stretch) -> Route:
        return self.blocks.site.placement().route(self.blocks.site.own, stretch.stripe, stretch.length)

    def shuffled(self, stretch: Stretch) -> list[PeerId]:
        """The keepers in random order. Each holds the whole block."""
        keepers = self.route(stretch).keepers
        return self.rng.sample(keepers, len(keepers))

    async def block(self, peer: PeerId, stretch: Stretch) -> None:
        """Read the whole block from one peer. Raises ShoalError."""
        plan = StripePlan([peer], [peer], 1, stretch.indices, self.late_after_s)
        plan.start(False, trio.current_time())
        await self._from(peer, stretch, Shard(1, 0, 0), hops=0, plan=plan)

    async def shard(self, peer: PeerId, want: int, stretch: Stretch) -> tuple[int, Buffer, Record]:
        """One shard of the code 4+1 from one peer. Raises ShoalError."""
        message, body = await self._from(
            peer, stretch, Shard(4, 1, want), hops=self.route(stretch).hops if self.far else 0
        )
        return message.index, body, message.record

    async def _from(
        self, peer: PeerId, stretch: Stretch, shard: Shard, *, hops: int, plan: StripePlan | None = None
    ) -> tuple[ShardFound, Buffer]:
        parts: list[tuple[ShardFound, Buffer]] = []

        def part(message: ShardFound, body: Buffer) -> None:
            parts.append((message, body))
            if shard.k == 1:
                check(message.record, body)

        questions = self.blocks.questions
        await questions.stream(peer, stretch, shard, part, hops=hops, lane=self.lane, plan=plan)
        return parts[0]


def check(record: Record, data: Buffer) -> None:
    assert record.matches(data), "a wrong block"


Policy = Callable[[Reader, Stretch], Awaitable[None]]


async def one_peer(reader: Reader, stretch: Stretch) -> None:
    """Ask a random keeper, and after a failure the next keeper."""
    for peer in reader.shuffled(stretch):
        with contextlib.suppress(ShoalError):
            return await reader.block(peer, stretch)
    raise UnavailableError("no peer gives the block")


async def hedged(reader: Reader, stretch: Stretch) -> None:
    """Ask a random keeper, and a second one once the first is late, at the p95 of answers (Dean and Barroso, 2013)."""
    first, *others = reader.shuffled(stretch)
    over = trio.Event()

    async def from_first() -> None:
        with contextlib.suppress(ShoalError):
            await reader.block(first, stretch)
            nursery.cancel_scope.cancel()
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(from_first)
        with trio.move_on_after(reader.late_after_s(first)):
            await over.wait()
        for peer in others:
            with contextlib.suppress(ShoalError):
                await reader.block(peer, stretch)
                nursery.cancel_scope.cancel()
    if not nursery.cancel_scope.cancel_called:
        raise UnavailableError("no peer gives the block")


async def _shards(reader: Reader, stretch: Stretch, at_once: int) -> None:
    """Ask for the first `at_once` shards, and for one more after each failure."""
    route = reader.route(stretch)
    shape, keepers = route.shape, route.keepers
    left = list(range(at_once, len(keepers)))
    shards: dict[int, tuple[Buffer, Record]] = {}

    async def take(rank: int) -> None:
        try:
            index, body, record = await reader.shard(keepers[rank], rank, stretch)
        except ShoalError:
            return await take(left.pop(0)) if left else None
        shards[index] = body, record
        if len(shards) >= shape.k:
            nursery.cancel_scope.cancel()
        return None

    async with trio.open_nursery() as nursery:
        for rank in range(at_once):
            nursery.start_soon(take, rank)
    record = next(iter(shards.values()))[1]
    check(record, decode_block({i: body for i, (body, _) in shards.items()}, shape.k, shape.m, stretch.length))


async def k_of_k(reader: Reader, stretch: Stretch) -> None:
    await _shards(reader, stretch, 4)


async def k_of_all(reader: Reader, stretch: Stretch) -> None:
    await _shards(reader, stretch, 5)


async def shipped(reader: Reader, stretch: Stretch) -> None:
    order = reader.blocks.fetcher.begin(stretch, reader.lane is Lane.URGENT, lambda index, obtained: None)
    try:
        await order.wait()
    finally:
        order.release()
