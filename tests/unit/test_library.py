"""A node reads ahead for its clients within a budget, and releases every block of it. Virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cache.memory import MemoryStore
from cache.store import READ_HERE, Askers, Held
from cache.tiered import Tiers
from node import assembly
from node.blocks.fetcher import Fetcher
from node.blocks.room import FIRST_BLOCKS, HELD, MOST_FIRST_EACH
from node.blocks.values import Obtained, Stretch, Taker
from node.content.library import HEAD_WAIT_S, SiteLibrary
from node.identity.identity import Identity
from node.membership.membership import Membership
from node.oci.references import Locator
from node.runtime.fair_places import Client, Demand, working_for
from node.telemetry.sources import Source
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, Piece
from protocol.members import Member
from protocol.records import Record
from protocol.shard_proofs import ShardProof
from protocol.window import MOST, RAMP
from tests.support.passports import passports_of
from tests.support.site_library import site_library

LOCATOR = Locator("origin.test", "app", "blobs")
BLOCKS = 80
BLOCK = bytes(BLOCK_SIZE)
BLOCK_S = 0.1


def ref(number: int) -> ObjectRef:
    return ObjectRef(Digest("sha256", f"{number:064x}"), BLOCKS * BLOCK_SIZE)


class Blocks(Fetcher):
    """A fetcher whose blocks take BLOCK_S. `held` counts the blocks under way and those that are in memory."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__([self], nursery)
        self.held = self.most = 0
        self.late: dict[int, float] = {}
        self._began: list[float] = []

    async def find(self, stretch: Stretch, taker: Taker) -> None:
        async with trio.open_nursery() as nursery:
            for index in stretch.indices:
                nursery.start_soon(self._bring, index, Data(self), taker)

    async def _bring(self, index: int, data: Data, taker: Taker) -> None:
        await trio.sleep(self.late.get(index, BLOCK_S))
        taker.got(index, Obtained(Held(data, cast(Record, None)), Source.ORIGIN))

    def begins(self) -> None:
        self.held += 1
        self.most = max(self.most, self.held)
        self._began.append(trio.current_time())

    @property
    def began(self) -> int:
        return len(self._began)

    def began_before(self, seconds: float) -> int:
        """Blocks that were begun within this time of the first one."""
        return sum(at < self._began[0] + seconds for at in self._began)


