"""The promises of every Exchange (node/exchange/contract.py), in virtual time: in memory, on simulated links, and over
TLS and in plain mode on loopback."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from node.exchange.contract import Answer, AtOnce, Exchange, Handler, Lane, Sender, Server, State
from node.exchange.limits import Limits, Timing
from node.exchange.memory import MemoryExchange, MemoryNetwork
from node.exchange.requests import ROOM_BYTES, Dispatcher, nothing_at_once
from protocol.errors import (
    BadInputError,
    DeniedError,
    NotFoundError,
    PeerMisbehavedError,
    PeerUnavailableError,
    UnavailableError,
)
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, PeerId, shard_length
from protocol.messages import (
    Done,
    Failed,
    FindHolders,
    GetHoldings,
    GetShards,
    Holders,
    HoldingsFound,
    Ping,
    Pong,
    Request,
    ShardFound,
)
from protocol.records import Record, make_record
from simulations.network import Port, SimulatedNetwork, lognormal
from tests.support.exchanges import Cluster

SIZE = 2 * BLOCK_SIZE + 5
REF = ObjectRef(Digest("sha256", "ab" * 32), SIZE)
SIGNER = PeerId("12D3KooWSigner")
PING, PONG = Ping(), Pong()
SLOTS = 4
HOLDINGS, HELD = GetHoldings(str(REF.digest)), HoldingsFound(b"\x07", ((4, 1, 2, b"\x01"),))
Got = tuple[ShardFound, bytes]


def bytes_of(index: int) -> bytes:
    return sha256(bytes([index])).digest() * (BLOCK_SIZE // 32)


def record_of(index: int) -> Record:
    data = bytes_of(index)[: REF.block_length(index)]
    return make_record(REF, index, sha256(data).digest(), SIGNER, sign=lambda payload: bytes(64))


def get(index: int, count: int = 1, k: int = 1, want: int = 0) -> GetShards:
    """Shard `want` of blocks from `index` on. The code 1+0 has the block as its only shard."""
    m = 0 if k == 1 else 1
    return GetShards(str(REF.digest), index, (1 << count) - 1, SIZE, k=k, m=m, want=want, hops=0, source="")


def part_of(request: GetShards, index: int) -> Got:
    """The part for this block."""
    length = REF.block_length(index)
    start = request.want * shard_length(length, request.k)
    body = bytes_of(index)[:length][start : start + shard_length(length, request.k)]
    found = ShardFound(request.k, request.m, request.want, record_of(index))
    return found, body.ljust(shard_length(length, request.k), b"\0")


def wanted(request: GetShards) -> list[int]:
    return [request.first + bit for bit in range(request.wanted.bit_length()) if request.wanted >> bit & 1]


async def answer_all(peer: PeerId, request: Request) -> Answer:
    if isinstance(request, GetHoldings):
        return Answer(HELD)
    return Answer(PONG)


async def serve_all(peer: PeerId, request: GetShards, sender: Sender) -> None:
    for index in wanted(request):
        await sender.room()
        sender.send(*part_of(request, index))


def send_all(request: GetShards, sender: Sender) -> bool:
    for index in wanted(request):
        sender.send(*part_of(request, index))
    return True


@dataclass
class Node:
    peer: PeerId
    exchange: Exchange
    refused: set[PeerId] = field(default_factory=set)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class MemorySite:
    silence_s = 1.0

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self._nursery = nursery
        self._network: MemoryNetwork = MemoryNetwork(latency_s=0.001)
        self._count = 0

    async def add(
        self,
        handler: Handler = answer_all,
        server: Server = serve_all,
        *,
        at_once: AtOnce = nothing_at_once,
        mute: bool = False,
    ) -> Node:
        self._count += 1
        peer = PeerId("12D3KooWMember" + "x" * self._count)
        refused: set[PeerId] = set()
        exchange = MemoryExchange(
            self._network,
            peer,
            refused=refused.__contains__,
            handler=handler,
            server=server,
            at_once=at_once,
            requests_per_connection=SLOTS,
        )
        node = Node(peer, exchange, refused)
        await self._nursery.start(run_within, node)
        if mute:
            self._network.stop(peer)
        return node

    def absent(self) -> PeerId:
        return PeerId("12D3KooWAbsent")


class SimulatedSite(MemorySite):
    """A site on links of 40 Mbit/s."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        super().__init__(nursery, folder)
        self._network = network = SimulatedNetwork(Random(1), lognormal(0.0005, 0.005))
        nursery.start_soon(network.alarms.run)

    async def add(
        self,
        handler: Handler = answer_all,
        server: Server = serve_all,
        *,
        at_once: AtOnce = nothing_at_once,
        mute: bool = False,
    ) -> Node:
        node = await super().add(handler, server, at_once=at_once, mute=mute)
        self._network.plug(node.peer, "site", Port(5e6, 5e6))
        return node


