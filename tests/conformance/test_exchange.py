"""The promises of every Exchange (node/exchange/contract.py), in virtual time: in memory, on simulated links, and over
TLS and in plain mode on loopback."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from node.exchange.contract import Answer, Exchange, Handler, Into, Lane
from node.exchange.limits import Limits, Timing
from node.exchange.memory import MemoryExchange, MemoryNetwork
from protocol.errors import (
    BadInputError,
    DeniedError,
    NotFoundError,
    PeerMisbehavedError,
    PeerUnavailableError,
    UnavailableError,
)
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from protocol.messages import (
    BlockFound,
    Done,
    Failed,
    GetBlock,
    GetHoldings,
    GetShard,
    Holders,
    HoldingsFound,
    Ping,
    Pong,
    Reply,
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


def bytes_of(index: int) -> bytes:
    return sha256(bytes([index])).digest() * (BLOCK_SIZE // 32)


def record_of(index: int) -> Record:
    data = bytes_of(index)[: REF.block_length(index)]
    return make_record(REF, index, sha256(data).digest(), SIGNER, sign=lambda payload: bytes(64))


def get_block(index: int) -> GetBlock:
    return GetBlock(str(REF.digest), index, SIZE)


def block_found(index: int) -> Answer:
    return Answer(BlockFound(record_of(index)), bytes_of(index)[: REF.block_length(index)])


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

    async def add(self, handler: Handler, mute: bool = False) -> Node:
        self._count += 1
        peer = PeerId("12D3KooWMember" + "x" * self._count)
        refused: set[PeerId] = set()
        exchange = MemoryExchange(
            self._network, peer, refused=refused.__contains__, handler=handler, requests_per_connection=SLOTS
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

    async def add(self, handler: Handler, mute: bool = False) -> Node:
        node = await super().add(handler, mute)
        self._network.plug(node.peer, "site", Port(5e6, 5e6))
        return node


class TlsSite:
    silence_s = 0.4
    plain = False

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self._nursery, self._cluster = nursery, Cluster(nursery, folder)

    async def add(self, handler: Handler, mute: bool = False) -> Node:
        refused: set[PeerId] = set()
        member = self._cluster.exchange(
            handler=handler,
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


async def answer_all(peer: PeerId, request: Request) -> Answer:
    if isinstance(request, GetBlock):
        return block_found(request.index)
    if isinstance(request, GetHoldings):
        return Answer(HoldingsFound(b"\x07", ((4, 1, 2, b"\x01"),)))
    return Answer(PONG)


async def ask(site: Site, node: Node, to: Node | PeerId, message: Request, *, lane: Lane = Lane.CONTROL) -> Answer:
    peer = to.peer if isinstance(to, Node) else to
    return await node.exchange.request(peer, message, lane=lane, silence_s=10 * site.silence_s)


def test_requests_of_both_directions_and_all_lanes_are_answered(play: Play) -> None:
    async def scenario(site: Site) -> None:
        left, right = await site.add(answer_all), await site.add(answer_all)
        for asker, asked in ((left, right), (right, left)):
            for lane in Lane:
                assert await ask(site, asker, asked, PING, lane=lane) == Answer(PONG)
        holdings = await ask(site, left, right, GetHoldings(str(REF.digest)))
        assert holdings.message == HoldingsFound(b"\x07", ((4, 1, 2, b"\x01"),))

    play(scenario)


def test_the_handler_learns_which_peer_asks(play: Play) -> None:
    askers: list[PeerId] = []

    async def note(peer: PeerId, request: Request) -> Answer:
        askers.append(peer)
        return Answer(PONG)

    async def scenario(site: Site) -> None:
        first, second, asked = await site.add(answer_all), await site.add(answer_all), await site.add(note)
        await ask(site, first, asked, PING)
        await ask(site, second, asked, PING)
        assert askers == [first.peer, second.peer]

    play(scenario)


def test_bodies_arrive_whole_among_small_answers(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(answer_all), await site.add(answer_all)
        right = []

        async def get(index: int) -> None:
            answer = await ask(site, asker, peer, get_block(index), lane=Lane.BULK)
            assert answer == block_found(index)
            assert (await ask(site, asker, peer, PING, lane=Lane.BULK)).body is None
            right.append(index)

        async with trio.open_nursery() as nursery:
            for index in (0, 1, 2, 0, 1, 2):
                nursery.start_soon(get, index)
        assert sorted(right) == [0, 0, 1, 1, 2, 2]

    play(scenario)


def test_shards_arrive(play: Play) -> None:
    async def shard(peer: PeerId, request: Request) -> Answer:
        assert isinstance(request, GetShard)
        return Answer(ShardFound(request.k, request.m, 3, record_of(0)), b"s" * (BLOCK_SIZE // 4))

    async def scenario(site: Site) -> None:
        asker, peer = await site.add(answer_all), await site.add(shard)
        request = GetShard(str(REF.digest), 0, SIZE, k=4, m=1, want=2, hops=2, source="r.example/a#blobs")
        answer = await ask(site, asker, peer, request, lane=Lane.URGENT)
        assert answer == Answer(ShardFound(4, 1, 3, record_of(0)), b"s" * (BLOCK_SIZE // 4))

    play(scenario)


def test_a_slow_answer_delays_no_other(play: Play) -> None:
    async def scenario(site: Site) -> None:
        release = trio.Event()
        order: list[str] = []

        async def slow_blocks(peer: PeerId, request: Request) -> Answer:
            if isinstance(request, GetBlock):
                await release.wait()
            return await answer_all(peer, request)

        asker, peer = await site.add(answer_all), await site.add(slow_blocks)

        async def slow() -> None:
            await ask(site, asker, peer, get_block(0))
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
        asker, peer = await site.add(answer_all), await site.add(answer_all)
        heard: list[bool] = []
        await asker.exchange.request(peer.peer, get_block(0), lane=Lane.BULK, silence_s=5, heard=heard.append)
        assert heard == [True]
        await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=5, heard=heard.append)
        assert heard == [True]

    play(scenario)


def test_waiting_keeps_a_request_alive(play: Play) -> None:
    async def scenario(site: Site) -> None:
        heard: list[float] = []
        enough = trio.Event()

        def hear(ready: bool) -> None:
            heard.append(trio.current_time())
            if heard[-1] - start > 3 * site.silence_s:
                enough.set()

        async def late(peer: PeerId, request: Request) -> Answer:
            await enough.wait()
            return Answer(PONG)

        asker, peer = await site.add(answer_all), await site.add(late)
        start = trio.current_time()
        answer = await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=site.silence_s, heard=hear)
        assert answer == Answer(PONG)
        assert len(heard) >= 3

    play(scenario)


def test_a_fast_answer_is_not_preceded_by_waiting(play: Play) -> None:
    async def scenario(site: Site) -> None:
        heard: list[int] = []
        asker, peer = await site.add(answer_all), await site.add(answer_all)
        await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=5, heard=lambda ready: heard.append(1))
        assert not heard

    play(scenario)


def test_silence_ends_a_request(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(answer_all), await site.add(answer_all, mute=True)
        start = trio.current_time()
        with pytest.raises(PeerUnavailableError):
            await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=site.silence_s)
        assert site.silence_s <= trio.current_time() - start < 5 * site.silence_s

    play(scenario)


def test_a_missing_peer_is_unavailable_at_once(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker = await site.add(answer_all)
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
            if isinstance(request, GetBlock):
                await release.wait()
            return await answer_all(peer, request)

        asker, peer = await site.add(answer_all), await site.add(late)
        heard_late: list[int] = []
        with trio.move_on_after(site.silence_s / 4) as scope:
            await asker.exchange.request(
                peer.peer,
                get_block(1),
                lane=Lane.BULK,
                silence_s=9,
                heard=lambda ready: served and heard_late.append(1),
            )
        assert scope.cancelled_caught
        heard_before = len(heard_late)
        assert await ask(site, asker, peer, PING, lane=Lane.BULK) == Answer(PONG)
        release.set()
        assert await ask(site, asker, peer, get_block(2), lane=Lane.BULK) == block_found(2)
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

        asker, peer = await site.add(answer_all), await site.add(never)
        failed: list[float] = []

        async def fail() -> None:
            with pytest.raises(PeerUnavailableError):
                await ask(site, asker, peer, get_block(0))
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
        asker, peer = await site.add(answer_all), await site.add(fail)
        assert await ask(site, asker, peer, PING) == Answer(Failed(code, str(error)))

    play(scenario)


def test_a_bug_in_a_handler_is_logged_and_ends_nothing(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(peer: PeerId, request: Request) -> Answer:
        if isinstance(request, GetBlock):
            raise KeyError("secret")
        if isinstance(request, GetHoldings):
            return Answer(BlockFound(record_of(0)), b"not its length")
        if isinstance(request, GetShard):
            return Answer(ShardFound(0, 0, 0, record_of(0)), b"a code of no shards")
        return Answer(PONG)

    async def scenario(site: Site) -> None:
        asker, peer = await site.add(answer_all), await site.add(broken)
        shard = GetShard(str(REF.digest), 0, SIZE, k=4, m=1, want=0, hops=0, source="")
        for request in (get_block(0), GetHoldings(str(REF.digest)), shard):
            assert await ask(site, asker, peer, request) == Answer(Failed("unavailable", "internal error"))
        assert await ask(site, asker, peer, PING) == Answer(PONG)

    with caplog.at_level(logging.ERROR):
        play(scenario)
    assert "KeyError" in caplog.text


def test_an_answer_to_another_question_is_misbehaviour(play: Play) -> None:
    async def confused(peer: PeerId, request: Request) -> Answer:
        if isinstance(request, GetBlock):
            return block_found(1 - request.index)
        if isinstance(request, GetShard):
            other = (request.want + 1) % 5
            return Answer(ShardFound(request.k, request.m, other, record_of(0)), bytes(BLOCK_SIZE // 4))
        return Answer(Holders(()) if isinstance(request, GetHoldings) else Done())

    async def scenario(site: Site) -> None:
        asker, peer, good = await site.add(answer_all), await site.add(confused), await site.add(answer_all)
        exact = GetShard(str(REF.digest), 0, SIZE, k=4, m=1, want=0, hops=0, source="", exact=True)
        for request in (get_block(0), exact, GetHoldings(str(REF.digest)), PING):
            with pytest.raises(PeerMisbehavedError):
                await ask(site, asker, peer, request)
        assert await ask(site, asker, good, PING) == Answer(PONG)

    play(scenario)


def test_a_malformed_request_harms_only_its_own_connection(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(answer_all), await site.add(answer_all)
        with pytest.raises(PeerUnavailableError):
            await ask(site, asker, peer, GetBlock("sha256:short", 0, 1))
        assert await ask(site, asker, peer, PING) == Answer(PONG)

    play(scenario)


def test_disconnect_and_refusal(play: Play) -> None:
    async def scenario(site: Site) -> None:
        started = trio.Event()

        async def never(peer: PeerId, request: Request) -> Answer:
            if isinstance(request, GetBlock):
                started.set()
                await trio.sleep_forever()
            return Answer(PONG)

        left, right, other = await site.add(never), await site.add(never), await site.add(never)

        async def cut_off(asker: Node, asked: Node) -> None:
            with pytest.raises(PeerUnavailableError):
                await ask(site, asker, asked, get_block(0))

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

        async def count(peer: PeerId, request: Request) -> Answer:
            nonlocal at_work, most
            if isinstance(request, Ping):
                return Answer(PONG)
            at_work += 1
            most = max(most, at_work)
            if at_work == SLOTS:
                full.set()
            await release.wait()
            at_work -= 1
            return await answer_all(peer, request)

        asker, other, peer = await site.add(answer_all), await site.add(answer_all), await site.add(count)

        async def get(index: int) -> None:
            nonlocal answered
            assert await ask(site, asker, peer, get_block(index), lane=Lane.BULK) == block_found(index)
            answered += 1

        async with trio.open_nursery() as nursery:
            for index in range(3 * SLOTS):
                nursery.start_soon(get, index % 3)
            await full.wait()
            assert await ask(site, other, peer, PING, lane=Lane.BULK) == Answer(PONG)
            assert await ask(site, asker, peer, PING, lane=Lane.URGENT) == Answer(PONG)
            release.set()
        assert most == SLOTS
        assert answered == 3 * SLOTS

    play(scenario)


def test_a_body_is_written_into_the_askers_memory(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(answer_all), await site.add(answer_all)
        replies: list[Reply] = []
        memory = bytearray(b"x" * (REF.block_length(2) + 2))

        def into(reply: Reply) -> memoryview:
            replies.append(reply)
            return memoryview(memory)[1:-1]

        async def get(index: int, into: Into) -> Answer:
            return await asker.exchange.request(
                peer.peer, get_block(index), lane=Lane.BULK, silence_s=10 * site.silence_s, into=into
            )

        assert await get(2, into) == block_found(2)
        assert memory == b"x" + bytes_of(2)[: REF.block_length(2)] + b"x"
        assert replies == [BlockFound(record_of(2))]
        assert await get(1, lambda reply: None) == block_found(1)
        with pytest.raises(ValueError, match="memory of 5 bytes"):
            await get(1, lambda reply: memoryview(bytearray(5)))
        answer = await asker.exchange.request(peer.peer, PING, lane=Lane.BULK, silence_s=10 * site.silence_s, into=into)
        assert answer == Answer(PONG)
        assert len(replies) == 1
        assert await get(0, None) == block_found(0)

    play(scenario)


def test_a_cancelled_request_does_not_write_into_its_memory(play: Play) -> None:
    async def scenario(site: Site) -> None:
        asker, peer = await site.add(answer_all), await site.add(answer_all)
        memory = bytearray(BLOCK_SIZE)
        for moment in ("before the reply", "in the body"):
            scope = trio.CancelScope()

            def into(reply: Reply, scope: trio.CancelScope = scope) -> memoryview:
                scope.cancel()
                return memoryview(memory)

            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        partial(asker.exchange.request, peer.peer, get_block(0), lane=Lane.BULK, silence_s=9, into=into)
                    )
                    if moment == "before the reply":
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
            assert scope.cancelled_caught
            memory[:] = b"mine" * (BLOCK_SIZE // 4)
            assert await ask(site, asker, peer, get_block(1), lane=Lane.BULK) == block_found(1)
            assert memory == b"mine" * (BLOCK_SIZE // 4)

    play(scenario)
