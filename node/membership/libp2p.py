"""Introductions and joins over libp2p: TCP, Noise, yamux. The only file that imports libp2p. docs/PROTOCOL.md,
"Introduction".

Only parts of libp2p's transport are used (multistream, Noise, yamux, peer ids), not its Host and Swarm. In these, an
exception in one peer's task ends the whole service; a closed connection keeps its task and its place among the inbound
connections forever; a peer that could not be dialled is not dialled again for a minute; and identify runs in trio's
system tasks, where an error ends the process. Here a connection lasts for one introduction, with one deadline and one
budget of bytes, and any exception of libp2p ends only that connection.
"""

from __future__ import annotations

import node.membership.libp2p_imports  # noqa: F401 # before libp2p: see there

# isort: split
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from random import Random

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from libp2p.transport.upgrader import TransportUpgrader

from node.config.quantities import HostPort
from node.identity.credentials import Joined
from node.identity.identity import Identity
from node.identity.registrar import Line, apply
from node.identity.verifier import Verifier
from node.membership import mdns
from node.membership.addresses import Target, concrete_hosts, parse_join, parse_listen, to_multiaddr
from node.membership.bootstrap import Bootstrap, Timing
from node.membership.introduction import CHANNEL, Current, Introduced, exchange_members
from node.membership.passports import Passports
from protocol import errors
from protocol.ids import PeerId
from protocol.introduction import PREFIX, body_length, encode_members
from protocol.members import Statement, Vouched

log = logging.getLogger(__name__)
# libp2p's own log lines are dropped: this module logs the same events, with the peer's id.
logging.getLogger("libp2p").addHandler(logging.NullHandler())
logging.getLogger("libp2p").propagate = False

PROTOCOL = TProtocol("/shoal/introduce/1")
JOIN = TProtocol("/shoal/join/1")
MAX_INBOUND = 32
"""Most inbound connections at a time. Further connections are closed immediately, and their nodes try again."""
MAX_PER_ADDRESS = 16
"""Most inbound connections from one address at a time: a single address must not keep new nodes out."""
MAX_RECEIVED = 1 << 20
"""Most bytes received on one connection. An introduction is below 0.3 MiB, handshakes and framing included."""
_READ = 1 << 16

Joins = Callable[[Line, str, PeerId], Awaitable[None]]
"""Serves one join, given the line, the host at its other end, and this node's peer id. Raises as `Registrar.serve`."""