class TlsSite:
    silence_s = 0.4
    plain = False

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self._nursery, self._cluster = nursery, Cluster(nursery, folder)

    async def add(
        self,
        handler: Handler = answer_all,
        server: Server = serve_all,
        *,
        at_once: AtOnce = nothing_at_once,
        mute: bool = False,
    ) -> Node:
        refused: set[PeerId] = set()
        member = self._cluster.exchange(
            handler=handler,
            server=server,
            at_once=at_once,
            refused=refused.__contains__,
            plain=self.plain,
            timing=Timing(waiting_first_s=0.02, waiting_every_s=0.02, retry_s=0.001),
            limits=Limits(requests_per_connection=SLOTS),
        )
        node = Node(member.peer, member.exchange, refused)
        if not mute:  # if mute, the kernel accepts connections, and no task answers
            await self._nursery.start(run_within, node)
        return node

    def absent(self) -> PeerId:
        peer = PeerId("12D3KooWAbsent")
        self._cluster.locate(peer, "127.0.0.1:1")
        return peer


class PlainSite(TlsSite):
    plain = True


async def run_within(node: Node, *, task_status: trio.TaskStatus[None]) -> None:
    with node.scope:
        await node.exchange.run(task_status=task_status)


Site = MemorySite | TlsSite
Scenario = Callable[[Site], Awaitable[None]]
Play = Callable[[Scenario], None]


SITES: dict[str, type[Site]] = {"memory": MemorySite, "simulated": SimulatedSite, "tls": TlsSite, "plain": PlainSite}
IDLE_S = 0.01
"""Over sockets, time jumps to the next deadline after all tasks were blocked for this real time: no byte is moving."""


