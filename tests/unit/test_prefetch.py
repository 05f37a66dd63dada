"""Prefetch in virtual time: its pace, its waits, temporary failures, cancelling, and its file."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from cache.store import Held
from node.api.documents import PrefetchOrder
from node.blocks.fetcher import Fetcher
from node.blocks.values import Group, Obtained, Stretch, Taker
from node.images.prefetch import AGAIN_S, DEPTH, Prefetcher
from node.oci.manifests import Resolved
from node.oci.references import Locator
from node.runtime.shared_work import Order
from node.telemetry.sources import Source
from protocol.errors import BadInputError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import BLOCK_SIZE, ObjectRef, Piece
from protocol.records import Record
from tests.support.blobs import Blob

LAYER = b"layer" * (2 * BLOCK_SIZE)
"""Ten blocks: the stripes in the middle have two."""
IMAGE = "origin.test/app:v1"
BLOCK_S = 0.1


def described(data: bytes) -> dict[str, object]:
    return {"mediaType": "a/b", "digest": str(Blob(data).digest), "size": len(data)}


MANIFEST = msgspec.json.encode({"config": described(b"{}"), "layers": [described(LAYER)]})
TOTAL = len(MANIFEST) + 2 + len(LAYER)


class Shelf:
    """Library, verifier, store and source of blocks in one object. `resolve` raises the `failures` one by one."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.fetcher = Fetcher([self], nursery)
        self.content = {Blob(data).ref: data for data in (MANIFEST, b"{}", LAYER)}
        self.held: set[Piece] = set()
        self.failures: list[ShoalError] = []
        self.checked: list[ObjectRef] = []
        self.under_way = self.most = 0
        self.wrong: set[ObjectRef] = set()
        self.quiet = trio.Event()
        self.quiet.set()

    async def idle(self) -> None:
        await self.quiet.wait()

    def holds(self, piece: Piece) -> bool:
        return piece in self.held

    def holds_all(self, ref: ObjectRef) -> bool:
        return all(self.holds(Piece(ref.block(index))) for index in range(ref.block_count))

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        await trio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        return Resolved(Blob(MANIFEST).ref, "a/b")

    async def read(self, locator: Locator, ref: ObjectRef, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        await trio.lowlevel.checkpoint()
        self.wrong.discard(ref)
        yield self.content[ref]

    async def check(self, locator: Locator, ref: ObjectRef, computed: str) -> None:
        assert computed == ref.digest.hex
        self.checked.append(ref)

    def begin(self, stretch: Stretch, urgent: bool, came: Callable[[int, Obtained], None]) -> Order[Group, Obtained]:
        return self.fetcher.begin(stretch, urgent, came)

    async def find(self, stretch: Stretch, taker: Taker) -> None:
        assert stretch.background
        assert not taker.urgent
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for index in reversed(stretch.indices):
                await trio.sleep(BLOCK_S)
                data = self.content[stretch.ref][index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
                self.held.add(stretch.piece(index))
                held = Held(bytes(len(data)) if stretch.ref in self.wrong else data, cast(Record, None))
                taker.got(index, Obtained(held, Source.ORIGIN))
        finally:
            self.under_way -= 1


Scenario = Callable[[Shelf, Prefetcher], Awaitable[None]]


def play(path: Path, scenario: Scenario) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            shelf: Any = Shelf(nursery)
            prefetcher = Prefetcher(
                path, library=shelf, verifier=shelf, fetcher=shelf, holds=shelf.holds, holds_all=shelf.holds_all
            )
            await nursery.start(prefetcher.run)
            await scenario(shelf, prefetcher)
            nursery.cancel_scope.cancel()
        assert shelf.under_way == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prefetch.json"


async def until(prefetcher: Prefetcher, state: str) -> float:
    """Wait until the first image is in this state. Returns the seconds that it took."""
    began = trio.current_time()
    while prefetcher.report().rows[0].state != state:  # noqa: ASYNC110 - virtual time
        await trio.sleep(0.01)
    return trio.current_time() - began


def test_an_image_is_fetched_and_checked_few_stripes_at_a_time(path: Path) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        prefetcher.order(PrefetchOrder(images=(IMAGE, IMAGE)))
        await until(prefetcher, "done")
        (row,) = prefetcher.report().rows
        assert (row.bytes_done, row.bytes_total) == (TOTAL, TOTAL)
        assert set(shelf.checked) == set(shelf.content)
        assert shelf.most == DEPTH
        prefetcher.order(PrefetchOrder(images=(IMAGE,), rate=1))
        await trio.sleep(1)
        assert [row.state for row in prefetcher.report().rows] == ["done", "done"], "objects that are held cost no time"

    play(path, scenario)


def test_a_rate_is_kept(path: Path) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        prefetcher.order(PrefetchOrder(images=(IMAGE,), rate=BLOCK_SIZE // 10))
        seconds = await until(prefetcher, "done")
        assert seconds == pytest.approx(10 * TOTAL / BLOCK_SIZE, abs=10.5), "within a block's time"
        assert seconds > 10

    play(path, scenario)


def test_clients_go_first(path: Path) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        shelf.quiet = trio.Event()
        prefetcher.order(PrefetchOrder(images=(IMAGE,)))
        await trio.sleep(9)
        assert not shelf.held
        assert prefetcher.report().waits_for == "clients that read now"
        shelf.quiet.set()
        assert await until(prefetcher, "done") < 2

    play(path, scenario)


def test_temporary_failures_are_retried_and_permanent_ones_are_final(path: Path) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        shelf.failures = [UnavailableError("the uplink is down"), UnavailableError("still"), NotFoundError("no tag")]
        prefetcher.order(PrefetchOrder(images=(IMAGE,)))
        await trio.sleep(1)
        (row,) = prefetcher.report().rows
        assert (row.state, row.error) == ("waiting", "the uplink is down")
        assert await until(prefetcher, "failed") == pytest.approx(3 * AGAIN_S - 1, abs=1)
        assert prefetcher.report().rows[0].error == "no tag"
        prefetcher.order(PrefetchOrder(images=(IMAGE,)))
        await trio.sleep(5)
        assert prefetcher.report().rows[1].state == "done"

    play(path, scenario)


def test_an_image_that_waits_for_a_retry_does_not_delay_the_next(path: Path) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        shelf.failures = [UnavailableError("down")]
        prefetcher.order(PrefetchOrder(images=(IMAGE, "origin.test/app:v2")))
        await trio.sleep(5)
        assert {row.image[-2:]: row.state for row in prefetcher.report().rows} == {"v1": "waiting", "v2": "done"}

    play(path, scenario)


def test_wrong_bytes_are_read_again_in_the_way_that_identifies_the_liar(path: Path) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        shelf.wrong = {Blob(LAYER).ref}
        prefetcher.order(PrefetchOrder(images=(IMAGE,)))
        await until(prefetcher, "done")
        assert not shelf.wrong

    play(path, scenario)


def test_cancelling_ends_the_running_image_and_all_waiting_ones(path: Path) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        prefetcher.order(PrefetchOrder(images=(IMAGE, "origin.test/app:v2"), rate=1000))
        await trio.sleep(1)
        prefetcher.cancel()
        await trio.sleep(1)
        assert [row.state for row in prefetcher.report().rows] == ["cancelled", "cancelled"]
        assert shelf.under_way == 0
        prefetcher.order(PrefetchOrder(images=("origin.test/app:v3",)))
        await trio.sleep(5)
        assert prefetcher.report().rows[-1].state == "done"

    play(path, scenario)


def test_orders_outlive_the_process_until_they_are_done(path: Path) -> None:
    order = PrefetchOrder(images=(IMAGE, "origin.test/app:v2"), rate=1000, window="00:00-23:59")

    async def first(shelf: Shelf, prefetcher: Prefetcher) -> None:
        prefetcher.order(order)
        await trio.sleep(1)

    async def second(shelf: Shelf, prefetcher: Prefetcher) -> None:
        await trio.lowlevel.checkpoint()
        rows = prefetcher.report().rows
        assert [(row.image, row.rate, row.window) for row in rows] == [(i, 1000, order.window) for i in order.images]
        prefetcher.cancel()

    async def third(shelf: Shelf, prefetcher: Prefetcher) -> None:
        await trio.lowlevel.checkpoint()
        assert prefetcher.report().rows == ()

    for scenario in (first, second, third):
        play(path, scenario)


@pytest.mark.parametrize(
    "order",
    [
        PrefetchOrder(images=()),
        PrefetchOrder(images=("Not A Name",)),
        PrefetchOrder(images=(IMAGE,), rate=-1),
        PrefetchOrder(images=(IMAGE,), window="night"),
        PrefetchOrder(images=(IMAGE,), platforms=("arm64",)),
        PrefetchOrder(images=tuple(f"a:{i}" for i in range(5000))),
    ],
)
def test_a_wrong_order_is_refused_as_a_whole(path: Path, order: PrefetchOrder) -> None:
    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        await trio.lowlevel.checkpoint()
        with pytest.raises(BadInputError):
            prefetcher.order(order)
        assert prefetcher.report().rows == ()

    play(path, scenario)


@pytest.mark.parametrize("data", [b"", b"{", b'{"version": 1, "orders": [{"images": ["Not A Name"]}]}'])
def test_a_damaged_file_is_forgotten(path: Path, data: bytes) -> None:
    path.write_bytes(data)

    async def scenario(shelf: Shelf, prefetcher: Prefetcher) -> None:
        await trio.lowlevel.checkpoint()
        assert prefetcher.report().rows == ()

    play(path, scenario)
