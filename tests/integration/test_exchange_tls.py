"""The bulk channel against peers that break its rules, over real sockets on loopback."""

from __future__ import annotations

import logging
import math
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import trio.testing

from node.exchange import connection as exchange_connection
from node.exchange.connection import BATCH_BYTES
from node.exchange.contract import Answer, Lane, Sender, State
from node.exchange.limits import HANDSHAKES_PER_ADDRESS, Limits, Timing
from node.identity.certificates import Credentials, own_authority
from node.runtime import sockets
from protocol import wire
from protocol.errors import BadInputError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import BLOCK_SIZE, PeerId
from protocol.messages import Done, FindHolders, GetShards, Holders, Request, Waiting
from tests.support.exchanges import (
    BLOCK,
    DIGEST,
    GET,
    HELLO,
    NAME,
    NAMED,
    PART,
    PING,
    PONG,
    QUIET_S,
    Cluster,
    Raw,
    frame,
    play,
)

PING_HEADER = msgpack.packb([1, [7, []]])


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">II", 10, 0) + bytes(10),
        HELLO + b"\xff" * 8,
        HELLO + struct.pack(">II", 5, 0) + b"\xc1" * 5,
        HELLO + struct.pack(">II", len(PING_HEADER), 7) + PING_HEADER,
        HELLO + HELLO,
        HELLO + 2 * (struct.pack(">II", 4 + 75, 0) + msgpack.packb([1, [3, DIGEST]])[:79].ljust(79)),
    ],
    ids=["http", "zeros", "lengths", "header", "body with a request", "hello twice", "cut"],
)
def test_garbage_ends_its_connection_and_no_other(tmp_path: Path, data: bytes) -> None:
    """S-20"""

    async def scenario(cluster: Cluster) -> None:
        asker, peer = await cluster.start(), await cluster.start()
        assert await asker.ask(peer.peer, PING) == Answer(PONG)
        raw = await cluster.dial_raw(peer, hello=data)
        assert await raw.ended()
        assert await asker.ask(peer.peer, PING) == Answer(PONG)
        assert peer.exchange.statistics().connections_in == 1

    play(tmp_path, scenario)


def test_a_member_counts_where_it_was_reached_and_not_where_it_says_it_is(tmp_path: Path) -> None:
    """S-46"""

    async def scenario(cluster: Cluster) -> None:
        asker, peer, other = await cluster.start(), await cluster.start(), await cluster.start()
        assert asker.exchange.reached(peer.peer) is None
        cluster.locate(peer.peer, "127.0.0.1:1", str(other.exchange.address), str(peer.exchange.address))
        assert await asker.ask(peer.peer, PING) == Answer(PONG)
        assert asker.exchange.reached(peer.peer) == peer.exchange.address
        peer.scope.cancel()
        asker.exchange.disconnect(peer.peer)
        assert asker.exchange.reached(peer.peer) == peer.exchange.address, "closing a connection hides no address"

    play(tmp_path, scenario)


def test_a_request_number_in_use_cannot_be_used_again(tmp_path: Path) -> None:
    """S-22"""

    async def never(peer: PeerId, request: Request) -> Answer:
        await trio.sleep_forever()
        raise AssertionError

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(handler=never, limits=Limits(requests=3))
        for _ in range(2):  # the first connection released its slots
            raw = await cluster.dial_raw(node)
            for request_id in (1, 2, 2):
                await raw.say(request_id, PING)
            assert await raw.ended()
            assert node.exchange.statistics().requests_in == 0

    play(tmp_path, scenario)


def test_only_members_are_admitted(tmp_path: Path) -> None:
    """S-23"""

    async def scenario(cluster: Cluster) -> None:
        node, client = await cluster.start(), await cluster.start()
        (tmp_path / "other").mkdir()
        stranger = Credentials.issued(own_authority(tmp_path / "other"), client.credentials.identity, "")
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
        trusting = stranger.client_context()
        trusting.verify_mode = ssl.CERT_NONE
        for context in (bare, trusting):
            raw = await cluster.dial_raw(node, context, hello=b"")
            with pytest.raises((trio.BrokenResourceError, EOFError)):  # noqa: PT012 # either may be the first to see it
                await raw.send(HELLO)
                await raw.read_frame()
        await cluster.start(credentials=stranger)
        with pytest.raises(PeerUnavailableError, match="certificate of another cluster"):
            await node.ask(stranger.identity.peer_id, PING)
        assert client.exchange.statistics().connections_in == 0

    play(tmp_path, scenario)


