"""Batching of blocks into requests: runs, reads that wait for a run, and reads that do not wait."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from node.oci.references import Locator
from node.registry.batching import MAX_RUN, BatchedReads
from node.runtime.fair_places import Asker, Client, Demand, working_for
from protocol.errors import NotFoundError, ShoalError, UnavailableError
from protocol.ids import Digest, ObjectRef

BLOBS = Locator("fake", "org/app", "blobs")
REF = ObjectRef(Digest("sha256", "ab" * 32), 200 << 20)
BLOCK_S = 1.0


class SlowRegistry:
    """Sends a block each second on every connection. The bytes of a block are its number."""

    def __init__(self, connections: int = 5) -> None:
        self.runs: list[tuple[float, int, int]] = []
        self.background: list[bool] = []
        self.failing: ShoalError | None = None
        self._connections = connections

    def connections(self, upstream: str) -> int:
        return self._connections

    async def blocks(
        self, locator: Locator, ref: ObjectRef, first: int, count: int, *, certain: bool, background: bool
    ) -> AsyncGenerator[bytearray, None]:
        self.runs.append((trio.current_time(), first, count))
        self.background.append(background)
        for index in range(first, first + count):
            await trio.sleep(BLOCK_S)
            if self.failing:
                raise self.failing
            yield bytearray(str(index).encode())


def run(check: Callable[[SlowRegistry, BatchedReads], Awaitable[None]], connections: int = 5) -> SlowRegistry:
    registry = SlowRegistry(connections)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await check(registry, BatchedReads(registry, nursery))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return registry


async def read_in_order(reads: BatchedReads, count: int, window: int) -> None:
    """Read as a client does: `window` blocks are requested at once, and another one each time that a block arrives."""
    ready: dict[int, trio.Event] = {index: trio.Event() for index in range(count)}

    async def read(index: int) -> None:
        assert await reads.read(BLOBS, REF, index) == str(index).encode()
        ready[index].set()

    async with trio.open_nursery() as nursery:
        for index in range(min(window, count)):
            nursery.start_soon(read, index)
        for index in range(count):
            await ready[index].wait()
            if index + window < count:
                nursery.start_soon(read, index + window)


def test_a_read_in_order_costs_a_request_for_each_full_run() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        start = trio.current_time()
        await read_in_order(reads, 12 * MAX_RUN, 2 * MAX_RUN)
        assert trio.current_time() - start <= 6 * MAX_RUN * BLOCK_S + 1, "two connections are always busy"

    assert len(run(check).runs) <= 14


def test_blocks_that_follow_no_run_are_asked_for_at_once() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async with trio.open_nursery() as nursery:
            for index in (3, 10, 11, 20, 30):
                nursery.start_soon(reads.read, BLOBS, REF, index)

    runs = run(check).runs
    assert {(first, count) for _, first, count in runs} == {(3, 1), (10, 2), (20, 1), (30, 1)}
    assert len({at for at, _, _ in runs}) == 1


@pytest.mark.parametrize("failing", [None, UnavailableError("broken")])
def test_blocks_after_a_run_are_read_when_it_ends_or_fails(failing: ShoalError | None) -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        registry.failing = failing
        caught: list[ShoalError] = []

        async def read(index: int) -> None:
            try:
                await reads.read(BLOBS, REF, index)
            except UnavailableError as error:
                caught.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 4)
            await trio.sleep(BLOCK_S / 2)
            for index in (6, 5):
                nursery.start_soon(read, index)
        assert len(caught) == (3 if failing else 0)

    assert [(first, count) for _, first, count in run(check).runs] == [(4, 1), (5, 2)]


def test_the_block_of_a_cancelled_reader_is_not_read() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reads.read, BLOBS, REF, 0)
            await trio.sleep(BLOCK_S / 2)
            with trio.move_on_after(BLOCK_S / 4):
                await reads.read(BLOBS, REF, 1)
        assert await reads.read(BLOBS, REF, 9) == b"9"

    assert [(first, count) for _, first, count in run(check).runs] == [(0, 1), (9, 1)]


def test_an_error_keeps_its_kind_for_all_that_wait_and_connections_are_bounded() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        registry.failing = NotFoundError("gone")

        async def read(index: int) -> None:
            with pytest.raises(NotFoundError, match="gone"):
                await reads.read(BLOBS, REF, index)

        async with trio.open_nursery() as nursery:
            for index in range(0, 60, 3):
                nursery.start_soon(read, index)

    runs = run(check, connections=2).runs
    assert len(runs) == 20
    assert max(sum(at == other for other, _, _ in runs) for at, _, _ in runs) == 2


def test_background_reads_have_one_connection_and_delay_no_foreground_read() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async with trio.open_nursery() as nursery:
            for index in range(4):
                nursery.start_soon(partial(reads.read, BLOBS, REF, index, background=True))
            nursery.start_soon(partial(reads.read, BLOBS, REF, 50, background=True))
            await trio.sleep(BLOCK_S / 2)
            start = trio.current_time()
            assert await reads.read(BLOBS, REF, 3) == b"3"
            assert trio.current_time() - start == BLOCK_S

    registry = run(check)
    lanes = {(first, count): lane for (_, first, count), lane in zip(registry.runs, registry.background, strict=True)}
    assert lanes == {(0, 4): True, (3, 1): False, (50, 1): True}
    assert sum(at == 0 for at, _, _ in registry.runs) == 1, "one background request at a time"


def test_an_address_with_many_waiting_blocks_leaves_the_next_run_to_another() -> None:
    """S-41"""
    ended: list[float] = []

    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async def read(address: str, index: int) -> None:
            with working_for(Demand(Client(address))):
                await reads.read(BLOBS, REF, index)
            if address == "10.0.0.2":
                ended.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            for index in range(0, 200, 2):
                nursery.start_soon(read, "10.0.0.1", index)
            await trio.sleep(BLOCK_S / 2)
            nursery.start_soon(read, "10.0.0.2", 301)

    run(check)
    assert ended == [2 * BLOCK_S]


@pytest.mark.parametrize(
    ("crowd", "other"),
    [
        (Client("10.0.0.1"), Client("10.0.0.2")),
        (Asker("liar"), Asker("honest")),
        (Asker("honest", "liar"), Asker("honest")),
        (Asker("honest", "liar"), Asker("honest", "reader")),
    ],
    ids=["addresses", "members", "own and passed on", "passed on"],
)
def test_clients_take_turns_on_a_single_connection(crowd: Client, other: Client) -> None:
    """S-41: of a large site each node has one."""
    ended: dict[int, float] = {}

    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async def read(client: Client, index: int) -> None:
            with working_for(Demand(client)):
                await reads.read(BLOBS, REF, index)
            ended[index] = trio.current_time()

        async with trio.open_nursery() as nursery:
            for index in range(0, 40, 2):
                nursery.start_soon(read, crowd, index)
            await trio.sleep(BLOCK_S / 2)
            for index in (101, 103, 105):
                nursery.start_soon(read, other, index)

    run(check, connections=1)
    assert sorted(ended[index] for index in (101, 103, 105)) == [2 * BLOCK_S, 4 * BLOCK_S, 6 * BLOCK_S]
