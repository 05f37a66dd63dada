"""A node that is not a member is refused on every channel: it gets no answer, and the log says why."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.config.quantities import HostPort
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
from node.identity.verifier import LEEWAY_S, Verifier
from node.membership.addresses import Target
from node.membership.bootstrap import Timing
from node.membership.libp2p import LibP2PIntroducer, secured_line, upgrader_of
from node.membership.passports import Passports
from protocol import introduction, wire
from protocol.errors import PeerUnavailableError
from protocol.ids import PeerId
from protocol.members import Member, Vouched
from protocol.messages import Ping, Request
from protocol.statements import Author

NOW = 1_800_000_000
PING = Ping()
LIMIT_S = 60.0
"""Only a test that hangs takes this long."""


class Refused(logging.Handler):
    """The log lines about refusals."""

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
    """A member, and a stranger that it must refuse. `shows`: whether the stranger shows a certificate."""

    nursery: trio.Nursery
    log: Refused
    member: Credentials
    stranger: Credentials
    revoked: set[str] = field(default_factory=set)
    addresses: dict[PeerId, Member] = field(default_factory=dict)
    shows: bool = True

    def verifier(self) -> Verifier:
        return Verifier(self.member, self.revoked, lambda: NOW)

    @property
    def peer(self) -> PeerId:
        return self.stranger.identity.peer_id


def authority(folder: Path, name: str) -> Authority:
    create_authority(folder / name)
    return load_authority(folder / name)


def identity() -> Identity:
    return Identity.of(Ed25519PrivateKey.generate())


def valid(by: Authority, identity: Identity, end: int | None = None) -> Credentials:
    validity = Validity(NOW - 9 * LEEWAY_S, end)
    return Credentials(identity, issue(by, Subject(identity.peer_id), validity), by.der)


def no_certificate(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.shows = False


def another_cluster(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.stranger = valid(other, scene.stranger.identity)


def expired(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.stranger = valid(ours, scene.stranger.identity, NOW - LEEWAY_S - 1)


def revoked(scene: Scene, ours: Authority, other: Authority) -> None:
    scene.revoked.add(scene.peer)


CASES = {
    "no certificate": no_certificate,
    "of another cluster": another_cluster,
    "certificate expired": expired,
    "certificate revoked": revoked,
}


# Channels. Each connects the stranger and the member, in one direction, and returns once the stranger was refused.


async def refuse_to_answer(peer: PeerId, request: Request) -> Answer:
    raise AssertionError(f"{peer} got as far as {request}")


def exchange(scene: Scene, *, plain: bool = False) -> TlsExchange:
    verifier = scene.verifier()
    endpoint = Endpoint(
        verifier.server_context,
        verifier.client_context,
        verifier.peer_of,
        listen=HostPort("127.0.0.1", 0),
        locate=scene.addresses.get,
        refused=lambda peer: False,
        handler=refuse_to_answer,
        plain=plain,
    )
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
        answer = await stream.receive_some(1)
        assert not answer
        raise EOFError
    await stream.transport_stream.aclose()
    assert node.statistics().connections_in == 0


async def bulk_plain_in(scene: Scene) -> None:
    await bulk_in(scene, plain=True)


async def bulk_out(scene: Scene) -> None:
    """The member asks, and the stranger answers at the address."""
    node = exchange(scene)
    await scene.nursery.start(node.run)
    received = bytearray()
    done = trio.Event()

    async def listen(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):
            received.extend(await stream.receive_some(100))
        done.set()

    context = scene.stranger.server_context()
    context.verify_mode = ssl.CERT_NONE
    listeners = await scene.nursery.start(partial(trio.serve_ssl_over_tcp, listen, 0, context, host="127.0.0.1"))
    port = listeners[0].transport_listener.socket.getsockname()[1]
    scene.addresses[scene.peer] = Member(scene.peer, "x", "s", (f"127.0.0.1:{port}",))
    with pytest.raises(PeerUnavailableError):
        await node.request(scene.peer, PING, lane=Lane.CONTROL, silence_s=LIMIT_S)
    await done.wait()
    assert not received


def author_of(credentials: Credentials) -> Author:
    return Author(credentials.identity.peer_id, credentials.identity.sign, lambda: credentials.certificate)


def introducer(scene: Scene, bootstrap: tuple[str, ...] = ()) -> LibP2PIntroducer:
    me = Member(scene.member.identity.peer_id, "n", "s", ())

    def introduced(statements: Sequence[Vouched], observed: str) -> None:
        raise AssertionError(f"introduced {statements}")

    async def joins(line: Line, host: str, own: PeerId) -> None:
        raise AssertionError(f"{line.peer} came to join")

    verifier = scene.verifier()
    return LibP2PIntroducer(
        verifier,
        joins=joins,
        listen="/ip4/127.0.0.1/tcp/0",
        bootstrap=bootstrap,
        mdns=False,
        introduced=introduced,
        current=lambda: (me,),
        named=lambda: (author_of(scene.member).state(me, 1),),
        passports=Passports(author_of(scene.member), verifier.subject_of, verifier.refusal),
        timing=Timing(deadline=LIMIT_S, first_retry=0.01, last_retry=0.02, linger=0.2),
    )


async def introduction_in(scene: Scene) -> None:
    node = introducer(scene)
    await scene.nursery.start(node.run)
    port = int(node.addresses[0].split("/")[4])
    tcp = await trio.open_tcp_stream("127.0.0.1", port)
    async with tcp, secured_line(upgrader_of(scene.stranger.identity), tcp, scene.member.identity.peer_id) as (line, _):
        await line.send(introduction.encode_hello(scene.stranger.certificate if scene.shows else b""))
        await line.receive(introduction.MAX_HELLO)
        me = Member(scene.peer, "x", "s", ())
        await line.send(introduction.encode_members([author_of(scene.stranger).state(me, 1)]))
        with pytest.raises(PeerUnavailableError):
            await line.receive(introduction.MAX_MEMBERS_BYTES)


@asynccontextmanager
async def stranger_listens(scene: Scene, received: list[bytes]) -> AsyncIterator[int]:
    async def answer(tcp: trio.SocketStream) -> None:
        try:
            async with secured_line(upgrader_of(scene.stranger.identity), tcp, None) as (line, _):
                await line.receive(introduction.MAX_HELLO)
                await line.send(introduction.encode_hello(scene.stranger.certificate if scene.shows else b""))
                received.append(await line.receive(introduction.MAX_MEMBERS_BYTES))
        except PeerUnavailableError:
            pass

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    scene.nursery.start_soon(partial(trio.serve_listeners, answer, listeners))
    yield listeners[0].socket.getsockname()[1]


async def introduction_out(scene: Scene) -> None:
    received: list[bytes] = []
    async with stranger_listens(scene, received) as port:
        node = introducer(scene, (f"/ip4/127.0.0.1/tcp/{port}/p2p/{scene.peer}",))
        await scene.nursery.start(node.run)
        await scene.log.wait(1 if scene.revoked else 2)  # a revoked peer is not dialled at all
    assert not received


async def discovered_by_mdns(scene: Scene) -> None:
    received: list[bytes] = []
    async with stranger_listens(scene, received) as port:
        node = introducer(scene)
        await scene.nursery.start(node.run)
        node.bootstrap.discovered(scene.nursery, (Target(scene.peer, "127.0.0.1", port),))
        await scene.log.wait(1 if scene.revoked else 2)  # a revoked peer is not dialled at all
    assert not received


@pytest.fixture
def log() -> Iterator[Refused]:
    handler = Refused()
    logger = logging.getLogger("node.runtime.refusals")
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
    "found by mDNS": ("introduction", discovered_by_mdns),
}


PAIRS = [pair for pair in product(CHANNELS, CASES) if pair != ("bulk, asking", "no certificate")]
"""All cases except a TLS server without a certificate, which TLS 1.3 does not allow."""


@pytest.mark.parametrize(("channel", "why"), PAIRS)
def test_a_node_that_is_not_a_member_is_refused(tmp_path: Path, log: Refused, channel: str, why: str) -> None:
    ours, other = authority(tmp_path, "ours"), authority(tmp_path, "other")

    async def main() -> None:
        with trio.fail_after(LIMIT_S):
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
        is_verified_first = why in ("certificate expired", "certificate revoked")
        assert (scene.peer in text) is (CHANNELS[channel][0] == "introduction" or is_verified_first)

    trio.run(main)


@pytest.mark.parametrize("channel", ["bulk, asked", "introduction, dialled"])
def test_a_member_is_not_refused(tmp_path: Path, log: Refused, channel: str) -> None:
    """The same scene without a reason to refuse. It shows that the tests above detect an accepted stranger."""
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
                assert scene.verifier().verify(scene.stranger.certificate) == scene.peer
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not log.records