EARLIER = HELLO.replace(b"bulk\x04", b"bulk\x03")
"""The hello of a node that was not upgraded yet."""


def test_an_earlier_version_is_refused_by_both_sides_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S-34"""
    text = "it speaks version 3 of the bulk channel, this node speaks 4: upgrade it"

    def warnings(peer: PeerId) -> list[str]:
        records = [record for record in caplog.records if record.levelno == logging.WARNING]
        return [record.getMessage() for record in records if peer in record.getMessage()]

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(timing=Timing(retry_s=0.0))
        credentials = cluster.credentials()
        for _ in range(3):
            raw = await cluster.dial_raw(node, credentials.client_context(), EARLIER)
            answer = await raw.read_frame()
            assert answer == [b"shoal-bulk", 4, "bulk"], "the other side can log the reason"
            assert await raw.ended()
        (warning,) = warnings(credentials.identity.peer_id)
        assert text in warning
        assert node.exchange.statistics().connections_in == 0

        async def serve(raw: Raw) -> None:
            await raw.ended()

        old = await cluster.serve_raw(serve, hello=EARLIER)
        for _ in range(3):
            with pytest.raises(PeerUnavailableError, match=text):
                await node.ask(old, PING)
        (warning,) = warnings(old)
        assert text in warning

    play(tmp_path, scenario)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_silent_client_is_dropped_in_time(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        node, client = await cluster.start(limits=Limits(handshakes=1)), await cluster.start()
        address = node.exchange.address
        idle = await trio.open_tcp_stream(address.host, address.port)
        async with cluster.time_passing():
            assert await idle.receive_some(10) == b""
        assert await client.ask(node.peer, PING) == Answer(PONG)

    play(tmp_path, scenario)


def test_one_address_without_a_certificate_does_not_keep_others_out(tmp_path: Path) -> None:
    """S-43"""

    async def scenario(cluster: Cluster) -> None:
        node, other = await cluster.start(), await cluster.start()
        address = node.exchange.address

        async def connect() -> trio.SocketStream:
            return await trio.open_tcp_stream(address.host, address.port, local_address="127.0.0.9")

        idle = [await connect() for _ in range(Limits().handshakes)]
        for stream in idle[HANDSHAKES_PER_ADDRESS:]:
            assert await stream.receive_some(1) == b""
        assert await other.ask(node.peer, PING) == Answer(PONG)

    play(tmp_path, scenario)


def test_an_incomplete_message_ends_its_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S-42: the message comes byte by byte, so that the connection is never silent."""
    monkeypatch.setattr(exchange_connection, "WHOLE_S", 0.3)

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start()
        raw = await cluster.dial_raw(node)
        await raw.read_frame()
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                await raw.send(struct.pack(">II", wire.MAX_HEADER, 0))
                with suppress(trio.BrokenResourceError):
                    while True:
                        await raw.send(b"x")
                        await trio.testing.wait_all_tasks_blocked(QUIET_S)

            nursery.start_soon(drip)
            await cluster.until(lambda: not node.exchange.statistics().connections_in)
            nursery.cancel_scope.cancel()

    play(tmp_path, scenario)


