"""Introductions over real libp2p connections on loopback: between members, and by strangers, liars and garbage."""

import logging
import random
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.abc
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity import certificates
from node.identity.certificates import Authority, Credentials
from node.identity.identity import Identity
from node.identity.registrar import Line
from node.identity.verifier import Verifier
from node.membership import libp2p, mdns
from node.membership.addresses import Target, parse_target
from node.membership.bootstrap import Bootstrap, Timing
from node.membership.libp2p import LibP2PIntroducer, LibP2PLine
from node.membership.passports import Passports
from protocol import introduction
from protocol.errors import BadInputError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.members import Member, Vouched
from protocol.statements import Author

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LIMIT_S = 60.0
"""Only a test that hangs takes this long."""
QUICK = Timing(deadline=LIMIT_S, first_retry=0.01, last_retry=0.02, recheck=0.02, linger=0.2)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return certificates.own_authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    (tmp_path / "other").mkdir()
    return certificates.own_authority(tmp_path / "other")


class Log(logging.Handler):
    """The log lines of the nodes. A test waits for a part of their text."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        self._changed = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._changed.set()
        self._changed = trio.Event()

    def having(self, text: str, level: int = logging.DEBUG) -> list[logging.LogRecord]:
        return [record for record in self.records if text in record.getMessage() and record.levelno >= level]

    async def wait(self, text: str, count: int = 1) -> None:
        while len(self.having(text)) < count:
            await self._changed.wait()


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    logger = logging.getLogger("node")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


async def no_joins(line: Line, host: str, own: PeerId) -> None:
    raise AssertionError(f"{line.peer} came to join")


class Node:
    """An introducer, and a membership that accepts every introduction."""

    def __init__(
        self,
        authority: Authority,
        name: str,
        bootstrap: Sequence[str] = (),
        *,
        listen: str = LOOPBACK,
        identity: Identity | None = None,
        timing: Timing = QUICK,
        multicast: bool = False,
        revoked: Container[str] = (),
    ) -> None:
        self.identity = identity or Identity.of(Ed25519PrivateKey.generate())
        self.me = Member(self.identity.peer_id, name, "site", ("127.0.0.1:4502",))
        self.known: dict[PeerId, Member] = {}
        self.introductions: list[tuple[Member, ...]] = []
        self._changed = trio.Event()
        verifier = Verifier(Credentials.issued(authority, self.identity, name), revoked)
        self.author = Author(self.me.peer_id, self.identity.sign, lambda: verifier.credentials.certificate)
        self.statements = {self.me.peer_id: self.author.state(self.me, 1)}
        self.introducer = LibP2PIntroducer(
            verifier,
            joins=no_joins,
            listen=listen,
            bootstrap=bootstrap,
            mdns=multicast,
            introduced=self._introduced,
            current=lambda: (self.me, *self.known.values()),
            named=lambda: tuple(self.statements.values()),
            passports=Passports(self.author, verifier.subject_of, verifier.refusal),
            timing=timing,
            rng=random.Random(1),
        )

    def _introduced(self, statements: Sequence[Vouched], observed: str) -> None:
        assert observed in ("127.0.0.1", "::1")
        members = tuple(statement.member for statement in statements)
        self.statements.update({statement.peer_id: statement for statement in statements})
        self.introductions.append(members)
        self.known.update({member.peer_id: member for member in members if member != self.me})
        self._changed.set()
        self._changed = trio.Event()

    @property
    def address(self) -> str:
        return self.introducer.addresses[0]

    @property
    def port(self) -> int:
        return parse_target(self.address).port

    async def wait_known(self, *others: "Node") -> None:
        while not {other.me.peer_id for other in others} <= self.known.keys():
            await self._changed.wait()

    async def wait_introductions(self, count: int) -> None:
        while len(self.introductions) < count:
            await self._changed.wait()


@asynccontextmanager
async def running(*nodes: Node, limit_s: float = LIMIT_S) -> AsyncIterator[trio.Nursery]:
    with trio.fail_after(limit_s):
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.introducer.run)
            yield nursery
            nursery.cancel_scope.cancel()


def run(main: Callable[[], Awaitable[None]], clock: trio.abc.Clock | None = None) -> None:
    async def wrapped() -> None:
        await main()

    trio.run(wrapped, clock=clock)


@pytest.mark.parametrize("host", ["ip4/127.0.0.1", "dns4/localhost", "dns/localhost"])
def test_two_nodes_introduce_each_other(authority: Authority, host: str) -> None:
    async def main() -> None:
        a = Node(authority, "a")
        async with running(a) as nursery:
            b = Node(authority, "b", [f"/{host}/tcp/{a.port}/p2p/{a.me.peer_id}"])
            await nursery.start(b.introducer.run)
            await b.wait_known(a)
            await a.wait_known(b)
            assert b.introductions == [(a.me,)]
            assert a.introductions == [(b.me,)]

    run(main)


def test_ipv6(authority: Authority) -> None:
    async def main() -> None:
        a = Node(authority, "a", listen="/ip6/::1/tcp/0")
        async with running(a) as nursery:
            assert a.address.startswith("/ip6/::1/tcp/")
            b = Node(authority, "b", [a.address])
            await nursery.start(b.introducer.run)
            await b.wait_known(a)

    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    run(main)


def test_a_third_node_hears_of_the_second(authority: Authority) -> None:
    async def main() -> None:
        a = Node(authority, "a")
        async with running(a) as nursery:
            b = Node(authority, "b", [a.address])
            await nursery.start(b.introducer.run)
            await a.wait_known(b)
            c = Node(authority, "c", [a.address])
            await nursery.start(c.introducer.run)
            await c.wait_known(a, b)
            assert c.introductions == [(a.me, b.me)]

    run(main)


def test_the_dialled_peers_change_with_the_configured_addresses(authority: Authority) -> None:
    async def main() -> None:
        a, b, c = Node(authority, "a"), Node(authority, "b"), Node(authority, "c")
        async with running(a, b, c):
            a.introducer.bootstrap.prepared([b.address])()
            await a.wait_known(b)
            with pytest.raises(BadInputError):
                a.introducer.bootstrap.prepared([b.address, "/ip4/127.0.0.1"])
            a.introducer.bootstrap.prepared([c.address])()
            await a.wait_known(c)
            a.known.clear()
            a.introductions.clear()
            await a.wait_known(c)
            assert {members[0] for members in a.introductions} == {c.me}

    run(main)


def test_nodes_that_dial_each_other_meet(authority: Authority) -> None:
    async def main() -> None:
        first, second = (Identity.of(Ed25519PrivateKey.generate()) for _ in range(2))
        ports = free_ports(2)
        peers = zip(ports, (first, second), strict=True)
        addresses = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity.peer_id}" for port, identity in peers]
        a = Node(authority, "a", addresses, listen=f"/ip4/127.0.0.1/tcp/{ports[0]}", identity=first)
        b = Node(authority, "b", addresses, listen=f"/ip4/127.0.0.1/tcp/{ports[1]}", identity=second)
        async with running(a, b):
            await a.wait_known(b)
            await b.wait_known(a)
        assert a.me.peer_id not in a.known

    run(main)


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def test_a_node_of_another_cluster_is_refused_and_logged_once(
    authority: Authority, stranger: Authority, log: Log
) -> None:
    async def main() -> None:
        a = Node(authority, "a")
        async with running(a) as nursery:
            b = Node(stranger, "b", [a.address])
            await nursery.start(b.introducer.run)
            await log.wait(f"refused {a.me.peer_id} at", 3)
            await log.wait(f"refused {b.me.peer_id} at", 3)
            assert a.introductions == b.introductions == []
            for peer in (a.me.peer_id, b.me.peer_id):
                (warning,) = log.having(f"refused {peer}", logging.WARNING)
                assert "of another cluster" in warning.getMessage()
                assert "127.0.0.1:" in warning.getMessage()

    run(main)


def test_a_dead_bootstrap_address_is_tried_until_it_answers(authority: Authority, log: Log) -> None:
    async def main() -> None:
        identity = Identity.of(Ed25519PrivateKey.generate())
        (port,) = free_ports(1)
        b = Node(authority, "b", [f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity.peer_id}"])
        async with running(b) as nursery:
            await log.wait("cannot reach", 3)
            assert len(log.having("cannot reach", logging.WARNING)) == 1
            a = Node(authority, "a", listen=f"/ip4/127.0.0.1/tcp/{port}", identity=identity)
            await nursery.start(a.introducer.run)
            await b.wait_known(a)

    run(main)


@pytest.mark.parametrize(
    ("failures", "alone", "company"),
    [(0, 0.5, 0.5), (4, 8.0, 8.0), (5, 10.0, 16.0), (11, 10.0, 600.0), (999, 10.0, 600.0)],
)
def test_a_node_with_other_members_dials_less_often(failures: int, alone: float, company: float) -> None:
    assert Timing().back_off(failures, alone=True) == alone
    assert Timing().back_off(failures, alone=False) == company


def test_a_bootstrap_peer_that_never_returns_costs_little(authority: Authority, log: Log) -> None:
    own, gone, other = (Identity.of(Ed25519PrivateKey.generate()) for _ in range(3))
    revoked: set[str] = set()
    members: list[Member] = []
    dials: list[float] = []

    async def dial(target: Target) -> bool:
        """Fail as on a network where the peer never answers."""
        await trio.lowlevel.checkpoint()
        dials.append(trio.current_time())
        raise PeerUnavailableError("no route")

    def dialled(begin: float, end: float) -> int:
        return sum(begin <= at < end for at in dials)

    async def main() -> None:
        bootstrap = Bootstrap(
            [f"/ip4/127.0.0.1/tcp/1/p2p/{gone.peer_id}"],
            Verifier(Credentials.issued(authority, own, "a"), revoked),
            lambda: tuple(members),
            dial,
            timing=Timing(),
            rng=random.Random(1),
        )
        members.append(Member(other.peer_id, "b", "site", ()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bootstrap.run)
            await trio.sleep(86400)
            assert dialled(0, 3600) < 20
            assert 130 < dialled(3600, 86400) < 160, "every ten minutes"
            assert log.having("cannot reach")
            assert not log.having("cannot reach", logging.WARNING)

            members.clear()
            await trio.sleep(600)
            assert dialled(86400 + 15, 87000) > 40, "a node alone looks for it at once, and soon again"
            assert len(log.having("cannot reach", logging.WARNING)) == 1

            revoked.add(gone.peer_id)
            before = len(dials)
            await trio.sleep(86400)
            assert len(dials) == before
            nursery.cancel_scope.cancel()

    run(main, trio.testing.MockClock(autojump_threshold=0))


def test_a_peer_that_is_forgotten_is_introduced_again(authority: Authority) -> None:
    async def main() -> None:
        a = Node(authority, "a")
        async with running(a) as nursery:
            b = Node(authority, "b", [a.address])
            await nursery.start(b.introducer.run)
            await b.wait_known(a)
            b.known.clear()
            await b.wait_introductions(2)

    run(main)


def test_another_peer_at_the_address_is_not_introduced(authority: Authority, log: Log) -> None:
    async def main() -> None:
        a = Node(authority, "a")
        async with running(a) as nursery:
            other = Identity.of(Ed25519PrivateKey.generate()).peer_id
            b = Node(authority, "b", [f"/ip4/127.0.0.1/tcp/{a.port}/p2p/{other}"])
            await nursery.start(b.introducer.run)
            await log.wait("does not correspond to the received pubkey")
            assert not b.introductions

    run(main)


async def wait_closed(stream: trio.SocketStream) -> None:
    """Wait until the other side closes. Earlier bytes are dropped."""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        return


GARBAGE = {
    "nothing": b"",
    "half a line": b"\x13/multistream",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("160301020001fc0303") + bytes(64),
    "zeros": bytes(4096),
    "a long length": b"\xff\xff\xff\xff\x7f" + bytes(1000),
    "a longer length": b"\xff" * 9 + b"\x01" + bytes(1000),
    "noise, then garbage": b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\x00\x20" + bytes(32),
    "not text": b"\x05\xff\xfe\xfd\xfc\n",
    "random": random.Random(7).randbytes(20000),
}


def test_garbage_on_the_port_does_no_harm(authority: Authority) -> None:
    async def main() -> None:
        a = Node(authority, "a")
        async with running(a) as nursery:
            for payload in GARBAGE.values():
                for abrupt in (False, True):
                    stream = await trio.open_tcp_stream("127.0.0.1", a.port)
                    if abrupt:
                        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    await stream.send_all(payload)
                    if not abrupt:
                        await stream.send_eof()
                        await wait_closed(stream)
                    await stream.aclose()
            b = Node(authority, "b", [a.address])
            await nursery.start(b.introducer.run)
            await b.wait_known(a)

    run(main)


def test_idle_connections_are_bounded_in_all_and_for_each_address_and_cut(authority: Authority) -> None:
    """S-43. The clock jumps to the deadline, which even a slow machine does not reach by itself."""
    clock = trio.testing.MockClock(rate=1.0)
    deadline_s = 10 * LIMIT_S

    async def main() -> None:
        a = Node(authority, "a", timing=Timing(deadline=deadline_s, linger=0.1))
        async with running(a, limit_s=deadline_s + LIMIT_S) as nursery:
            idle: list[trio.SocketStream] = []

            async def connect(source: str) -> trio.SocketStream:
                return await trio.open_tcp_stream("127.0.0.1", a.port, local_address=source)

            for source in ("127.0.0.2", "127.0.0.3"):
                mine = [await connect(source) for _ in range(libp2p.MAX_PER_ADDRESS)]
                for stream in mine:
                    assert await stream.receive_some(1) != b""
                idle += mine
                extra = await connect(source)
                assert await extra.receive_some(1) == b""
                if len(idle) < libp2p.MAX_INBOUND:  # another address still has places
                    async with await connect("127.0.0.4") as other:
                        assert await other.receive_some(1) != b""
            clock.jump(deadline_s)
            for stream in idle:
                await wait_closed(stream)
            b = Node(authority, "b", [a.address])
            await nursery.start(b.introducer.run)
            await b.wait_known(a)

    run(main, clock)


def test_the_bytes_that_a_connection_may_send_are_bounded(authority: Authority, log: Log) -> None:
    async def main() -> None:
        a = Node(authority, "a")
        async with running(a):
            stream = await trio.open_tcp_stream("127.0.0.1", a.port)
            await stream.send_all(b"\x13/multistream/1.0.0\n" + b"\xff\xff\xff\xff\x07")
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(bytes(64 * libp2p.MAX_RECEIVED))
            await log.wait("came to nothing")

    run(main)


Lie = Callable[[LibP2PLine, Credentials], Awaitable[None]]


async def say(line: LibP2PLine, credentials: Credentials, *members: Member) -> None:
    await line.send(introduction.encode_hello(credentials.certificate))
    await line.receive(introduction.MAX_HELLO)
    author = Author(credentials.identity.peer_id, credentials.identity.sign, lambda: credentials.certificate)
    await line.send(introduction.encode_members([author.state(member, 1) for member in members]))


async def oversize(line: LibP2PLine, _: Credentials) -> None:
    await line.send(introduction.PREFIX.pack(introduction.MAX_HELLO + 1))


async def no_msgpack(line: LibP2PLine, _: Credentials) -> None:
    await line.send(introduction.PREFIX.pack(4) + b"\xc1\xc1\xc1\xc1")


async def later_version(line: LibP2PLine, credentials: Credentials) -> None:
    body = introduction.encode_hello(credentials.certificate)[introduction.PREFIX.size :]
    await line.send(introduction.PREFIX.pack(len(body)) + body.replace(b"\x92\x02", b"\x92\x09", 1))


async def speaks_for_another(line: LibP2PLine, credentials: Credentials) -> None:
    other = Identity.of(Ed25519PrivateKey.generate()).peer_id
    await say(line, credentials, Member(other, "x", "s", ("127.0.0.1:1",)))


async def earlier_version(line: LibP2PLine, credentials: Credentials) -> None:
    body = introduction.encode_hello(credentials.certificate)[introduction.PREFIX.size :]
    await line.send(introduction.PREFIX.pack(len(body)) + body.replace(b"\x92\x02", b"\x92\x01", 1))


async def invents_a_member(line: LibP2PLine, credentials: Credentials) -> None:
    """The invented member has a key and a statement of its own, but no certificate of the cluster."""
    invented = Member(Identity.of(Ed25519PrivateKey.generate()).peer_id, "y", "s", ())
    await say(line, credentials, Member(credentials.identity.peer_id, "x", "s", ()), invented)


async def false_name(line: LibP2PLine, credentials: Credentials) -> None:
    await say(line, credentials, Member(line.peer, "x", "s", ()), Member(PeerId("no key"), "y", "s", ()))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (oversize, "message of"),
        (no_msgpack, "cannot be decoded"),
        (later_version, "speaks version 9 of the introduction, this node speaks 2: upgrade this node"),
        (earlier_version, "speaks version 1 of the introduction, this node speaks 2: upgrade it"),
        (invents_a_member, "did not sign"),
        (speaks_for_another, "introduces itself as"),
        (false_name, "false id"),
    ],
)
def test_a_liar_in_an_introduction_is_refused(authority: Authority, log: Log, lie: Lie, reason: str) -> None:
    """S-30"""

    async def main() -> None:
        a = Node(authority, "a")
        async with running(a):
            credentials = Credentials.issued(authority, Identity.of(Ed25519PrivateKey.generate()), "liar")
            await talk(a, credentials, lie)
            await log.wait(reason)
            (warning,) = log.having(f"refused {credentials.identity.peer_id}", logging.WARNING)
            assert reason in warning.getMessage()
            assert not a.introductions

    run(main)


async def talk(to: Node, credentials: Credentials, words: Lie) -> None:
    upgrader = libp2p.upgrader_of(credentials.identity)
    stream = await trio.open_tcp_stream("127.0.0.1", to.port)
    async with stream, libp2p.secured_line(upgrader, stream, to.me.peer_id) as (line, _):
        await words(line, credentials)
        await line.wait_closed()


def test_a_stolen_certificate_is_refused(authority: Authority, stranger: Authority, log: Log) -> None:
    """S-66"""

    async def main() -> None:
        a = Node(authority, "a")
        victim = Credentials.issued(authority, Identity.of(Ed25519PrivateKey.generate()), "victim")
        thief = Credentials.issued(stranger, Identity.of(Ed25519PrivateKey.generate()), "thief")

        async def borrow(line: LibP2PLine, _: Credentials) -> None:
            await line.send(introduction.encode_hello(victim.certificate))

        async with running(a):
            await talk(a, thief, borrow)
            await log.wait(f"shows the certificate of {victim.identity.peer_id}")
            assert not a.introductions

    run(main)


def test_a_stranger_learns_nothing_about_members(authority: Authority, stranger: Authority) -> None:
    """S-23"""

    async def main() -> None:
        a = Node(authority, "a")
        outsider = Credentials.issued(stranger, Identity.of(Ed25519PrivateKey.generate()), "outsider")

        async def listen(line: LibP2PLine, credentials: Credentials) -> None:
            me = Member(line.peer, "x", "s", ())
            await say(line, credentials, me)
            with pytest.raises(PeerUnavailableError):
                await line.receive(introduction.MAX_MEMBERS_BYTES)

        async with running(a):
            await talk(a, outsider, listen)

    run(main)


def test_a_silent_peer_costs_one_deadline(authority: Authority, log: Log) -> None:
    async def main() -> None:
        server = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = server[0].socket.getsockname()[1]

        async def silent(_: trio.SocketStream) -> None:
            await trio.sleep_forever()

        other = Identity.of(Ed25519PrivateKey.generate()).peer_id
        timing = Timing(deadline=0.2, first_retry=0.01, last_retry=0.01)
        b = Node(authority, "b", [f"/ip4/127.0.0.1/tcp/{port}/p2p/{other}"], timing=timing)
        async with running(b) as nursery:
            nursery.start_soon(partial(trio.serve_listeners, silent, server))
            await log.wait("no introduction within 0.2 s", 2)

    run(main)


def test_a_port_that_is_taken_is_named(authority: Authority) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
            with pytest.raises(BadInputError, match="cannot listen on 127"):
                await Node(authority, "a", listen=listen).introducer.run()

    run(main)


@pytest.mark.parametrize("wrong", ["", "10.0.0.1:4501", "/ip4/10.0.0.1/tcp/4501", "/ip4/10.0.0.1/tcp/4501/p2p/Qm1"])
def test_malformed_bootstrap_addresses_are_named_at_once(authority: Authority, wrong: str) -> None:
    with pytest.raises(BadInputError, match=f'"{wrong}"'):
        Node(authority, "a", [wrong])


def multicast_works_on_loopback() -> str:
    """The reason why it does not, or "". The test is a datagram to mDNS's group, on another port, that must return."""
    group, loopback = socket.inet_aton("224.0.0.251"), socket.inet_aton("127.0.0.1")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.bind(("", 0))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + loopback)
            receiver.settimeout(1)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
            sender.sendto(b"probe", ("224.0.0.251", receiver.getsockname()[1]))
            receiver.recv(16)
        except OSError as error:
            return f"no multicast on the loopback interface: {error}"
    return ""