class LibP2PIntroducer:
    """Finds peers (bootstrap addresses, mDNS), verifies that both sides belong to one cluster, and introduces them.

    Each introduction, in either direction, ends with one call of `introduced` with the statements that the other side
    showed (its own first), all checked. `named` returns those that this node shows. A node of another cluster is never
    introduced. The refusal is logged with peer id and reason.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        joins: Joins,
        listen: str,
        bootstrap: Sequence[str],
        mdns: bool,
        introduced: Introduced,
        current: Current,
        named: Callable[[], Sequence[Vouched]],
        passports: Passports,
        timing: Timing | None = None,
        rng: Random | None = None,
    ) -> None:
        """`listen` and `bootstrap` are multiaddrs; raises BadInputError for a malformed one."""
        self._verifier = verifier
        self._members = lambda: encode_members(named())
        self._passports = passports
        self._joins = joins
        self._listen = parse_listen(listen)
        self._hosts = concrete_hosts(self._listen.host)
        self._port = self._listen.port
        self._with_mdns = mdns
        self._introduced = introduced
        self._timing = timing = timing or Timing()
        self._upgrader = upgrader_of(verifier.credentials.identity)
        self.bootstrap = Bootstrap(bootstrap, verifier, current, self._dial, timing=timing, rng=rng or Random())
        self._inbound = trio.CapacityLimiter(MAX_INBOUND)
        self._inbound_by_host: Counter[str] = Counter()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The multiaddrs that others can use. Final once `run` has started: the kernel then has replaced a port 0."""
        return tuple(to_multiaddr(host, self._port, self._own_id) for host in self._hosts)

    @property
    def _own_id(self) -> PeerId:
        return self._verifier.credentials.identity.peer_id

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Raises BadInputError if it cannot listen."""
        try:
            listeners = await trio.open_tcp_listeners(self._listen.port, host=self._listen.host)
        except OSError as error:
            raise errors.BadInputError(f"peers.listen: cannot listen on {self._listen}: {error}") from error
        self._port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._answer, listeners)
            nursery.start_soon(self.bootstrap.run)
            if self._with_mdns:
                tag = mdns.cluster_tag(self._verifier.credentials.authority)
                own = mdns.Announcement(self._own_id, tag, self._hosts, self._port)
                nursery.start_soon(self.bootstrap.discover, own)
            task_status.started()

    async def _dial(self, target: Target) -> bool:
        with _deadline(self._timing.deadline):
            async with await _connect(target.host, target.port) as stream:
                return await self._introduce(stream, target.peer)

    async def _answer(self, stream: trio.SocketStream) -> None:
        try:
            with self._place_for(_remote(stream).host), _deadline(self._timing.deadline):
                await self._introduce(stream, None)
        except trio.WouldBlock:
            log.debug("an inbound connection is closed: too many are open")
        except errors.PeerUnavailableError as error:
            log.debug("a connection came to nothing: %s", error)
        finally:
            await trio.aclose_forcefully(stream)

    @contextmanager
    def _place_for(self, host: str) -> Iterator[None]:
        """Count an inbound connection. Raises trio.WouldBlock if there are too many already."""
        if self._inbound_by_host[host] >= MAX_PER_ADDRESS:
            raise trio.WouldBlock
        self._inbound.acquire_nowait()
        self._inbound_by_host[host] += 1
        try:
            yield
        finally:
            self._inbound.release()
            self._inbound_by_host[host] -= 1
            if not self._inbound_by_host[host]:
                del self._inbound_by_host[host]

    async def _introduce(self, stream: trio.SocketStream, expected: PeerId | None) -> bool:
        """Whether the peer was introduced; False if either side refuses the other, and after a join.

        `expected` is the peer that this node dialled, None if the peer dialled. Raises PeerUnavailableError.
        """
        remote = _remote(stream)
        async with secured_line(self._upgrader, stream, expected) as (line, protocol):
            try:
                if protocol == JOIN:
                    await self._joins(line, remote.host, self._own_id)
                    await self._linger(line)
                    return False
                with self.bootstrap.introducing(line.peer):
                    statements = await self._exchange(line, dialled=expected is not None)
                    vouched = await self._passports.check_all(statements)
                    if not vouched or vouched[0].peer_id != line.peer:
                        raise errors.NotAdmittedError("shows no valid statement of its own", line.peer)
            except errors.PeerMisbehavedError as error:
                self.bootstrap.refusals.tell("join" if protocol == JOIN else CHANNEL, line.peer, str(remote), error)
                return False
        peer = f"{vouched[0].member.name} ({line.peer}) at {remote}"
        log.info("introduced to %s, which named %d others", peer, len(vouched) - 1)
        self._introduced(vouched, remote.host)
        return True

    async def _exchange(self, line: LibP2PLine, *, dialled: bool) -> tuple[Statement, ...]:
        try:
            return await exchange_members(line, self._verifier, self._members, dialled=dialled)
        finally:
            if not dialled:
                await self._linger(line)

    async def _linger(self, line: LibP2PLine) -> None:
        with trio.move_on_after(self._timing.linger):
            await line.wait_closed()


class LibP2PLine:
    """A libp2p stream to a peer that Noise authenticated; carries prefixed messages. Raises PeerUnavailableError."""

    def __init__(self, peer: PeerId, stream: YamuxStream) -> None:
        self.peer = peer
        self._stream = stream

    async def send(self, message: bytes) -> None:
        with _translated():
            await self._stream.write(message)

    async def receive(self, most: int) -> bytes:
        """The body of one message. Raises PeerMisbehavedError if its announced length is above `most` bytes."""
        prefix = await self._receive_exactly(PREFIX.size)
        return await self._receive_exactly(body_length(prefix, most))

    async def wait_closed(self) -> None:
        """Wait until the peer closes its end; bytes that it still sends are dropped."""
        try:
            while True:
                await self._receive_exactly(1)
        except errors.PeerUnavailableError:
            return

    async def _receive_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            with _translated():
                chunk = await self._stream.read(size - len(data))
            if not chunk:
                raise errors.PeerUnavailableError("closed in the middle of an introduction")
            data += chunk
        return bytes(data)


class _BoundedTcp(TrioTCPStream):
    """Bounds each read and the total: libp2p itself reads as many bytes as the peer announces, in any number."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self._left = MAX_RECEIVED

    async def read(self, n: int | None = None) -> bytes:
        data = await super().read(_READ if n is None else min(n, _READ))
        self._left -= len(data)
        if self._left < 0:
            raise errors.PeerMisbehavedError(f"sent more than {MAX_RECEIVED} bytes for one introduction")
        return data


def upgrader_of(identity: Identity) -> TransportUpgrader:
    """Noise and yamux only: no plaintext, no secio, no mplex."""
    keys = create_new_key_pair(identity.private_key.private_bytes_raw())
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return TransportUpgrader({NOISE: noise}, {TProtocol(YAMUX): Yamux})


