"""Introductions and joins over libp2p: TCP, Noise, yamux. The only file that imports libp2p. docs/PROTOCOL.md,
"Introduction".

Of libp2p the transport's parts are used (multistream, Noise, yamux, peer ids), not its Host and Swarm: there one
exception in one peer's task ends the whole service, a connection that was closed keeps its task and its place among
the inbound ones for ever, a peer that could not be dialled is not dialled again for a minute, and identify runs in
trio's system tasks, where an error ends the process. Here a connection lives for one introduction, under one
deadline and one budget of bytes, and whatever libp2p raises ends that connection alone.
"""

from __future__ import annotations

import node.membership.libp2p_imports  # noqa: F401 # before libp2p: see there

# isort: split
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial

import trio
from cachetools import TTLCache
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
from node.identity.identity import Identity
from node.identity.registrar import Line
from node.identity.verifier import REVOKED, Admission
from node.membership import mdns
from node.membership.addresses import Target, concrete_hosts, parse_listen, parse_target, to_multiaddr, with_observed
from node.membership.introduction import Current, Introduced
from node.runtime.refusals import Refusals
from protocol import introduction
from protocol.errors import BadInputError, PeerMisbehavedError, PeerUnavailableError, ShoalError
from protocol.ids import PeerId
from protocol.members import Member

log = logging.getLogger(__name__)
# What matters of libp2p's warnings is said here, with the peer.
logging.getLogger("libp2p").addHandler(logging.NullHandler())
logging.getLogger("libp2p").propagate = False

PROTOCOL = TProtocol("/shoal/introduce/1")
JOIN = TProtocol("/shoal/join/1")
CHANNEL = "introduction"
"""What refusals in the log call it."""
MAX_INBOUND = 32
"""Connections that are being introduced at once; more are closed at once, and their nodes come again."""
MAX_PER_ADDRESS = 16
"""Of those: who has but one address keeps no new node out."""
MAX_DIALS = 8
MAX_DISCOVERED = 256
"""Peers that mDNS may make this node dial: anyone on the LAN can announce any number."""
MAX_RECEIVED = 3 << 20
"""Bytes of one connection: a whole introduction is below 1.1 MiB, handshakes and framing included."""
DEADLINE_S = 10.0
"""For one introduction or join from its connect to its end."""
_READ = 1 << 16
_RATE_LIMITED = 1024
"""Peers and addresses whose last warning is remembered."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. Retries are spread by +-25 %, so that a site that comes up together does not dial in step."""

    deadline: float = DEADLINE_S
    first_retry: float = 0.5
    last_retry: float = 10.0
    """Of a node that has no other member."""
    longest_retry: float = 600.0
    """Of one that has: who comes back is told of by them, or finds them by what it remembers."""
    recheck: float = 6.5
    """How often a peer is looked for among the current members, whether it was introduced or is waited for."""
    linger: float = 1.0
    """How long the side that speaks last waits for the other to have read it."""
    silence: float = 300.0
    """The same warning about the same peer is not repeated within this."""

    def back_off(self, failures: int, *, alone: bool) -> float:
        """From one failed dial to the next, after so many earlier ones; `alone`: the node has no other member."""
        return min(self.last_retry if alone else self.longest_retry, self.first_retry * 2.0 ** min(failures, 16))


@dataclass(frozen=True, slots=True)
class _Discovered:
    ways: tuple[Target, ...]
    scope: trio.CancelScope


Joins = Callable[[Line, str, PeerId], Awaitable[None]]
"""Serves one join: the line, the host at its other end, this node's peer id. Raises as `Registrar.serve`."""