@pytest.fixture(params=SITES)
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Runs a scenario on a site of the implementation. All tasks of the site end with the scenario."""
    memory = issubclass(SITES[request.param], MemorySite)

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    await scenario(SITES[request.param](nursery, tmp_path))
                    nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0 if memory else IDLE_S))

    return run


async def ask(site: Site, node: Node, to: Node | PeerId, message: Request, *, lane: Lane = Lane.CONTROL) -> Answer:
    peer = to.peer if isinstance(to, Node) else to
    return await node.exchange.request(peer, message, lane=lane, silence_s=10 * site.silence_s)


class Reading:
    """Makes a GetShards, and keeps the parts that came."""

    def __init__(self, site: Site, node: Node, to: Node | PeerId, message: GetShards, **more: Any) -> None:
        self.parts: list[Got] = []
        self._peer = to.peer if isinstance(to, Node) else to
        self._node, self._message = node, message
        self._more: dict[str, Any] = {"lane": Lane.BULK, "silence_s": 10 * site.silence_s, "part": self.take} | more

    def take(self, message: ShardFound, body: Buffer) -> None:
        self.parts.append((message, bytes(body)))

    async def run(self) -> Failed | None:
        return await self._node.exchange.stream(self._peer, self._message, **self._more)


async def read(site: Site, node: Node, to: Node | PeerId, message: GetShards, **more: Any) -> list[Got]:
    reading = Reading(site, node, to, message, **more)
    assert await reading.run() is None
    return reading.parts


async def is_read(site: Site, node: Node, to: Node, message: GetShards, **more: Any) -> bool:
    return await read(site, node, to, message, **more) == [part_of(message, index) for index in wanted(message)]


def test_requests_of_both_directions_and_all_lanes_are_answered(play: Play) -> None:
    async def scenario(site: Site) -> None:
        left, right = await site.add(), await site.add()
        for asker, asked in ((left, right), (right, left)):
            for lane in Lane:
                assert await ask(site, asker, asked, PING, lane=lane) == Answer(PONG)
        assert await ask(site, left, right, HOLDINGS) == Answer(HELD)

    play(scenario)


def test_the_handler_learns_which_peer_asks(play: Play) -> None:
    askers: list[PeerId] = []

    async def note(peer: PeerId, request: Request) -> Answer:
        askers.append(peer)
        return Answer(PONG)

    async def scenario(site: Site) -> None:
        first, second, asked = await site.add(), await site.add(), await site.add(note)
        await ask(site, first, asked, PING)
        await ask(site, second, asked, PING)
        assert askers == [first.peer, second.peer]

    play(scenario)


def test_bodies_arrive_whole_among_small_answers(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add()
        right = []

        async def ask_for(index: int) -> None:
            assert await is_read(site, asker, peer, get(index))
            assert await ask(site, asker, peer, PING, lane=Lane.BULK) == Answer(PONG)
            right.append(index)

        async with trio.open_nursery() as nursery:
            for index in (0, 1, 2, 0, 1, 2):
                nursery.start_soon(ask_for, index)
        assert sorted(right) == [0, 0, 1, 1, 2, 2]

    play(scenario)


# Streams


@pytest.mark.parametrize(("k", "want"), [(1, 0), (2, 1)])
def test_a_stream_has_a_part_for_each_wanted_block(play: Play, k: int, want: int) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add()
        assert await is_read(site, asker, peer, get(0, 3, k=k, want=want))
        assert await is_read(site, asker, peer, msgspec.structs.replace(get(0, 3, k=k, want=want), wanted=0b101))
        assert await is_read(site, asker, peer, get(1, 2, k=k, want=want), lane=Lane.URGENT)

    play(scenario)


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_parts_come_in_any_order_and_as_they_are_sent(play: Play, order: tuple[int, ...]) -> None:
    async def scenario(site: Site) -> None:
        go_on = trio.Semaphore(0)

        async def in_order(peer: PeerId, request: GetShards, sender: Sender) -> None:
            for index in order:
                await go_on.acquire()
                sender.send(*part_of(request, index))

        asker, peer = await site.add(), await site.add(server=in_order)
        came: list[int] = []

        def take(message: ShardFound, body: Buffer) -> None:
            came.append(message.record.index)
            assert (message, bytes(body)) == part_of(get(0, 3), came[-1])
            go_on.release()

        go_on.release()
        assert await Reading(site, asker, peer, get(0, 3), part=take).run() is None
        assert came == [*order]

    play(scenario)


def test_parts_in_memory_need_no_task(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asked: list[str] = []

        def at_once(peer: PeerId, request: GetShards, sender: Sender) -> bool:
            if request.first:
                return False
            asked.append("at once")
            for index in wanted(request):
                if index == 2:
                    raise UnavailableError("only two")
                sender.send(*part_of(request, index))
            return True

        async def in_a_task(peer: PeerId, request: GetShards, sender: Sender) -> None:
            asked.append("in a task")
            await serve_all(peer, request, sender)

        asker, peer = await site.add(), await site.add(server=in_a_task, at_once=at_once)
        assert await is_read(site, asker, peer, get(0, 2))
        assert await is_read(site, asker, peer, get(1, 2))
        assert await is_read(site, asker, peer, get(0, 2))
        assert asked == ["at once", "in a task", "at once"]
        reading = Reading(site, asker, peer, get(0, 3))
        assert await reading.run() == Failed("unavailable", "only two")
        assert len(reading.parts) == 2

    play(scenario)


@pytest.mark.parametrize("needs_task", [True, False])
def test_parts_that_come_from_elsewhere_are_sent_at_once(play: Play, needs_task: bool) -> None:
    """As of a keeper that passes parts on to many readers."""

    async def scenario(site: Site) -> None:
        senders: list[Sender] = []
        joined, end = trio.Semaphore(0), trio.Event()

        def join(sender: Sender) -> None:
            senders.append(sender)
            joined.release()

        async def subscribe(peer: PeerId, request: GetShards, sender: Sender) -> None:
            join(sender)
            await end.wait()

        def subscribe_at_once(peer: PeerId, request: GetShards, sender: Sender) -> bool:
            if needs_task:
                return False
            join(sender)
            return True

        peer = await site.add(server=subscribe, at_once=subscribe_at_once)
        readers = [await site.add() for _ in range(3)]
        readings = [Reading(site, reader, peer, get(0, 2)) for reader in readers]
        async with trio.open_nursery() as nursery:
            for reading in readings:
                nursery.start_soon(reading.run)
            for _ in readers:
                await joined.acquire()
            for index in (1, 0):
                for sender in senders:
                    sender.send(*part_of(get(0, 2), index))
        for reading in readings:
            assert reading.parts == [part_of(get(0, 2), 1), part_of(get(0, 2), 0)]
        end.set()

        async def fail() -> None:
            failed.append(await Reading(site, readers[0], peer, get(0)).run())

        if not needs_task:
            failed: list[Failed | None] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                await joined.acquire()
                senders[3].end(NotFoundError("gone"))
                senders[3].end(UnavailableError("later"))
            assert failed == [Failed("not-found", "gone")]

    play(scenario)


def test_a_failure_ends_a_stream_behind_the_parts_that_were_sent(play: Play) -> None:
    async def scenario(site: Site) -> None:
        async def fail_midway(peer: PeerId, request: GetShards, sender: Sender) -> None:
            sender.send(*part_of(request, 1))
            sender.send(*part_of(request, 0))
            raise UnavailableError("no more")

        async def stop_midway(peer: PeerId, request: GetShards, sender: Sender) -> None:
            sender.send(*part_of(request, 0))

        asker, failing = await site.add(), await site.add(server=fail_midway)
        stopping = await site.add(server=stop_midway)
        for _ in range(2):
            reading = Reading(site, asker, failing, get(0, 3))
            assert await reading.run() == Failed("unavailable", "no more")
            assert reading.parts == [part_of(get(0, 3), index) for index in (1, 0)]
        reading = Reading(site, asker, stopping, get(0, 2))
        assert await reading.run() == Failed("not-held", "not held")
        assert len(reading.parts) == 1
        assert await is_read(site, asker, stopping, get(0))

    play(scenario)


def test_a_sender_is_of_no_use_after_the_end(play: Play) -> None:
    async def scenario(site: Site) -> None:
        senders: list[Sender] = []

        async def leave(peer: PeerId, request: GetShards, sender: Sender) -> None:
            senders.append(sender)
            raise UnavailableError("gone")

        asker, peer = await site.add(), await site.add(server=leave)
        assert await Reading(site, asker, peer, get(0, 2)).run() == Failed("unavailable", "gone")
        senders[0].send(*part_of(get(0, 2), 0))
        senders[0].coming()
        with pytest.raises(PeerUnavailableError):
            await senders[0].room()
        assert await ask(site, asker, peer, PING, lane=Lane.BULK) == Answer(PONG)

    play(scenario)


def wrong_parts(request: GetShards) -> dict[str, list[Got]]:
    found, body = part_of(request, 0)
    return {
        "again": [(found, body)] * 2,
        "not wanted": [part_of(request, 2)],
        "before the first": [part_of(request, 0)],
        "another shard": [(msgspec.structs.replace(found, index=0), body)],
        "another code": [(msgspec.structs.replace(found, m=2), body)],
    }


@pytest.mark.parametrize("fault", wrong_parts(get(0)))
def test_a_part_that_was_not_asked_for_or_came_before_is_misbehaviour(play: Play, fault: str) -> None:
    request = get(1, 2, k=2, want=1) if fault == "before the first" else get(0, 2, k=2, want=1)

    async def confused(peer: PeerId, request: GetShards, sender: Sender) -> None:
        for part in wrong_parts(request)[fault]:
            sender.send(*part)
        await trio.sleep_forever()

    async def scenario(site: Site) -> None:
        asker, peer, good = await site.add(), await site.add(server=confused), await site.add()
        reading = Reading(site, asker, peer, request)
        with pytest.raises(PeerMisbehavedError):
            await reading.run()
        assert len(reading.parts) == (fault == "again")
        assert await ask(site, asker, good, PING) == Answer(PONG)

    play(scenario)


def test_a_part_that_is_refused_ends_its_stream_only(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add()
        refused: list[int] = []

        def refuse(message: ShardFound, body: Buffer) -> None:
            refused.append(message.record.index)
            if len(refused) == 2:
                raise PeerMisbehavedError("wrong bytes")

        def break_down(message: ShardFound, body: Buffer) -> None:
            raise KeyError("a bug")

        async with trio.open_nursery() as nursery:
            other = Reading(site, asker, peer, get(0, 3))
            nursery.start_soon(other.run)
            with pytest.raises(PeerMisbehavedError, match="wrong bytes"):
                await Reading(site, asker, peer, get(0, 3), part=refuse).run()
        assert len(refused) == 2
        assert len(other.parts) == 3
        with pytest.raises(KeyError):
            await Reading(site, asker, peer, get(0), part=break_down).run()
        assert await is_read(site, asker, peer, get(0, 3))
        assert len(refused) == 2

    play(scenario)


def test_a_cancelled_stream_harms_nothing(play: Play) -> None:
    async def scenario(site: Site) -> None:
        release = trio.Event()
        served: list[int] = []

        async def halting(peer: PeerId, request: GetShards, sender: Sender) -> None:
            sender.send(*part_of(request, 0))
            if not served:
                served.append(1)
                await release.wait()
            await serve_all(peer, msgspec.structs.replace(request, first=1, wanted=0b11), sender)

        asker, peer = await site.add(), await site.add(server=halting)
        scope = trio.CancelScope()
        parts: list[int] = []

        def take(message: ShardFound, body: Buffer) -> None:
            parts.append(message.record.index)
            scope.cancel()

        with scope:
            await Reading(site, asker, peer, get(0, 3), part=take, heard=lambda state: parts.append(-1)).run()
        assert scope.cancelled_caught
        release.set()
        assert await is_read(site, asker, peer, get(0, 3))
        assert parts == [-1, 0]

    play(scenario)


def test_a_slow_stream_delays_nothing_else_on_its_connection(play: Play) -> None:
    async def scenario(site: Site) -> None:
        release = trio.Event()

        async def slow_first(peer: PeerId, request: GetShards, sender: Sender) -> None:
            if request.first == 0:
                sender.send(*part_of(request, 0))
                await release.wait()
            await serve_all(peer, msgspec.structs.replace(request, first=1, wanted=0b11), sender)

        asker, peer = await site.add(), await site.add(server=slow_first)
        slow = Reading(site, asker, peer, get(0, 3))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.run)
            for _ in range(3):
                assert await is_read(site, asker, peer, get(1, 2))
                assert await ask(site, asker, peer, PING, lane=Lane.BULK) == Answer(PONG)
            assert len(slow.parts) == 1
            release.set()
        assert len(slow.parts) == 3

    play(scenario)


def test_a_server_that_asks_for_room_queues_little(play: Play) -> None:
    """The asker's peer takes no byte: a stopped node in memory, and a full socket over TLS."""

    async def scenario(site: Site) -> None:
        queued, most = 0, 0

        async def count(peer: PeerId, request: GetShards, sender: Sender) -> None:
            nonlocal queued, most
            for index in wanted(request):
                await sender.room()
                queued += 1
                sender.send(*part_of(request, index))
                most = max(most, queued)

        asker, peer = await site.add(), await site.add(server=count)

        def take(message: ShardFound, body: Buffer) -> None:
            nonlocal queued
            queued -= 1

        async with trio.open_nursery() as nursery:
            for _ in range(SLOTS):
                nursery.start_soon(Reading(site, asker, peer, get(0, 2), part=take).run)
        assert not queued
        if isinstance(site, MemorySite):
            assert most <= 1 + ROOM_BYTES // BLOCK_SIZE

    play(scenario)


