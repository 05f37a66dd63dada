"""Who is not a member is refused on every channel: nothing is answered beyond the handshake, and the log says why."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from node.config.schema import HostPort
from node.exchange.connection import Endpoint
from node.exchange.contract import Answer, Lane
from node.exchange.tls import TlsExchange
from node.identity.certificates import (
    Authority,
    Credentials,
    Subject,
    Validity,
    create_authority,
    issue,
    load_authority,
)
from node.identity.identity import Identity
from node.identity.registrar import Line
from node.identity.verifier import LEEWAY_S, Admission
from node.membership import libp2p as swarm_libp2p
from node.membership.addresses import Target
from node.membership.libp2p import LibP2PSwarm, Timing
from protocol import introduction, wire
from protocol.errors import PeerUnavailableError
from protocol.ids import PeerId
from protocol.members import Member
from protocol.messages import Ping, Request

NOW = 1_800_000_000
PING = Ping(())


class Refused(logging.Handler):
    """The lines that tell of a refusal."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        self.came = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("refused "):
            self.records.append(record)
            self.came.set()
            self.came = trio.Event()

    async def wait(self, count: int) -> None:
        while len(self.records) < count:
            await self.came.wait()


@dataclass
class Scene:
    """A member that judges, and somebody with `credentials` who should be refused; `shows` nothing where it is b""."""

    nursery: trio.Nursery
    log: Refused
    member: Credentials
    stranger: Credentials
    revoked: set[str] = field(default_factory=set)
    addresses: dict[PeerId, Member] = field(default_factory=dict)
    shows: bool = True

    def admission(self) -> Admission:
        return Admission(self.member, self.revoked, lambda: NOW)

    @property
    def peer(self) -> PeerId:
        return self.stranger.identity.peer_id


def authority(folder: Path, name: str) -> Authority:
    create_authority(folder / name)
    return load_authority(folder / name)


def identity() -> Identity:
    return Identity.of(Ed25519PrivateKey.generate())


def valid(by: Authority, who: Identity, end: int | None = None) -> Credentials:
    validity = Validity(NOW - 9 * LEEWAY_S, end)
    return Credentials(who, issue(by, Subject(who.peer_id), validity).public_bytes(Encoding.DER), by.der)


