"""Batching of stretches into requests: which are joined, in which order they are read, and how a read ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing

from node.oci.references import Grant, Locator
from node.registry.batching import MAX_RUN, BatchedReads
from node.runtime.fair_places import Asker, Client, Demand, working_for
from protocol.errors import NotFoundError, ShoalError, UnavailableError
from protocol.ids import Digest, ObjectRef

BLOBS = Locator("fake", "org/app", "blobs")
REF = ObjectRef(Digest("sha256", "ab" * 32), 200 << 20)
BLOCK_S = 1.0
STRIPE = 4


class SlowRegistry:
    """Sends a block each second on every connection. The bytes of a block are its number."""

    def __init__(self, connections: int = 5) -> None:
        self.runs: list[tuple[float, int, int]] = []
        self.background: list[bool] = []
        self.failing: ShoalError | None = None
        self.given = 0
        self._connections = connections

    def connections(self, upstream: str) -> int:
        return self._connections

    async def blocks(
        self,
        locator: Locator,
        ref: ObjectRef,
        first: int,
        count: int,
        *,
        certain: bool,
        background: bool,
        coming: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[bytearray, None]:
        self.runs.append((trio.current_time(), first, count))
        self.background.append(background)
        for index in range(first, first + count):
            await trio.sleep(BLOCK_S / 2)
            if self.failing:
                raise self.failing
            coming()
            await trio.sleep(BLOCK_S / 2)
            self.given += 1
            yield bytearray(str(index).encode())


def run(check: Callable[[SlowRegistry, BatchedReads], Awaitable[None]], connections: int = 5) -> SlowRegistry:
    registry = SlowRegistry(connections)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await check(registry, BatchedReads(registry, nursery))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return registry


def ignore(index: int, data: bytearray) -> None:
    """Take a block."""


async def ask(reads: BatchedReads, first: int, count: int) -> None:
    await reads.stretch(BLOBS, REF, first, count, came=ignore)


async def read_in_order(reads: BatchedReads, stripes: int, window: int) -> None:
    """Read as a client does: `window` stripes are requested at once, and another one each time that a stripe came."""
    ready = [trio.Event() for _ in range(stripes)]

    async def read(number: int) -> None:
        came: list[int] = []
        await reads.stretch(BLOBS, REF, STRIPE * number, STRIPE, came=lambda index, _: came.append(index))
        assert came == list(range(STRIPE * number, STRIPE * (number + 1)))
        ready[number].set()

    async with trio.open_nursery() as nursery:
        for number in range(min(window, stripes)):
            nursery.start_soon(read, number)
        for number in range(stripes):
            await ready[number].wait()
            if number + window < stripes:
                nursery.start_soon(read, number + window)


def test_a_read_in_order_keeps_its_connections_busy_with_few_requests() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        start = trio.current_time()
        await read_in_order(reads, 40, 8)
        assert trio.current_time() - start <= 40 * STRIPE * BLOCK_S / 2 + MAX_RUN * BLOCK_S

    assert len(run(check, connections=2).runs) <= 40


def test_adjacent_stretches_are_joined_up_to_a_full_run() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async with trio.open_nursery() as nursery:
            for first, count in ((30, 1), (3, 1), (10, 2), (12, 4), (20, 1)):
                nursery.start_soon(ask, reads, first, count)
            for first in range(100, 100 + 2 * MAX_RUN, STRIPE):
                nursery.start_soon(ask, reads, first, STRIPE)

    runs = run(check, connections=7).runs
    assert {(first, count) for at, first, count in runs if first < 100} == {(3, 1), (10, 6), (20, 1), (30, 1)}
    # The tasks ask in any order, and a run is made around the stretch that was asked for first.
    long = [count for _, first, count in runs if first >= 100]
    assert sum(long) == 2 * MAX_RUN
    assert max(long) == MAX_RUN
    assert len(long) <= 3
    assert len({at for at, _, _ in runs}) == 1


def test_stretches_of_different_grants_are_not_joined() -> None:
    other = replace(BLOBS, grant=Grant("Bearer of-alice"))

    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async with trio.open_nursery() as nursery:
            for index, locator in ((0, BLOBS), (1, other), (2, other)):
                nursery.start_soon(partial(reads.stretch, locator, REF, index, 1, came=ignore))

    assert {(first, count) for _, first, count in run(check).runs} == {(0, 1), (1, 2)}


def test_blocks_come_one_by_one_and_every_stretch_of_a_run_hears_that_bytes_come() -> None:
    heard: list[tuple[float, str]] = []

    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async def read(name: str, first: int) -> None:
            def note(what: str) -> None:
                heard.append((trio.current_time(), f"{name} {what}"))

            await reads.stretch(BLOBS, REF, first, 2, came=lambda i, _: note(str(i)), coming=lambda: note("coming"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "a", 4)
            nursery.start_soon(read, "b", 6)

    run(check)
    assert [what for _, what in heard if "coming" not in what] == ["a 4", "a 5", "b 6", "b 7"]
    assert [at for at, what in heard if "coming" not in what] == [1.0, 2.0, 3.0, 4.0]
    assert [at for at, what in heard if what == "a coming"] == [0.5, 1.5]
    assert [at for at, what in heard if what == "b coming"] == [0.5, 1.5, 2.5, 3.5]


def test_a_failure_ends_all_stretches_of_the_run_and_no_other() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        caught: list[int] = []

        async def read(first: int) -> None:
            try:
                await ask(reads, first, 2)
            except UnavailableError:
                caught.append(first)

        async with trio.open_nursery() as nursery:
            for first in (4, 6):
                nursery.start_soon(read, first)
            await trio.sleep(2.25 * BLOCK_S)
            registry.failing = UnavailableError("broken")
            await trio.sleep(BLOCK_S / 2)
            registry.failing = None
            nursery.start_soon(read, 8)
        assert caught == [6], "the first two blocks had come"

    assert [(first, count) for _, first, count in run(check).runs] == [(4, 4), (8, 2)]


def test_the_waiting_stretch_of_a_cancelled_reader_is_not_read() -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, reads, 0, 1)
            await trio.sleep(BLOCK_S / 2)
            with trio.move_on_after(BLOCK_S / 4):
                await ask(reads, 1, 1)
        await ask(reads, 9, 1)

    assert [(first, count) for _, first, count in run(check, connections=1).runs] == [(0, 1), (9, 1)]


@pytest.mark.parametrize(("cancelled", "given"), [((0,), 4), ((1,), 2), ((0, 1), 1)], ids=["first", "last", "both"])
def test_a_run_ends_with_the_last_stretch_that_somebody_waits_for(cancelled: tuple[int, ...], given: int) -> None:
    async def check(registry: SlowRegistry, reads: BatchedReads) -> None:
        came: list[int] = []

        async def read(number: int) -> None:
            with trio.move_on_after(1.75 * BLOCK_S if number in cancelled else 100.0):
                await reads.stretch(BLOBS, REF, 2 * number, 2, came=lambda index, _: came.append(index))

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(read, number)
        assert came == {(0,): [0, 2, 3], (1,): [0, 1], (0, 1): [0]}[cancelled]
        assert await reads.read(BLOBS, REF, 9) == b"9", "the connection is free"

    registry = run(check, connections=1)
    assert [(first, count) for _, first, count in registry.runs] == [(0, 4), (9, 1)]
    assert registry.given == given + 1


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