def test_a_slow_answer_delays_no_other(play: Play) -> None:
    async def scenario(site: Site) -> None:
        release = trio.Event()
        order: list[str] = []

        async def slow_holdings(peer: PeerId, request: Request) -> Answer:
            if isinstance(request, GetHoldings):
                await release.wait()
            return await answer_all(peer, request)

        asker, peer = await site.add(), await site.add(slow_holdings)

        async def slow() -> None:
            await ask(site, asker, peer, HOLDINGS)
            order.append("slow")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow)
            await trio.testing.wait_all_tasks_blocked()
            await ask(site, asker, peer, PING)
            order.append("fast")
            release.set()
        assert order == ["fast", "slow"]

    play(scenario)


def test_the_asker_learns_when_a_body_begins(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add()
        heard: list[State] = []
        assert await is_read(site, asker, peer, get(0, 2), heard=heard.append)
        assert heard == [State.READY] * 2

    play(scenario)


def test_waiting_keeps_a_request_alive(play: Play) -> None:
    async def scenario(site: Site) -> None:
        heard: list[float] = []
        enough = trio.Event()

        def hear(state: State) -> None:
            assert state is State.WAITING
            heard.append(trio.current_time())
            if heard[-1] - start > 3 * site.silence_s:
                enough.set()

        async def late(peer: PeerId, request: Request) -> Answer:
            await enough.wait()
            return Answer(PONG)

        asker, peer = await site.add(), await site.add(late)
        start = trio.current_time()
        answer = await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=site.silence_s, heard=hear)
        assert answer == Answer(PONG)
        assert len(heard) >= 3

    play(scenario)