class LibP2PSwarm:
    """See node.swarm.Swarm. `addresses` are known for certain once `run` has started (a port 0 is chosen then)."""

    def __init__(
        self,
        admission: Admission,
        me: Callable[[], Member],
        *,
        joins: Joins,
        listen: str,
        bootstrap: Sequence[str],
        mdns: bool,
        introduced: Introduced,
        current: Current,
        timing: Timing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`listen` and `bootstrap` are multiaddrs; raises BadInputError for one that is malformed."""
        self._admission = admission
        self._me = me
        self._joins = joins
        self._listen = parse_listen(listen)
        self._hosts = concrete_hosts(self._listen.host)
        self._port = self._listen.port
        self._bootstrap = self._seeds(bootstrap)
        self._changed = trio.Event()
        self._with_mdns = mdns
        self._introduced = introduced
        self._current = current
        self._timing = timing or Timing()
        self._rng = rng or random.Random()
        self._upgrader = _upgrader(admission.identity)
        self._refusals = Refusals(self._timing.silence)
        self._inbound = trio.CapacityLimiter(MAX_INBOUND)
        self._dials = trio.CapacityLimiter(MAX_DIALS)
        self._hosts_in: Counter[str] = Counter()
        self._busy: set[PeerId] = set()
        self._discovered: dict[PeerId, _Discovered] = {}
        self._logged: TTLCache[str, None] = TTLCache(_RATE_LIMITED, self._timing.silence, timer=trio.current_time)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(to_multiaddr(host, self._port, self._own_id) for host in self._hosts)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Raises BadInputError where it cannot listen."""
        listeners = await self._open_listeners()
        self._port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._answer, listeners)
            nursery.start_soon(self._keep_bootstrapped)
            if self._with_mdns:
                nursery.start_soon(self._discover, nursery)
            task_status.started()

    def prepared(self, bootstrap: Sequence[str]) -> Callable[[], None]:
        """What dials these from now on, and no others. Raises BadInputError."""
        seeds = self._seeds(bootstrap)

        def change() -> None:
            if seeds != self._bootstrap:
                self._bootstrap = seeds
                self._changed.set()

        return change

    def _seeds(self, bootstrap: Sequence[str]) -> list[Target]:
        return [target for target in map(parse_target, bootstrap) if target.peer != self._own_id]

    @property
    def _own_id(self) -> PeerId:
        return self._admission.identity.peer_id

    async def _open_listeners(self) -> list[trio.SocketListener]:
        try:
            return await trio.open_tcp_listeners(self._listen.port, host=self._listen.host)
        except OSError as error:
            raise BadInputError(f"peers.listen: cannot listen on {self._listen}: {error}") from error

    # Whom to dial, and when.

    async def _keep_bootstrapped(self) -> None:
        while True:
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                for target in self._bootstrap:
                    nursery.start_soon(self._keep_introduced, (target,), logging.WARNING)
                await self._changed.wait()
                nursery.cancel_scope.cancel()

    async def _keep_introduced(self, ways: Sequence[Target], level: int) -> None:
        """Dial one peer, by its ways in turn, whenever it is not among the current members, until it is revoked.

        Failures are logged at `level` where there is no other member, at level debug where there is.
        """
        peer, failures = ways[0].peer, 0
        while not self._admission.is_revoked(peer):
            told = level if self._is_alone() else logging.DEBUG
            if self._is_current(peer) or await self._dial(ways[failures % len(ways)], told):
                failures = 0
                await trio.sleep(self._spread(self._timing.recheck))
            else:
                await self._rest(peer, failures)
                failures += 1
        self._refusals.tell(CHANNEL, peer, str(HostPort(ways[0].host, ways[0].port)), REVOKED)

    async def _rest(self, peer: PeerId, failures: int) -> None:
        """Until the next dial, or the peer came by itself. Who else is there may change meanwhile."""
        rested = 0.0
        while not self._is_current(peer):
            left = self._timing.back_off(failures, alone=self._is_alone()) - rested
            if left <= 0:
                return
            step = min(left, self._timing.recheck)
            await trio.sleep(self._spread(step))
            rested += step

    def _is_alone(self) -> bool:
        return not any(member.peer_id != self._own_id for member in self._current())

    def _is_current(self, peer: PeerId) -> bool:
        return any(member.peer_id == peer for member in self._current())

    def _spread(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.75, 1.25)

    async def _dial(self, target: Target, level: int) -> bool:
        """Whether the peer was introduced; a failure is logged at `level`, once in a while."""
        if target.peer in self._busy:
            return False
        async with self._dials:
            try:
                with self._occupied(target.peer), _deadline(self._timing.deadline):
                    async with await _connect(target.host, target.port) as stream:
                        return await self._introduce(stream, target.peer)
            except PeerUnavailableError as error:
                self._log_rarely(level, str(target), f"cannot reach {target}, which is tried again: {error}")
                return False

    async def _discover(self, nursery: trio.Nursery) -> None:
        tag = mdns.cluster_tag(self._admission.authority)
        mine = mdns.Announcement(self._own_id, tag, self._hosts, self._port)
        await mdns.run(mine, partial(self._found, nursery), self._lost)

    def _found(self, nursery: trio.Nursery, ways: tuple[Target, ...]) -> None:
        peer = ways[0].peer
        known = self._discovered.get(peer)
        if known and known.ways == ways:
            return
        self._lost(peer)
        if len(self._discovered) < MAX_DISCOVERED:
            self._discovered[peer] = _Discovered(ways, trio.CancelScope())
            nursery.start_soon(self._keep_discovered, self._discovered[peer])

    def _lost(self, peer: PeerId) -> None:
        known = self._discovered.pop(peer, None)
        if known:
            known.scope.cancel()

    async def _keep_discovered(self, found: _Discovered) -> None:
        """Starts at a random moment: all nodes of a site hear of a new one at once."""
        with found.scope:
            await trio.sleep(self._rng.uniform(0, self._timing.first_retry))
            await self._keep_introduced(found.ways, logging.DEBUG)

    # One connection.

    async def _answer(self, stream: trio.SocketStream) -> None:
        try:
            with self._place_for(_remote(stream).host), _deadline(self._timing.deadline):
                await self._introduce(stream, None)
        except trio.WouldBlock:
            log.debug("a connection found no place")
        except PeerUnavailableError as error:
            log.debug("a connection came to nothing: %s", error)
        finally:
            await trio.aclose_forcefully(stream)

    @contextmanager
    def _place_for(self, host: str) -> Iterator[None]:
        """Raises trio.WouldBlock where there is none."""
        if self._hosts_in[host] >= MAX_PER_ADDRESS:
            raise trio.WouldBlock
        self._inbound.acquire_nowait()
        self._hosts_in[host] += 1
        try:
            yield
        finally:
            self._inbound.release()
            self._hosts_in[host] -= 1
            if not self._hosts_in[host]:
                del self._hosts_in[host]

    async def _introduce(self, stream: trio.SocketStream, expected: PeerId | None) -> bool:
        """False where either is refused. `expected` is whom this node dialled. Raises PeerUnavailableError."""
        remote = _remote(stream)
        async with _libp2p_stream(self._upgrader, stream, expected) as (line, protocol):
            try:
                if protocol == JOIN:
                    await self._serve_join(line, remote.host)
                    return False
                with self._occupied(line.peer):
                    members = await self._exchange(line, first=expected is not None)
            except PeerMisbehavedError as error:
                self._refusals.tell("join" if protocol == JOIN else CHANNEL, line.peer, str(remote), error)
                return False
        log.info(
            "introduced to %s (%s) at %s, who named %d others", members[0].name, line.peer, remote, len(members) - 1
        )
        self._introduced((with_observed(members[0], remote.host), *members[1:]))
        return True

    async def _serve_join(self, line: _Line, host: str) -> None:
        await self._joins(line, host, self._own_id)
        with trio.move_on_after(self._timing.linger):
            await line.wait_closed()

    async def _exchange(self, line: _Line, *, first: bool) -> tuple[Member, ...]:
        """Raises PeerMisbehavedError for a peer of another cluster, before anything was said about members."""
        if first:
            await line.send(introduction.encode_hello(self._admission.certificate))
            self._verify(line.peer, await line.receive(introduction.MAX_HELLO))
            await line.send(self._members())
            return introduction.decode_members(await line.receive(introduction.MAX_MEMBERS_BYTES), line.peer)
        try:
            hello = await line.receive(introduction.MAX_HELLO)
            await line.send(introduction.encode_hello(self._admission.certificate))
            self._verify(line.peer, hello)
            members = introduction.decode_members(await line.receive(introduction.MAX_MEMBERS_BYTES), line.peer)
            await line.send(self._members())
            return members
        finally:
            with trio.move_on_after(self._timing.linger):
                await line.wait_closed()

    def _verify(self, peer: PeerId, hello: bytes) -> None:
        named = self._admission.verify(introduction.decode_hello(hello))
        if named != peer:
            raise PeerMisbehavedError(f"shows the certificate of {named}")

    def _members(self) -> bytes:
        return introduction.encode_members(self._me(), self._current())

    @contextmanager
    def _occupied(self, peer: PeerId) -> Iterator[None]:
        self._busy.add(peer)
        try:
            yield
        finally:
            self._busy.discard(peer)

    def _log_rarely(self, level: int, subject: str, text: str) -> None:
        log.log(logging.DEBUG if subject in self._logged else level, text)
        if level > logging.DEBUG:
            self._logged[subject] = None