def test_a_peer_that_dies_within_a_body_is_unavailable(tmp_path: Path) -> None:
    async def half(raw: Raw) -> None:
        await raw.give_block(BLOCK[: BLOCK_SIZE // 2])

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(), await cluster.serve_raw(half)
        with pytest.raises(PeerUnavailableError):
            await node.read(peer, GET)

    play(tmp_path, scenario)


def test_a_stopped_body_counts_as_silence_and_a_dripping_body_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S-19"""
    monkeypatch.setattr(sockets, "GATHERED_BYTES", 1)  # each part is read as it arrives
    silence_s = 0.5

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start()

        async def wait_received(body_bytes: int) -> None:
            while node.exchange.statistics().bytes_received < body_bytes:
                await trio.lowlevel.checkpoint()

        async def drip(raw: Raw) -> None:
            request_id, _ = await raw.read_frame()
            await raw.say(request_id, PART, BLOCK_SIZE)
            for start, end in pairwise([*range(0, 10_000, 1000), *range(10_000, BLOCK_SIZE, BLOCK_SIZE // 8)]):
                await raw.send(BLOCK[start:end])
                await wait_received(end)
                cluster.jump(0.9 * silence_s)
            await raw.send(BLOCK[end:])
            await raw.give_block(BLOCK[:-1])
            await wait_received(2 * BLOCK_SIZE)
            cluster.jump(1.1 * silence_s)
            await trio.sleep_forever()

        peer = await cluster.serve_raw(drip)
        assert await node.read(peer, GET, silence_s=silence_s) == BLOCK
        with pytest.raises(PeerUnavailableError, match="silent"):
            await node.read(peer, GET, silence_s=silence_s)

    play(tmp_path, scenario)


class Portioned:
    """Sends in portions of these sizes, in rotation, and the end byte by byte. The other side reads after each."""

    def __init__(self, stream: Any, sizes: tuple[int, ...]) -> None:
        self.stream = stream
        self.sizes = cycle(sizes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        position = 0
        while position < len(data):
            end = position + (next(self.sizes) if len(data) - position > 50 else 1)
            await self.stream.send_all(data[position:end])
            await trio.testing.wait_all_tasks_blocked()
            position = end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("sizes", [(997,), (16384,), (16383, 2), (70_000, 5)], ids=str)
def test_a_body_that_arrives_in_any_portions_is_read_without_a_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], plain: bool
) -> None:
    """The reader waits only for bytes that will certainly arrive, even if OpenSSL holds a part. Otherwise it hangs."""
    monkeypatch.setattr(sockets, "GATHER_S", math.inf)

    async def in_portions(raw: Raw) -> None:
        if plain:
            raw = await raw.to_plain()
            raw.stream = Portioned(raw.stream, sizes)
        else:
            raw.stream.transport_stream = Portioned(raw.stream.transport_stream, sizes)
        for _ in range(2):  # the second head arrives after the low-water mark was above one
            request_id, _ = await raw.read_frame()
            await raw.say(request_id, PART, BLOCK_SIZE)
            for start in range(0, BLOCK_SIZE, 50_000):
                await raw.send(BLOCK[start : start + 50_000])
        await raw.ended()

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(plain=plain), await cluster.serve_raw(in_portions, plain=plain)
        for _ in range(2):
            assert await node.read(peer, GET) == BLOCK

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("offset", "message", "length"),
    [(1, PONG, 0), (0, Holders(()), 0), (0, PART, BLOCK_SIZE - 1), (0, Done(), 1), (0, PING, 0), (0, Waiting(()), 0)],
    ids=["unasked", "other kind", "other length", "body without cause", "a request", "Waiting with a number"],
)
def test_a_reply_out_of_place_is_misbehaviour(tmp_path: Path, offset: int, message: Any, length: int) -> None:
    asked: list[int] = []

    async def wrong_once(raw: Raw) -> None:
        request_id, _ = await raw.read_frame()
        asked.append(request_id)
        if len(asked) == 1:
            await raw.say(request_id + offset, message, length)
        else:
            await raw.say(request_id, PART, BLOCK_SIZE)
            await raw.send(BLOCK)
        await raw.ended()

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(), await cluster.serve_raw(wrong_once)
        with pytest.raises(PeerMisbehavedError):
            await node.read(peer, GET)
        assert await node.read(peer, GET) == BLOCK

    play(tmp_path, scenario)


def test_a_waiting_lists_only_unanswered_requests(tmp_path: Path) -> None:
    heard: list[State] = []

    async def list_another(raw: Raw) -> None:
        request_id, _ = await raw.read_frame()
        await raw.say(0, Waiting(((request_id, 1), (request_id, 2))))
        await raw.say(0, Waiting(((request_id + 1, 0),)))
        await raw.ended()

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(), await cluster.serve_raw(list_another)
        with pytest.raises(PeerMisbehavedError):
            await node.read(peer, GET, heard=heard.append)
        assert heard == [State.COMING, State.READY]

    play(tmp_path, scenario)


def test_a_request_has_a_number_other_than_0(tmp_path: Path) -> None:
    """S-22"""

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start()
        raw = await cluster.dial_raw(node)
        await raw.say(0, PING)
        assert await raw.ended()

    play(tmp_path, scenario)


def test_one_waiting_is_for_all_requests_of_the_connection(tmp_path: Path) -> None:
    release = trio.Event()

    async def late(peer: PeerId, request: GetShards, sender: Sender) -> None:
        await release.wait()
        sender.send(PART, BLOCK)

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(server=late)
        raw = await cluster.dial_raw(node)
        await raw.read_frame()
        for request_id in range(1, 11):
            await raw.say(request_id, GET)
        await cluster.until(lambda: node.exchange.statistics().requests_in == 10)
        async with cluster.time_passing():
            for _ in range(3):
                number, (tag, listed) = await raw.read_frame()
                assert (number, tag) == (0, 40)
                assert sorted(listed) == [[request_id, 0] for request_id in range(1, 11)]
        release.set()
        numbers = set()
        while len(numbers) < 10:
            number, (tag, *_) = await raw.read_frame()
            if tag == 32:
                numbers.add(number)
            assert tag in (32, 40)

    play(tmp_path, scenario)


def test_a_silent_connection_is_replaced(tmp_path: Path) -> None:
    connections: list[Raw] = []

    async def mute_first(raw: Raw) -> None:
        connections.append(raw)
        while len(connections) > 1:
            request_id, _ = await raw.read_frame()
            await raw.say(request_id, PONG)
        await raw.ended()

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(), await cluster.serve_raw(mute_first)
        async with cluster.time_passing():
            with pytest.raises(PeerUnavailableError):
                await node.ask(peer, PING, silence_s=2 * Timing().quiet_s)
        assert await node.ask(peer, PING) == Answer(PONG)

    play(tmp_path, scenario)


def test_a_peer_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(limits=Limits(requests=64))
        raw = await cluster.dial_raw(node)

        async def ask_on() -> None:
            for request_id in range(1, 1 << 20):
                await raw.say(request_id, GET)

        async with cluster.time_passing():
            with pytest.raises(trio.BrokenResourceError):
                await ask_on()
        await trio.testing.wait_all_tasks_blocked()
        assert node.exchange.statistics().requests_in == 0
        other = await cluster.start()
        assert await other.read(node.peer, GET) == BLOCK

    play(tmp_path, scenario)


def test_no_waiting_follows_an_answer_that_waits_for_the_connection(tmp_path: Path) -> None:
    blocks = 32
    """More bytes than the buffers of a connection hold if its peer does not read."""

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start()
        raw = await cluster.dial_raw(node)
        await raw.read_frame()
        for request_id in range(1, blocks):
            await raw.say(request_id, GET)
        await raw.say(blocks, PING)
        await cluster.until(lambda: node.exchange.statistics().small_frames_waiting > 3)  # the pong, and Waiting
        answered: list[int] = []
        listed: set[int] = set()
        while len(answered) < blocks:
            number, (tag, *fields) = await raw.read_frame()
            numbers = [number for number, _ in fields[0]] if tag == 40 else [number]
            assert not {*numbers} & {*answered}
            if tag == 40:
                listed |= {*numbers}
            else:
                answered.append(number)
        assert len(listed) > 3

    play(tmp_path, scenario)


def test_unread_answers_leave_other_peers_their_share(tmp_path: Path) -> None:
    """S-41: answers that wait for peers that do not read are bounded, and each peer leaves others as much as it has."""

    async def scenario(cluster: Cluster) -> None:
        async def push(peer: PeerId, request: GetShards, sender: Sender) -> None:
            sender.send(PART, BLOCK)

        limits = Limits(answer_bytes=12 * BLOCK_SIZE)
        node, other = await cluster.start(limits=limits, server=push), await cluster.start()
        hogs = []
        for left in (6, 3, 1):  # of 12: later peers get less
            hogs.append(await cluster.dial_raw(node))
            for request_id in range(1, 61):
                await hogs[-1].say(request_id, GET)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert node.exchange.statistics().answer_bytes_free >= left * BLOCK_SIZE
            assert await other.read(node.peer, GET) == BLOCK
        for raw in hogs:
            raw.stream.transport_stream.socket.close()
        while node.exchange.statistics().connections_in > 1:
            await trio.lowlevel.checkpoint()
        assert node.exchange.statistics().answer_bytes_free == limits.answer_bytes

    play(tmp_path, scenario)


def test_an_address_that_another_member_took_over_is_skipped(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        asker, peer, other = await cluster.start(), await cluster.start(), await cluster.start()
        addresses = ["127.0.0.1:1", "not an address", "a\0b:1", str(other.exchange.address), str(peer.exchange.address)]
        cluster.locate(peer.peer, *addresses)
        assert await asker.ask(peer.peer, PING) == Answer(PONG)
        cluster.locate(other.peer, *addresses[:3], str(peer.exchange.address))
        with pytest.raises(PeerUnavailableError, match="answers at this address now"):
            await asker.ask(other.peer, PING)

    play(tmp_path, scenario)


def test_a_failure_is_remembered_until_the_member_moves_or_connects(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        asker, peer = await cluster.start(), await cluster.start()
        good = str(peer.exchange.address)
        cluster.locate(peer.peer, "127.0.0.1:1")
        for _ in range(2):
            with pytest.raises(PeerUnavailableError):
                await asker.ask(peer.peer, PING)
        cluster.locate(peer.peer, good)
        assert await asker.ask(peer.peer, PING) == Answer(PONG)
        asker.exchange.disconnect(peer.peer)
        peer.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PeerUnavailableError):
            await asker.ask(peer.peer, PING)
        again = await cluster.start(credentials=peer.credentials, port=int(good.rpartition(":")[2]))
        with pytest.raises(PeerUnavailableError):
            await asker.ask(peer.peer, PING)
        await again.ask(asker.peer, PING)
        assert await asker.ask(peer.peer, PING) == Answer(PONG)

    play(tmp_path, scenario)


def test_requests_at_once_share_one_connection(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        asker, peer = await cluster.start(), await cluster.start()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(asker.read, peer.peer)
        asking, asked = asker.exchange.statistics(), peer.exchange.statistics()
        assert (asking.connections_out, asking.connections_in, asking.requests_out) == (1, 0, 0)
        assert (asked.connections_out, asked.connections_in, asked.requests_in) == (0, 1, 0)
        assert asking.bytes_received == asked.traffic[asker.peer].sent > 20 * BLOCK_SIZE
        assert asking.traffic[peer.peer].sent == asked.bytes_received < BLOCK_SIZE

    play(tmp_path, scenario)


def test_connections_of_a_peer_are_bounded(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        asker, peer = await cluster.start(), await cluster.start(limits=Limits(connections_per_peer=2))
        for lane in (Lane.BULK, Lane.URGENT):
            await asker.ask(peer.peer, PING, lane=lane)
        with pytest.raises(PeerUnavailableError):
            await asker.ask(peer.peer, PING, lane=Lane.CONTROL)
        other = await cluster.start()
        assert await other.ask(peer.peer, PING) == Answer(PONG)

    play(tmp_path, scenario)


def test_both_sides_close_idle_connections(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(timing=Timing(idle_s=1.0))
        raw = await cluster.dial_raw(node)
        async with cluster.time_passing():
            assert await raw.ended()
        assert node.exchange.statistics().connections_in == 0

        closed = trio.Event()

        async def answer_once(raw: Raw) -> None:
            request_id, _ = await raw.read_frame()
            await raw.say(request_id, PONG)
            await raw.ended()
            closed.set()

        peer = await cluster.serve_raw(answer_once)
        for _ in range(2):
            closed = trio.Event()
            assert await node.ask(peer, PING) == Answer(PONG)
            async with cluster.time_passing():
                await closed.wait()

    play(tmp_path, scenario)


def test_requests_without_answers_are_bounded(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        asker = await cluster.start(limits=Limits(pending_per_connection=3))
        mute = cluster.exchange()
        for _ in range(3):
            with trio.move_on_after(0):
                await asker.ask(mute.peer, PING)
        with pytest.raises(PeerUnavailableError, match="owes 3 answers"):
            await asker.ask(mute.peer, PING)

    play(tmp_path, scenario)


def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(BadInputError, match=str(port)):
                cluster.exchange(port=port)

    play(tmp_path, scenario)


# Plain mode


class Wiretap:
    """Passes bytes on between an asker and a node, and records them."""

    def __init__(self) -> None:
        self.taken = bytearray()

    async def run(self, port: int, *, task_status: trio.TaskStatus[str]) -> None:
        async def join(asker: trio.SocketStream) -> None:
            async with asker, await trio.open_tcp_stream("127.0.0.1", port) as node, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, asker, node)
                nursery.start_soon(self._pass_on, node, asker)

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, join, 0, host="127.0.0.1"))
            task_status.started("{}:{}".format(*listeners[0].socket.getsockname()))

    async def _pass_on(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        async for data in source:
            self.taken += data
            await target.send_all(data)


@pytest.mark.parametrize("lane", Lane)
@pytest.mark.parametrize(("asking", "answering"), [(True, True), (True, False), (False, True), (False, False)])
def test_blocks_are_sent_in_the_clear_only_if_both_sides_want_it(
    tmp_path: Path, asking: bool, answering: bool, lane: Lane
) -> None:
    """S-67"""

    async def scenario(cluster: Cluster) -> None:
        asker, peer = await cluster.start(plain=asking), await cluster.start(plain=answering)
        tap = Wiretap()
        cluster.locate(peer.peer, await cluster.nursery.start(tap.run, peer.exchange.address.port))
        for _ in range(3):
            assert await asker.read(peer.peer, GET, lane=lane) == BLOCK
        seen = DIGEST.encode() in tap.taken
        assert seen == (BLOCK[:1000] in tap.taken) == (asking and answering and lane is not Lane.CONTROL)
        tap.taken.clear()
        assert await asker.ask(peer.peer, NAME, lane=lane) == Answer(NAMED)
        assert b"secret" not in tap.taken
        assert asker.exchange.statistics().bytes_received == peer.exchange.statistics().bytes_sent > 3 * BLOCK_SIZE

    play(tmp_path, scenario)


def test_a_request_right_behind_the_end_of_tls_is_not_lost(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(plain=True)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = cluster.credentials().client_context().wrap_bio(incoming, outgoing)
        stream = await trio.open_tcp_stream("127.0.0.1", node.exchange.address.port)

        async def exchange_until(step: Callable[[], object]) -> None:
            while True:
                try:
                    step()
                except ssl.SSLWantReadError:
                    await stream.send_all(outgoing.read())
                    incoming.write(await stream.receive_some(1))  # so that no later byte is read here
                else:
                    return

        await exchange_until(tls.do_handshake)
        tls.write(wire.encode_hello("bulk", True))
        await exchange_until(lambda: tls.read(1000))
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        await stream.send_all(outgoing.read() + frame(7, GET) + frame(8, GET))
        await exchange_until(tls.unwrap)
        first, second = (frame(number, PART, BLOCK_SIZE) + BLOCK for number in (7, 8))
        data = b""
        while len(data) < len(first) + len(second):
            data += await stream.receive_some()
        assert data in (first + second, second + first)

    play(tmp_path, scenario)


@pytest.mark.parametrize("request_", [PING, Holders(()), FindHolders(DIGEST)], ids=["ping", "a reply", "directory"])
def test_in_the_clear_only_blocks_may_be_requested(tmp_path: Path, request_: Any) -> None:
    """S-67"""

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(plain=True)
        raw = await cluster.dial_raw(node, hello=wire.encode_hello("bulk", True))
        await raw.read_frame()
        clear = await raw.to_plain()
        await clear.send(frame(1, request_))
        assert await clear.ended()

    play(tmp_path, scenario)


@pytest.mark.parametrize("behaviour", ["stalls", "goes on in TLS", "says more before it", "leaves", "speaks too soon"])
def test_an_asker_that_breaks_off_plain_mode_is_dropped_in_time(tmp_path: Path, behaviour: str) -> None:
    """S-67"""

    async def scenario(cluster: Cluster) -> None:
        node = await cluster.start(plain=True, limits=Limits(handshakes=1))
        hello = wire.encode_hello("bulk", True) + (frame(1, GET) if behaviour == "says more before it" else b"")
        raw = await cluster.dial_raw(node, hello=hello)
        if behaviour != "says more before it":
            await raw.read_frame()
        if behaviour == "goes on in TLS":
            await raw.say(1, GET)
        elif behaviour == "leaves":
            await raw.stream.transport_stream.aclose()
        elif behaviour == "speaks too soon":
            await raw.stream.transport_stream.send_all(frame(1, GET))
        other = await cluster.start(plain=True, timing=Timing(handshake_s=60.0))
        async with cluster.time_passing():  # the only slot for a handshake becomes free
            assert await other.read(node.peer, GET, silence_s=60.0) == BLOCK
        if behaviour != "leaves":
            assert await raw.ended()
        assert node.exchange.statistics().connections_in == 1

    play(tmp_path, scenario)


@pytest.mark.parametrize("behaviour", ["stalls", "goes on in TLS", "leaves", "garbage"])
def test_an_answering_peer_that_breaks_off_plain_mode_is_unavailable(tmp_path: Path, behaviour: str) -> None:
    async def serve(raw: Raw) -> None:
        if behaviour == "goes on in TLS":
            await raw.say(0, PART, BLOCK_SIZE)
        elif behaviour == "garbage":
            await (await raw.to_plain()).send(b"\xff" * 1000)
        if behaviour != "leaves":
            await trio.sleep_forever()

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(plain=True), await cluster.serve_raw(serve, plain=True)
        kind = PeerMisbehavedError if behaviour == "garbage" else PeerUnavailableError
        async with cluster.time_passing():
            with pytest.raises(kind):
                await node.read(peer, GET)
        other = await cluster.start(plain=True)
        assert await node.read(other.peer, GET) == BLOCK

    play(tmp_path, scenario)


def test_a_node_that_does_not_know_plain_mode_is_asked_over_tls(tmp_path: Path) -> None:
    """Its hello lacks the field `plain`. It accepts the longer hello because it ignores unknown fields."""

    async def serve(raw: Raw) -> None:
        await raw.give_block()
        await raw.ended()

    async def scenario(cluster: Cluster) -> None:
        node, old = await cluster.start(plain=True), await cluster.serve_raw(serve)
        assert await node.read(old, GET) == BLOCK
        raw = await cluster.dial_raw(node)
        assert await raw.read_frame() == [b"shoal-bulk", 4, "bulk", True]
        await raw.say(1, PING)
        assert await raw.read_frame() == [1, [38, [[], [], 0, False], b""]]

    play(tmp_path, scenario)


@pytest.mark.parametrize("plain", [False, True])
def test_late_bytes_of_a_cancelled_body_are_discarded(tmp_path: Path, plain: bool) -> None:
    release = trio.Event()
    memory = bytearray(BLOCK_SIZE)

    async def halves(raw: Raw) -> None:
        if plain:
            raw = await raw.to_plain()
        await raw.give_block(BLOCK[: BLOCK_SIZE // 2])
        await release.wait()
        await raw.send(BLOCK[BLOCK_SIZE // 2 :])
        await raw.give_block()
        await raw.ended()

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(plain=plain), await cluster.serve_raw(halves, plain=plain)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(node.read, peer, into=lambda message: memoryview(memory)))
                # Time must pass: less than GATHERED_BYTES of a body is read only after GATHER_S.
                await cluster.until(lambda: node.exchange.statistics().bytes_received >= BLOCK_SIZE // 2)
                scope.cancel()
        assert memory.startswith(BLOCK[: BLOCK_SIZE // 2])
        memory[:] = bytes(BLOCK_SIZE)
        release.set()
        assert await node.read(peer, GET) == BLOCK
        assert memory == bytes(BLOCK_SIZE)
        assert node.exchange.statistics().connections_out == 1

    play(tmp_path, scenario)


def test_a_peer_that_sends_much_after_a_body_delays_no_other(tmp_path: Path) -> None:
    """S-19"""

    async def flood(raw: Raw) -> None:
        await raw.give_block()
        request_id, _ = await raw.read_frame()
        await raw.send(frame(0, Waiting(((request_id, 0),))) * 50_000)
        await trio.sleep_forever()

    async def scenario(cluster: Cluster) -> None:
        node, peer = await cluster.start(), await cluster.serve_raw(flood)
        assert await node.read(peer, GET) == BLOCK
        heard = [0]

        def hear(state: State) -> None:
            heard[-1] += 1

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(node.read, peer, heard=hear))
                while sum(heard) < 50_000:
                    heard.append(0)
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        most_in_a_read = BATCH_BYTES // len(frame(0, Waiting(((1, 0),)))) + 1
        assert max(heard) <= 2 * most_in_a_read  # the reader may run first in one pass, and last in the next

    play(tmp_path, scenario)