class Data(bytearray):
    """The bytes of a block, which count as held while they exist."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__(BLOCK_SIZE)
        self._blocks = blocks
        blocks.begins()

    def __del__(self) -> None:
        self._blocks.held -= 1


def library(fetcher: object) -> SiteLibrary:
    unused: Any = None
    holds_nothing: Any = SimpleNamespace(tiers=MemoryStore(0, trio.current_time), check_size=lambda ref: None)
    return site_library(holds_nothing, unused, unused, fetcher=cast(Fetcher, fetcher))[0]


async def read(shelf: SiteLibrary, number: int, seconds: float = 0.0) -> int:
    """Read all except the last byte, so that no digest is verified, at `seconds` per block. Returns the block count."""
    count = 0
    async with aclosing(shelf.read(LOCATOR, ref(number), 0, BLOCKS * BLOCK_SIZE - 1)) as chunks:
        async for chunk in chunks:
            count += bool(chunk)
            await trio.sleep(seconds)
            del chunk
    return count


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(("clients", "most"), [(1, HELD), (2, HELD), (8, HELD), (100, HELD + FIRST_BLOCKS)])
def test_clients_share_the_read_ahead(clients: int, most: int) -> None:
    async def scenario() -> None:
        ended = []

        async def client(number: int) -> None:
            ended.append(await read(shelf, number, seconds=1.0))

        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            shelf = library(blocks)
            for number in range(clients):
                nursery.start_soon(client, number)
        assert ended == [BLOCKS] * clients
        assert most - 2 * HELD // MOST * clients < blocks.most <= most
        assert blocks.held == 0

    play(scenario)


def test_the_ranges_of_one_request_are_read_ahead_like_a_whole_object() -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            starts = [index * BLOCK_SIZE + at for index in range(BLOCKS) for at in (10, BLOCK_SIZE - 500)]
            spans = [(start, start + 1000) for start in starts[:-1]]  # each second span ends in the next block
            sizes = []
            async with aclosing(library(blocks).read(LOCATOR, ref(1), *spans[0], *spans[1:])) as chunks:
                async for chunk in chunks:
                    sizes.append(len(chunk))
                    del chunk
            assert sizes == [1000, *[500, 500, 1000] * (BLOCKS - 1)]
            assert blocks.began == BLOCKS, "each block is begun once"
            assert blocks.most > MOST / 2
            assert blocks.held == 0

    play(scenario)


def test_a_late_block_does_not_stop_later_blocks() -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            blocks.late[0] = 60.0
            with trio.fail_after(60.0 + (BLOCKS - HELD) * BLOCK_S):
                assert await read(library(blocks), 1) == BLOCKS
            assert blocks.began_before(60.0) == HELD

    play(scenario)


def test_an_answer_begins_in_time_although_its_first_block_is_late() -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            blocks.late[0] = HEAD_WAIT_S + 10.0
            start = trio.current_time()
            async with aclosing(library(blocks).read(LOCATOR, ref(1), 0, BLOCK_SIZE)) as chunks:
                assert await anext(chunks) == b""
                assert trio.current_time() - start == pytest.approx(HEAD_WAIT_S)
                assert await anext(chunks) == BLOCK
                assert trio.current_time() - start == pytest.approx(HEAD_WAIT_S + 10.0)

    play(scenario)


def test_few_blocks_are_asked_for_before_the_first_ones_arrive() -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            shelf = library(blocks)
            for number in range(3):
                nursery.start_soon(read, shelf, number)
            await trio.sleep(BLOCK_S / 2)
            assert blocks.held == 3 * RAMP
            await trio.sleep(BLOCK_S)
            assert blocks.held > 3 * RAMP

    play(scenario)


def test_stalled_clients_that_hold_the_whole_read_ahead_do_not_stop_others() -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            shelf = library(blocks)
            for number in range(4):
                nursery.start_soon(read, shelf, number, 1e6)
                await trio.sleep(1)
            assert 4 <= blocks.held <= HELD
            with trio.fail_after(2 * BLOCKS * BLOCK_S):
                assert await read(shelf, 5) == BLOCKS
            nursery.cancel_scope.cancel()
        assert blocks.held == 0

    play(scenario)


class Connection:
    """A client's connection, which reads an object, and `comes_back` when it is cut. It counts how often it was."""

    def __init__(self, shelf: SiteLibrary, address: str, *, comes_back: bool = True) -> None:
        self.client = Client(address, self.cut)
        self.cuts, self.blocks = 0, 0
        self._shelf, self._scope, self._comes_back = shelf, trio.CancelScope(), comes_back

    def cut(self) -> bool:
        self.cuts += not self._scope.cancel_called
        self._scope.cancel()
        return True

    async def read(self, number: int, seconds: float) -> None:
        with working_for(Demand(self.client)):
            while self.blocks < BLOCKS and (self._comes_back or not self.cuts):
                with trio.CancelScope() as self._scope:
                    self.blocks = await read(self._shelf, number, seconds)


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.2"], ids=["same address", "other address"])
@pytest.mark.parametrize("seconds", [30.0, 1e6], ids=["slow", "stalled"])
def test_slow_connections_of_a_client_hardly_slow_another(address: str, seconds: float) -> None:
    """S-38: 80 of them hold all first places. They make way, and leave their places beyond the first. Those of another
    address ask again at once."""

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            shelf = library(blocks)
            began = trio.current_time()
            assert await read(shelf, 0) == BLOCKS
            undisturbed_s = trio.current_time() - began
            slow = [Connection(shelf, "10.0.0.1", comes_back=address != "10.0.0.1") for _ in range(80)]
            for number, connection in enumerate(slow):
                nursery.start_soon(connection.read, number + 1, seconds)
            await trio.sleep(10)
            assert blocks.held >= MOST_FIRST_EACH
            began = trio.current_time()
            other = Connection(shelf, address)
            await other.read(99, 0.0)
            assert trio.current_time() - began <= 1.3 * undisturbed_s
            assert not other.cuts
            assert any(connection.cuts for connection in slow)
            nursery.cancel_scope.cancel()
        assert blocks.held == 0

    play(scenario)