def test_waiting_says_whether_bytes_come_on(play: Play) -> None:
    async def scenario(site: Site) -> None:
        heard: list[State] = []
        senders: list[Sender] = []
        more = trio.Event()

        async def late(peer: PeerId, request: GetShards, sender: Sender) -> None:
            if request.first == 0:
                senders.append(sender)
            await more.wait()
            await serve_all(peer, request, sender)

        def hear(state: State) -> None:
            heard.append(state)
            if len(heard) in (1, 3):
                senders[0].coming()
            if len(heard) == 5:
                more.set()

        asker, peer = await site.add(), await site.add(server=late)
        async with trio.open_nursery() as nursery:
            other = Reading(site, asker, peer, get(1))
            nursery.start_soon(other.run)
            assert await is_read(site, asker, peer, get(0), heard=hear, silence_s=site.silence_s)
        waiting, coming = State.WAITING, State.COMING
        assert heard == [waiting, coming, waiting, coming, waiting, State.READY]
        assert len(other.parts) == 1

    play(scenario)


def test_a_fast_answer_is_not_preceded_by_waiting(play: Play) -> None:
    async def scenario(site: Site) -> None:
        heard: list[int] = []
        asker, peer = await site.add(), await site.add()
        await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=5, heard=lambda ready: heard.append(1))
        assert not heard

    play(scenario)