async def join(identity: Identity, token: str, address: str, name: str) -> Joined:
    """The network part of `p2pctl join`: ask the member at `address` for a certificate, within `Timing().deadline`.

    Raises BadInputError for a malformed token or address, UnavailableError if the join fails.
    """
    where, expected = parse_join(address)
    try:
        with _deadline(Timing().deadline):
            tcp = await _connect(where.host, where.port)
            async with tcp, secured_line(upgrader_of(identity), tcp, expected, JOIN) as (line, _):
                certificate, authority = await apply(line, identity.peer_id, token, name)
    except errors.PeerUnavailableError as error:
        text = f"no answer from {address}: {error}; is p2pd running there, and is this its peers.listen?"
        raise errors.UnavailableError(text) from error
    except errors.NotAdmittedError as error:
        raise errors.UnavailableError(f"refused at {address}: {error}") from error
    except errors.PeerMisbehavedError as error:
        raise errors.UnavailableError(f"the answer from {address} is not understood: {error}") from error
    back = to_multiaddr(where.host, where.port, line.peer)
    return Joined(certificate=certificate, authority=authority, bootstrap=(back,))


@asynccontextmanager
async def secured_line(
    upgrader: TransportUpgrader, tcp: trio.SocketStream, expected: PeerId | None, wanted: TProtocol | None = None
) -> AsyncIterator[tuple[LibP2PLine, TProtocol]]:
    """Secure and multiplex `tcp`, then open or accept its only stream. Yields the line and the stream's protocol.

    The dialling side opens the stream. It passes the peer that it expects, or the protocol that it wants with any peer.
    Raises PeerUnavailableError.
    """
    failure: errors.ShoalError | None = None
    dialled = wanted or (PROTOCOL if expected is not None else None)
    async with trio.open_nursery() as nursery:
        try:
            with _translated():
                connection = await _upgrade(upgrader, tcp, expected, dialled=dialled is not None)
            nursery.start_soon(_pump, connection)
            with _translated():
                stream, protocol = await _negotiate(connection, dialled)
            yield LibP2PLine(PeerId(connection.peer_id.to_base58()), stream), protocol
        except errors.ShoalError as error:
            failure = error  # raised below: here the nursery would wrap it in a group
        nursery.cancel_scope.cancel()
    if failure:
        raise failure


async def _upgrade(
    upgrader: TransportUpgrader, tcp: trio.SocketStream, expected: PeerId | None, *, dialled: bool
) -> Yamux:
    raw = RawConnection(_BoundedTcp(tcp), dialled)
    if dialled and expected is None:
        # libp2p's own upgrade requires a peer id, its Noise does not. The handshake proves the peer's id in any case.
        secured = await upgrader.security_multistream.secure_outbound(raw, None)  # type: ignore[arg-type]
    else:
        secured = await upgrader.upgrade_security(raw, dialled, ID.from_base58(expected) if expected else None)
    connection = await upgrader.upgrade_connection(secured, secured.get_remote_peer())
    assert isinstance(connection, Yamux)  # the only muxer offered
    return connection


async def _negotiate(connection: Yamux, dialled: TProtocol | None) -> tuple[YamuxStream, TProtocol]:
    await connection.event_started.wait()
    if dialled:
        stream = await connection.open_stream()
        await MultiselectClient().select_one_of([dialled], MultiselectCommunicator(stream))
        return stream, dialled
    accepted = await connection.accept_stream()
    assert isinstance(accepted, YamuxStream)
    protocol, _ = await Multiselect({PROTOCOL: None, JOIN: None}).negotiate(MultiselectCommunicator(accepted))
    assert protocol is not None  # it is PROTOCOL or JOIN
    return accepted, protocol


async def _pump(connection: Yamux) -> None:
    """Run yamux's own tasks; their end shows in the stream."""
    try:
        with _translated():
            await connection.start()
    except errors.PeerUnavailableError as error:
        log.debug("yamux with %s ended: %s", connection.peer_id, error)


async def _connect(host: str, port: int) -> trio.SocketStream:
    """trio resolves DNS names and races their addresses (RFC 8305)."""
    try:
        return await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise errors.PeerUnavailableError(str(error)) from error


def _remote(stream: trio.SocketStream) -> HostPort:
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError as error:
        raise errors.PeerUnavailableError("closed before it was introduced") from error
    return HostPort(host, port)


@contextmanager
def _translated() -> Iterator[None]:
    """libp2p does not document its exceptions for unexpected bytes: any Exception is possible, and groups of them."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:  # the outermost error names only the failed step, the innermost its cause
            cause = cause.__cause__
        raise errors.PeerUnavailableError(f"{type(cause).__name__}: {cause}") from error


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise errors.PeerUnavailableError(f"no introduction within {seconds:g} s") from error