def test_mdns_introduces_nodes_of_one_cluster_only(authority: Authority, stranger: Authority) -> None:
    why_not = multicast_works_on_loopback()
    if why_not:
        pytest.skip(why_not)

    async def main() -> None:
        a, b = (Node(authority, name, multicast=True) for name in "ab")
        c = Node(stranger, "c", multicast=True)
        async with running(c, a, b):
            await a.wait_known(b)
            await b.wait_known(a)
        assert not c.introductions
        assert a.known.keys() == {b.me.peer_id}

    run(main)


def test_mdns_reports_peers_that_leave(authority: Authority) -> None:
    why_not = multicast_works_on_loopback()
    if why_not:
        pytest.skip(why_not)

    async def main() -> None:
        own, leaver = (Identity.of(Ed25519PrivateKey.generate()).peer_id for _ in range(2))
        report, reports = trio.open_memory_channel[tuple[Target, ...] | PeerId](16)
        async with trio.open_nursery() as nursery:
            mine = mdns.Announcement(own, "c", ("127.0.0.1",), 4001)
            nursery.start_soon(mdns.run, mine, report.send_nowait, report.send_nowait)
            with trio.CancelScope() as other, trio.fail_after(LIMIT_S):
                async with trio.open_nursery() as inner:
                    theirs = mdns.Announcement(leaver, "c", ("127.0.0.1",), 4002)
                    inner.start_soon(mdns.run, theirs, lambda _: None, lambda _: None)
                    assert await reports.receive() == (Target(leaver, "127.0.0.1", 4002),)
                    other.cancel()
            with trio.fail_after(LIMIT_S):
                assert await reports.receive() == leaver
            nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.parametrize("host", ["203.0.113.9", "::1"])
def test_mdns_that_cannot_work_costs_one_warning(log: Log, host: str) -> None:
    async def main() -> None:
        peer = Identity.of(Ed25519PrivateKey.generate()).peer_id
        with trio.fail_after(LIMIT_S):
            await mdns.run(mdns.Announcement(peer, "c", (host,), 4001), lambda _: None, lambda _: None)

    run(main)
    assert len(log.having("mDNS does not work here", logging.WARNING)) == 1


def test_the_daemon_loads_no_more_of_libp2p_than_it_uses() -> None:
    script = "import sys, node.daemon; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "libp2p.security.noise.transport" in loaded
    assert not {"libp2p.host", "libp2p.kad_dht", "libp2p.relay", "requests", "dns.resolver"} & set(loaded)
    assert not {"aioquic", "Crypto", "coincurve", "libp2p.network.auto_connector"} & set(loaded)


@pytest.mark.parametrize("kind", [0, 2], ids=["RSA", "secp256k1"])
def test_a_key_of_another_kind_is_refused(kind: int) -> None:
    from libp2p.crypto.serialization import deserialize_public_key

    with pytest.raises(ValueError, match="no member has a key of this kind"):
        deserialize_public_key(bytes([0x08, kind, 0x12, 1, 0]))