def test_silence_ends_a_request(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add(mute=True)
        start = trio.current_time()
        with pytest.raises(PeerUnavailableError):
            await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=site.silence_s)
        assert site.silence_s <= trio.current_time() - start < 5 * site.silence_s

    play(scenario)


def test_a_missing_peer_is_unavailable_at_once(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker = await site.add()
        for _ in range(3):
            with pytest.raises(PeerUnavailableError), trio.fail_after(site.silence_s):
                await ask(site, asker, site.absent(), PING)

    play(scenario)


def test_a_cancelled_request_costs_the_connection_nothing(play: Play) -> None:
    async def scenario(site: Site) -> None:
        release = trio.Event()
        served: list[int] = []

        async def late(peer: PeerId, request: Request) -> Answer:
            served.append(1)
            if isinstance(request, GetHoldings):
                await release.wait()
            return await answer_all(peer, request)

        asker, peer = await site.add(), await site.add(late)
        heard_late: list[int] = []
        with trio.move_on_after(site.silence_s / 4) as scope:
            await asker.exchange.request(
                peer.peer, HOLDINGS, lane=Lane.BULK, silence_s=9, heard=lambda state: served and heard_late.append(1)
            )
        assert scope.cancelled_caught
        heard_before = len(heard_late)
        assert await ask(site, asker, peer, PING, lane=Lane.BULK) == Answer(PONG)
        release.set()
        assert (await ask(site, asker, peer, HOLDINGS, lane=Lane.BULK)).message == HELD
        assert len(heard_late) == heard_before
        assert len(served) == 3

    play(scenario)


def test_a_killed_peer_fails_its_requests_at_once(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asked = trio.Event()

        async def never(peer: PeerId, request: Request) -> Answer:
            asked.set()
            await trio.sleep_forever()
            raise AssertionError

        asker, peer = await site.add(), await site.add(never)
        failed: list[float] = []

        async def fail() -> None:
            with pytest.raises(PeerUnavailableError):
                await ask(site, asker, peer, HOLDINGS)
            failed.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await asked.wait()
            start = trio.current_time()
            peer.scope.cancel()
        assert failed[0] - start < site.silence_s
        with pytest.raises(PeerUnavailableError):
            await ask(site, asker, peer, PING)

    play(scenario)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("gone"), "not-found"),
        (DeniedError("no"), "denied"),
        (UnavailableError("out"), "unavailable"),
        (PeerUnavailableError("away"), "unavailable"),
        (BadInputError("what"), "bad-request"),
        (PeerMisbehavedError("bad"), "bad-request"),
    ],
)
def test_errors_of_the_handler_become_failures(play: Play, error: Exception, code: str) -> None:
    async def fail(peer: PeerId, request: Request) -> Answer:
        raise error

    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add(fail)
        assert await ask(site, asker, peer, PING) == Answer(Failed(code, str(error)))

    play(scenario)