def no_certificate(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.shows = False


def another_cluster(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.stranger = valid(other, scene.stranger.identity)


def expired(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.stranger = valid(ours, scene.stranger.identity, NOW - LEEWAY_S - 1)


def revoked(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.revoked.add(scene.peer)


CASES = {
    "no certificate": no_certificate, "of another cluster": another_cluster,
    "certificate expired": expired, "certificate revoked": revoked,
}  # fmt: skip


# Channels. Each lets the stranger and the member meet, in one direction, and returns once the stranger was refused.


async def must_not_be_asked(peer: PeerId, request: Request) -> Answer:
    raise AssertionError(f"{peer} got as far as {request}")


def exchange(scene: Scene, *, plain: bool = False) -> TlsExchange:
    admission = scene.admission()
    endpoint = Endpoint(
        admission.server_context, admission.client_context, admission.peer_of, listen=HostPort("127.0.0.1", 0),
        locate=scene.addresses.get, refused=lambda peer: False, handler=must_not_be_asked, plain=plain,
    )  # fmt: skip
    return TlsExchange(endpoint)


def stranger_client(scene: Scene) -> ssl.SSLContext:
    if scene.shows:
        context = scene.stranger.client_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def bulk_in(scene: Scene, *, plain: bool = False) -> None:
    node = exchange(scene, plain=plain)
    await scene.nursery.start(node.run)
    tcp = await trio.open_tcp_stream(node.address.host, node.address.port)
    stream = trio.SSLStream(tcp, stranger_client(scene))
    with pytest.raises((trio.BrokenResourceError, EOFError)):  # noqa: PT012 # whichever step the refusal reaches first
        await stream.send_all(wire.encode_hello("bulk", plain))
        said = await stream.receive_some(1)
        assert not said, "something was answered"
        raise EOFError
    await stream.transport_stream.aclose()
    assert node.statistics().connections_in == 0


async def bulk_plain_in(scene: Scene) -> None:
    await bulk_in(scene, plain=True)


async def bulk_out(scene: Scene) -> None:
    """The member asks, and finds the stranger there."""
    node = exchange(scene)
    await scene.nursery.start(node.run)
    heard = bytearray()
    done = trio.Event()

    async def listen(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):
            heard.extend(await stream.receive_some(100))
        done.set()

    context = scene.stranger.server_context()
    context.verify_mode = ssl.CERT_NONE
    listeners = await scene.nursery.start(partial(trio.serve_ssl_over_tcp, listen, 0, context, host="127.0.0.1"))
    port = listeners[0].transport_listener.socket.getsockname()[1]
    scene.addresses[scene.peer] = Member(scene.peer, "x", "s", (f"127.0.0.1:{port}",))
    with pytest.raises(PeerUnavailableError):
        await node.request(scene.peer, PING, lane=Lane.CONTROL, silence_s=2.0)
    await done.wait()
    assert not heard, "something was said"


def swarm(scene: Scene, admission: Admission, bootstrap: tuple[str, ...] = ()) -> LibP2PSwarm:
    me = Member(admission.identity.peer_id, "n", "s", ())

    def introduced(members: tuple[Member, ...]) -> None:
        raise AssertionError(f"introduced {members}")

    async def joins(line: Line, host: str, own: PeerId) -> None:
        raise AssertionError("nobody joins here")

    return LibP2PSwarm(
        admission, lambda: me, joins=joins, listen="/ip4/127.0.0.1/tcp/0", bootstrap=bootstrap, mdns=False,
        introduced=introduced, current=lambda: (me,), timing=Timing(first_retry=0.01, last_retry=0.02, linger=0.2),
    )  # fmt: skip


async def introduction_in(scene: Scene) -> None:
    node = swarm(scene, scene.admission())
    await scene.nursery.start(node.run)
    port = int(node.addresses[0].split("/")[4])
    tcp = await trio.open_tcp_stream("127.0.0.1", port)
    upgrader = swarm_libp2p._upgrader(scene.stranger.identity)
    async with tcp, swarm_libp2p._libp2p_stream(upgrader, tcp, scene.member.identity.peer_id) as (line, _):
        await line.send(introduction.encode_hello(scene.stranger.certificate if scene.shows else b""))
        await line.receive(introduction.MAX_HELLO)
        me = Member(scene.peer, "x", "s", ())
        await line.send(introduction.encode_members(me, [me]))
        with pytest.raises(PeerUnavailableError):
            await line.receive(introduction.MAX_MEMBERS_BYTES)


@asynccontextmanager
async def stranger_listens(scene: Scene, heard: list[bytes]) -> AsyncIterator[int]:
    async def answer(tcp: trio.SocketStream) -> None:
        upgrader = swarm_libp2p._upgrader(scene.stranger.identity)
        try:
            async with swarm_libp2p._libp2p_stream(upgrader, tcp, None) as (line, _):
                await line.receive(introduction.MAX_HELLO)
                await line.send(introduction.encode_hello(scene.stranger.certificate if scene.shows else b""))
                heard.append(await line.receive(introduction.MAX_MEMBERS_BYTES))
        except PeerUnavailableError:
            pass

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    scene.nursery.start_soon(partial(trio.serve_listeners, answer, listeners))
    yield listeners[0].socket.getsockname()[1]


async def introduction_out(scene: Scene) -> None:
    heard: list[bytes] = []
    async with stranger_listens(scene, heard) as port:
        node = swarm(scene, scene.admission(), (f"/ip4/127.0.0.1/tcp/{port}/p2p/{scene.peer}",))
        await scene.nursery.start(node.run)
        await scene.log.wait(1 if scene.revoked else 2)  # who is revoked is not dialled at all
    assert not heard


async def found_by_mdns(scene: Scene) -> None:
    heard: list[bytes] = []
    async with stranger_listens(scene, heard) as port:
        node = swarm(scene, scene.admission())
        await scene.nursery.start(node.run)
        node._found(scene.nursery, (Target(scene.peer, "127.0.0.1", port),))
        await scene.log.wait(1 if scene.revoked else 2)  # who is revoked is not dialled at all
    assert not heard


@pytest.fixture
def log() -> Iterator[Refused]:
    handler = Refused()
    logger = logging.getLogger("node.identity.verifier")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


CHANNELS: dict[str, tuple[str, Callable[[Scene], Awaitable[None]]]] = {
    "bulk, asked": ("bulk", bulk_in),
    "bulk in plain mode, asked": ("bulk", bulk_plain_in),
    "bulk, asking": ("bulk", bulk_out),
    "introduction, dialled": ("introduction", introduction_in),
    "introduction, dialling": ("introduction", introduction_out),
    "found by mDNS": ("introduction", found_by_mdns),
}


PAIRS = [pair for pair in product(CHANNELS, CASES) if pair != ("bulk, asking", "no certificate")]
"""A server of TLS 1.3 always has one."""


@pytest.mark.parametrize(("channel", "why"), PAIRS)
def test_who_is_no_member_is_refused(tmp_path: Path, log: Refused, channel: str, why: str) -> None:
    ours, other = authority(tmp_path, "ours"), authority(tmp_path, "other")

    async def main() -> None:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                scene = Scene(nursery, log, valid(ours, identity()), valid(ours, identity()))
                CASES[why](scene, ours, other)
                await CHANNELS[channel][1](scene)
                await log.wait(1)
                check(scene)
                nursery.cancel_scope.cancel()

    def check(scene: Scene) -> None:
        first, *more = log.records
        assert first.levelno == logging.WARNING
        assert all(record.levelno == logging.DEBUG for record in more)
        text = first.getMessage()
        assert why in text
        assert "127.0.0.1:" in text
        assert vars(first)["channel"] == CHANNELS[channel][0]
        proven = channel not in ("bulk, asked", "bulk in plain mode, asked", "bulk, asking") or why in (
            "certificate expired", "certificate revoked",
        )  # fmt: skip
        assert (scene.peer in text) is proven

    trio.run(main)


@pytest.mark.parametrize("channel", ["bulk, asked", "introduction, dialled"])
def test_a_member_is_not_refused(tmp_path: Path, log: Refused, channel: str) -> None:
    """The same scene without a reason to refuse: what the tests above rest on."""
    ours = authority(tmp_path, "ours")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            scene = Scene(nursery, log, valid(ours, identity()), valid(ours, identity(), NOW - LEEWAY_S + 1))
            if channel == "bulk, asked":
                node = exchange(scene)
                await nursery.start(node.run)
                tcp = await trio.open_tcp_stream(node.address.host, node.address.port)
                stream = trio.SSLStream(tcp, stranger_client(scene))
                await stream.send_all(wire.encode_hello("bulk"))
                assert await stream.receive_some(100) == wire.encode_hello("bulk")
            else:
                assert scene.admission().verify(scene.stranger.certificate) == scene.peer
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not log.records