class _Line:
    """A libp2p stream to a peer that Noise authenticated; carries prefixed messages. Raises PeerUnavailableError."""

    def __init__(self, peer: PeerId, stream: YamuxStream) -> None:
        self.peer = peer
        self._stream = stream

    async def send(self, message: bytes) -> None:
        with _translated():
            await self._stream.write(message)

    async def receive(self, most: int) -> bytes:
        """The body of one message. Raises PeerMisbehavedError above `most` bytes, before they are received."""
        prefix = await self._receive_exactly(introduction.PREFIX.size)
        return await self._receive_exactly(introduction.body_length(prefix, most))

    async def wait_closed(self) -> None:
        """Until the peer closes its end; what it still says is dropped."""
        try:
            while True:
                await self._receive_exactly(1)
        except PeerUnavailableError:
            return

    async def _receive_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            with _translated():
                chunk = await self._stream.read(size - len(data))
            if not chunk:
                raise PeerUnavailableError("closed in the middle of an introduction")
            data += chunk
        return bytes(data)


class _BoundedTcp(TrioTCPStream):
    """libp2p reads as much at once, and as often, as a length that the peer sent makes it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self._left = MAX_RECEIVED

    async def read(self, n: int | None = None) -> bytes:
        data = await super().read(_READ if n is None else min(n, _READ))
        self._left -= len(data)
        if self._left < 0:
            raise PeerMisbehavedError(f"sent more than {MAX_RECEIVED} bytes for one introduction")
        return data


def _upgrader(identity: Identity) -> TransportUpgrader:
    """Noise and yamux only: no plaintext, no secio, no mplex."""
    keys = create_new_key_pair(identity.private_key.private_bytes_raw())
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return TransportUpgrader({NOISE: noise}, {TProtocol(YAMUX): Yamux})


@asynccontextmanager
async def join_line(identity: Identity, host: str, port: int, expected: PeerId | None) -> AsyncIterator[Line]:
    """A line to the member there, whoever it is where none is expected, for a join; the deadline is `DEADLINE_S`.

    Raises PeerUnavailableError.
    """
    with _deadline(DEADLINE_S):
        tcp = await _connect(host, port)
        async with tcp, _libp2p_stream(_upgrader(identity), tcp, expected, JOIN) as (line, _):
            yield line


@asynccontextmanager
async def _libp2p_stream(
    upgrader: TransportUpgrader, tcp: trio.SocketStream, expected: PeerId | None, wanted: TProtocol | None = None
) -> AsyncIterator[tuple[_Line, TProtocol]]:
    """Secure and multiplex `tcp`, and open or accept the one stream, and for which protocol it is.

    It is opened where this side dialled: with the peer `expected`, or with anybody for the protocol `wanted`. Raises
    PeerUnavailableError.
    """
    failure: ShoalError | None = None
    dialled = wanted or (PROTOCOL if expected is not None else None)
    async with trio.open_nursery() as nursery:
        try:
            with _translated():
                connection = await _upgrade(upgrader, tcp, expected, dialled=dialled is not None)
            nursery.start_soon(_pump, connection)
            with _translated():
                stream, protocol = await _negotiate(connection, dialled)
            yield _Line(PeerId(connection.peer_id.to_base58()), stream), protocol
        except ShoalError as error:
            failure = error  # raised in here, the nursery would wrap it in a group
        nursery.cancel_scope.cancel()
    if failure:
        raise failure


async def _upgrade(
    upgrader: TransportUpgrader, tcp: trio.SocketStream, expected: PeerId | None, *, dialled: bool
) -> Yamux:
    raw = RawConnection(_BoundedTcp(tcp), dialled)
    if dialled and expected is None:
        # libp2p's own upgrade insists on a peer id, its Noise does not: who it is, is proven all the same.
        secured = await upgrader.security_multistream.secure_outbound(raw, None)  # type: ignore[arg-type]
    else:
        secured = await upgrader.upgrade_security(raw, dialled, ID.from_base58(expected) if expected else None)
    connection = await upgrader.upgrade_connection(secured, secured.get_remote_peer())
    assert isinstance(connection, Yamux)  # the only muxer that is offered
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
    assert protocol is not None  # it is one of those
    return accepted, protocol


async def _pump(connection: Yamux) -> None:
    """yamux's own tasks, whose end shows in the stream."""
    try:
        with _translated():
            await connection.start()
    except PeerUnavailableError as error:
        log.debug("yamux with %s ended: %s", connection.peer_id, error)


async def _connect(host: str, port: int) -> trio.SocketStream:
    """DNS names are resolved, and their addresses raced, by trio (RFC 8305)."""
    try:
        return await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise PeerUnavailableError(str(error)) from error


def _remote(stream: trio.SocketStream) -> HostPort:
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError as error:
        raise PeerUnavailableError("closed before it was introduced") from error
    return HostPort(host, port)


@contextmanager
def _translated() -> Iterator[None]:
    """What libp2p raises for bytes that it did not expect is documented nowhere: any Exception, and groups of them."""
    try:
        yield
    except Exception as error:
        raise PeerUnavailableError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """libp2p's outermost error only says which step failed; the innermost says why."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise PeerUnavailableError(f"no introduction within {seconds:g} s") from error