def test_a_bug_in_a_handler_is_logged_and_ends_nothing(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(peer: PeerId, request: Request) -> Answer:
        if isinstance(request, GetHoldings):
            return Answer(ShardFound(1, 0, 0, record_of(0)))
        if isinstance(request, FindHolders):
            raise KeyError("secret")
        return Answer(PONG)

    async def broken_server(peer: PeerId, request: GetShards, sender: Sender) -> None:
        if request.first == 0:
            raise KeyError("secret")
        sender.send(ShardFound(1, 0, 0, record_of(0)), b"not its length")

    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add(broken, broken_server)
        internal = Failed("unavailable", "internal error")
        for request in (HOLDINGS, FindHolders(str(REF.digest))):
            assert await ask(site, asker, peer, request) == Answer(internal)
        for index in (0, 1):
            assert await Reading(site, asker, peer, get(index)).run() == internal
        assert await ask(site, asker, peer, PING) == Answer(PONG)

    with caplog.at_level(logging.ERROR):
        play(scenario)
    assert "KeyError" in caplog.text


def test_an_answer_to_another_question_is_misbehaviour(play: Play) -> None:
    async def confused(peer: PeerId, request: Request) -> Answer:
        return Answer(Holders(()) if isinstance(request, GetHoldings) else Done())

    async def scenario(site: Site) -> None:
        asker, peer, good = await site.add(), await site.add(confused), await site.add()
        for request in (HOLDINGS, PING):
            with pytest.raises(PeerMisbehavedError):
                await ask(site, asker, peer, request)
        assert await ask(site, asker, good, PING) == Answer(PONG)

    play(scenario)


def test_a_malformed_request_harms_only_its_own_connection(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add()
        with pytest.raises(PeerUnavailableError):
            await ask(site, asker, peer, GetHoldings("sha256:short"))
        for wanted_bits in (0, 0b110, 0b1111):
            with pytest.raises(PeerUnavailableError):
                await read(site, asker, peer, msgspec.structs.replace(get(0), wanted=wanted_bits))
        assert await ask(site, asker, peer, PING) == Answer(PONG)

    play(scenario)


def test_disconnect_and_refusal(play: Play) -> None:
    async def scenario(site: Site) -> None:
        started = trio.Event()

        async def never(peer: PeerId, request: Request) -> Answer:
            if isinstance(request, GetHoldings):
                started.set()
                await trio.sleep_forever()
            return Answer(PONG)

        left, right, other = await site.add(never), await site.add(never), await site.add(never)

        async def cut_off(asker: Node, asked: Node) -> None:
            with pytest.raises(PeerUnavailableError):
                await ask(site, asker, asked, HOLDINGS)

        for asker, asked in ((left, right), (right, left)):
            started = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut_off, asker, asked)
                await started.wait()
                right.refused.add(left.peer)
                right.exchange.disconnect(left.peer)
        with pytest.raises(PeerUnavailableError):
            await ask(site, left, right, PING)
        assert await ask(site, other, right, PING) == Answer(PONG)
        right.refused.clear()
        await trio.sleep(0.002)  # as long as a failure is remembered here
        assert await ask(site, left, right, PING) == Answer(PONG)

    play(scenario)


def test_concurrent_requests_of_one_peer_are_bounded_and_all_answered(play: Play) -> None:
    async def scenario(site: Site) -> None:
        at_work, most, answered = 0, 0, 0
        full, release = trio.Event(), trio.Event()

        async def count(peer: PeerId, request: GetShards, sender: Sender) -> None:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            if at_work == SLOTS:
                full.set()
            await release.wait()
            at_work -= 1
            await serve_all(peer, request, sender)

        asker, other, peer = await site.add(), await site.add(), await site.add(server=count)

        async def ask_for(index: int) -> None:
            nonlocal answered
            assert await is_read(site, asker, peer, get(index))
            answered += 1

        async with trio.open_nursery() as nursery:
            for index in range(3 * SLOTS):
                nursery.start_soon(ask_for, index % 3)
            await full.wait()
            assert await ask(site, other, peer, PING, lane=Lane.BULK) == Answer(PONG)
            assert await ask(site, asker, peer, PING, lane=Lane.URGENT) == Answer(PONG)
            release.set()
        assert most == SLOTS
        assert answered == 3 * SLOTS

    play(scenario)


def test_parts_are_written_into_the_askers_memory(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add()
        memory = bytearray(b"x" * (SIZE + 2))
        request = get(0, 3)
        events: list[tuple[str, ShardFound]] = []

        def into(message: ShardFound) -> memoryview:
            events.append(("into", message))
            start = 1 + message.record.index * BLOCK_SIZE
            return memoryview(memory)[start : start + message.record.length]

        def take(message: ShardFound, body: Buffer) -> None:
            events.append(("part", message))
            assert isinstance(body, memoryview)
            assert body.obj is memory

        assert await Reading(site, asker, peer, request, part=take, into=into).run() is None
        assert memory == b"x" + b"".join(part_of(request, index)[1] for index in range(3)) + b"x"
        assert events == [(name, part_of(request, index)[0]) for index in range(3) for name in ("into", "part")]
        assert await is_read(site, asker, peer, request, into=lambda message: None)
        with pytest.raises(ValueError, match="memory of 5 bytes"):
            await read(site, asker, peer, request, into=lambda message: memoryview(bytearray(5)))
        assert await is_read(site, asker, peer, request)

    play(scenario)


def test_a_cancelled_stream_does_not_write_into_its_memory(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(), await site.add()
        memory = bytearray(BLOCK_SIZE)
        for moment in ("before the reply", "in the body"):
            scope = trio.CancelScope()

            def into(message: ShardFound, scope: trio.CancelScope = scope) -> memoryview:
                scope.cancel()
                return memoryview(memory)

            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(Reading(site, asker, peer, get(0), into=into).run)
                    if moment == "before the reply":
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
            assert scope.cancelled_caught
            memory[:] = b"mine" * (BLOCK_SIZE // 4)
            assert await is_read(site, asker, peer, get(1))
            assert memory == b"mine" * (BLOCK_SIZE // 4)

    play(scenario)


def test_a_dispatcher_hands_each_request_to_its_part(play: Play) -> None:
    async def ping(peer: PeerId, request: Ping) -> Answer:
        return Answer(PONG)

    async def scenario(site: Site) -> None:
        dispatcher = Dispatcher()
        peer = await site.add(dispatcher, dispatcher.stream, at_once=dispatcher.at_once)
        asker = await site.add()
        assert await Reading(site, asker, peer, get(0)).run() == Failed("not-held", "not held")
        dispatcher.route(ping, Ping)
        dispatcher.serve(serve_all, lambda peer, request, sender: request.first == 0 and send_all(request, sender))
        assert await ask(site, asker, peer, PING) == Answer(PONG)
        answer = await ask(site, asker, peer, HOLDINGS)
        assert isinstance(answer.message, Failed)
        assert await is_read(site, asker, peer, get(0))
        assert await is_read(site, asker, peer, get(1, 2))

    play(scenario)
