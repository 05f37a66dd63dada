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

from node.blocks.values import SILENCE_S, BlockAddress
from node.exchange.contract import Lane
from node.stages import Blocks
from protocol.erasure import decode_block
from protocol.errors import ShoalError, UnavailableError
from protocol.fetch_plan import ShardPlan
from protocol.ids import Buffer, PeerId, Shard
from protocol.messages import BlockFound, GetBlock, ShardFound
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

    def route(self, address: BlockAddress) -> Route:
        return self.blocks.site.placement().route(self.blocks.site.own, address.block, address.length)

    def shuffled(self, address: BlockAddress) -> list[PeerId]:
        """The keepers in random order. Each holds the whole block."""
        keepers = self.route(address).keepers
        return self.rng.sample(keepers, len(keepers))

    async def block(self, peer: PeerId, address: BlockAddress) -> None:
        """Read the whole block from one peer. Raises ShoalError."""
        plan = ShardPlan([peer], [peer], 1, self.late_after_s)
        plan.start(False, trio.current_time())
        question = GetBlock(str(address.ref.digest), address.index, address.ref.size)
        answer = await self.blocks.questions.ask(peer, question, self.lane, SILENCE_S, plan=plan)
        assert isinstance(answer.message, BlockFound)
        check(answer.message.record, answer.body or b"")

    async def shard(self, peer: PeerId, want: int, address: BlockAddress) -> tuple[int, Buffer, Record]:
        """One shard of the code 4+1 from one peer. Raises ShoalError."""
        hops = self.route(address).hops if self.far else 0
        question = self.blocks.questions.get_shard(address, Shard(4, 1, want), hops=hops)
        answer = await self.blocks.questions.ask(peer, question, self.lane, SILENCE_S)
        assert isinstance(answer.message, ShardFound)
        assert answer.body is not None
        return answer.message.index, answer.body, answer.message.record


def check(record: Record, data: Buffer) -> None:
    assert record.matches(data), "a wrong block"


Policy = Callable[[Reader, BlockAddress], Awaitable[None]]


async def one_peer(reader: Reader, address: BlockAddress) -> None:
    """Ask a random keeper, and after a failure the next keeper."""
    for peer in reader.shuffled(address):
        with contextlib.suppress(ShoalError):
            return await reader.block(peer, address)
    raise UnavailableError("no peer gives the block")


async def hedged(reader: Reader, address: BlockAddress) -> None:
    """Ask a random keeper, and a second one once the first is late, at the p95 of answers (Dean and Barroso, 2013)."""
    first, *others = reader.shuffled(address)
    over = trio.Event()

    async def from_first() -> None:
        with contextlib.suppress(ShoalError):
            await reader.block(first, address)
            nursery.cancel_scope.cancel()
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(from_first)
        with trio.move_on_after(reader.late_after_s(first)):
            await over.wait()
        for peer in others:
            with contextlib.suppress(ShoalError):
                await reader.block(peer, address)
                nursery.cancel_scope.cancel()
    if not nursery.cancel_scope.cancel_called:
        raise UnavailableError("no peer gives the block")


async def _shards(reader: Reader, address: BlockAddress, at_once: int) -> None:
    """Ask for the first `at_once` shards, and for one more after each failure."""
    route = reader.route(address)
    shape, keepers = route.shape, route.keepers
    left = list(range(at_once, len(keepers)))
    shards: dict[int, tuple[Buffer, Record]] = {}

    async def take(rank: int) -> None:
        try:
            index, body, record = await reader.shard(keepers[rank], rank, address)
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
    check(record, decode_block({i: body for i, (body, _) in shards.items()}, shape.k, shape.m, address.length))


async def k_of_k(reader: Reader, address: BlockAddress) -> None:
    await _shards(reader, address, 4)


async def k_of_all(reader: Reader, address: BlockAddress) -> None:
    await _shards(reader, address, 5)


async def shipped(reader: Reader, address: BlockAddress) -> None:
    ticket = reader.blocks.fetcher.begin(address, urgent=reader.lane is Lane.URGENT)
    try:
        await ticket.wait()
    finally:
        ticket.release()