def test_a_slow_client_is_only_cut_for_the_places_that_others_need() -> None:
    """S-38"""

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            blocks = Blocks(nursery)
            shelf = library(blocks)
            slow, quick = Connection(shelf, "10.0.0.1"), Connection(shelf, "10.0.0.2")
            nursery.start_soon(slow.read, 1, 5.0)
            await trio.sleep(2 * BLOCKS * BLOCK_S)
            assert blocks.held > FIRST_BLOCKS
            began = blocks.began
            await quick.read(2, 0.0)
            assert blocks.began - began >= BLOCKS
            assert not slow.cuts
            await trio.sleep(6.0 * BLOCKS)
            assert slow.blocks == BLOCKS, "it read again what had left the room"

    play(scenario)


@pytest.mark.parametrize("after_s", [0.0, BLOCK_S / 2, 1.0, 1.0 + BLOCK_S / 2, 7.5, 300.0])
def test_a_cancelled_read_releases_all_its_blocks(after_s: float) -> None:
    """The read is cancelled while it waits for room, a block or its client. Afterwards the whole budget is free."""

    async def scenario() -> None:
        async with trio.open_nursery() as work:
            blocks = Blocks(work)
            shelf = library(blocks)
            with trio.move_on_after(after_s):
                async with trio.open_nursery() as nursery:
                    for number in range(2 * (HELD + FIRST_BLOCKS)):
                        nursery.start_soon(read, shelf, number, 1.0)
            await trio.testing.wait_all_tasks_blocked()
            assert blocks.held == 0
            blocks.most = 0
            assert await read(shelf, 0, 0.5) == BLOCKS
            assert blocks.most == HELD

    play(scenario)


class Registry:
    def __init__(self) -> None:
        self.given = 0

    def connections(self, upstream: str) -> int:
        return 5

    async def blocks(
        self,
        locator: Locator,
        ref: ObjectRef,
        first: int,
        count: int,
        *,
        certain: bool = False,
        background: bool = False,
        coming: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[bytearray, None]:
        for _ in range(count):
            await trio.sleep(BLOCK_S)
            self.given += 1
            yield bytearray(BLOCK)


class SlowDisk(MemoryStore):
    """A disk tier that accepts nothing until `moves` is set."""

    def __init__(self) -> None:
        super().__init__(BLOCK_SIZE, trio.current_time)
        self.moves = trio.Event()

    def put_nowait(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        return False

    async def put(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        await self.moves.wait()
        return False


def test_a_stalled_disk_stops_reads_from_the_registry() -> None:
    async def scenario() -> None:
        registry, disk = Registry(), SlowDisk()
        identity = Identity.of(Ed25519PrivateKey.generate())
        own = Member(identity.peer_id, "one", "site", ())
        view = Membership(own, 1, Random(1), passports_of(own, identity))
        unused: Any = None
        tiers = Tiers(MemoryStore(4 * BLOCK_SIZE, trio.current_time), cast(Any, disk), None)
        async with trio.open_nursery() as nursery:
            blocks = assembly.blocks(identity, view, unused, tiers, upstream=registry, nursery=nursery)
            shelf = library(blocks.fetcher)
            for number in range(8):
                nursery.start_soon(read, shelf, number)
            await trio.sleep(60)
            assert registry.given <= HELD
            disk.moves.set()
        assert registry.given == 8 * BLOCKS

    play(scenario)
