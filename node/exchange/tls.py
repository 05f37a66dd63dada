"""Requests between members over mutual TLS, and in the clear where both want it: the bulk channel of docs/PROTOCOL.md.

A connection carries the requests of the side that opened it, and the other side's answers. Each side of a connection
has one task that reads and one that writes; a request is answered in a task of its own.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import ssl
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import msgspec
import trio
from cachetools import LRUCache

from cache.memory import sole
from node.config.quantities import HostPort
from node.exchange.channel import Channel, PlainChannel, TlsChannel, Traffic
from node.exchange.contract import Answer, Body, Handler, Heard, Into, Lane
from node.exchange.fair_shares import Shares
from node.exchange.requests import (
    REQUESTS_PER_CONNECTION,
    WAITING_EVERY_S,
    WAITING_FIRST_S,
    AtWork,
    Call,
    answer,
    never,
)
from node.exchange.send_slots import Turns
from node.runtime.refusals import Refusals
from protocol import wire
from protocol.errors import BadInputError, NotAdmittedError, PeerMisbehavedError, PeerUnavailableError, ShoalError
from protocol.ids import BLOCK_SIZE, PeerId
from protocol.members import MAX_MEMBERS, Member
from protocol.messages import Failed, GetBlock, GetShard, Reply, Request, Waiting

log = logging.getLogger(__name__)

BATCH_BYTES = 16384
"""Small frames that wait to be written go together, as one TLS record; reads of heads are as long."""
HEADS_WEIGHT = 4 * BATCH_BYTES
"""What a read of heads counts among bytes of bodies: it may be hundreds of messages."""
HEADS_RATE = 8 << 20
"""Bytes a second of one peer's requests that are longer than BATCH_BYTES: each is decoded in one go, 60 ms for a view
of the largest size, and all others wait for that. What sites in use say is far below."""
WHOLE_S = 10.0
"""From a message's first byte to the last of its header: a peer that says part of one has memory for the rest of it."""
HANDSHAKES_PER_ADDRESS = 32
"""Of those under way: who has but one address keeps nobody else out. A member opens three at once."""
BACKLOG = 1024
VIEWS = 4
"""Bodies that may wait on a connection as views of whole blocks. Where more do, the link is slower than this machine,
and the next are copied out, since each could keep a block in memory for its part of it."""
PLAIN_LANES = (Lane.URGENT, Lane.BULK)
CHANNEL = "bulk"
"""What refusals in the log call it."""

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    connect_s: float = 1.4
    """For each address of a member, within a site. A lost SYN is sent again after 1 s."""
    handshake_s: float = 3.0
    """TLS and hello: a small board needs a tenth of that for its signatures, also when many connect at once."""
    retry_s: float = 0.75
    """A member that could not be reached is not tried again for so long: a dead one costs nothing, a new one little."""
    waiting_first_s: float = WAITING_FIRST_S
    waiting_every_s: float = WAITING_EVERY_S
    stall_s: float = 10.0
    """A peer that takes no byte for so long is dropped."""
    quiet_s: float = 5.0
    """A connection with open requests on which nothing came for so long is dead: a live peer sends `Waiting`."""
    idle_s: float = 60.0
    """Without a request the asking side closes a connection after this time; the answering side after three of it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the peers may take together and each; the asking side's own requests, last."""

    connections: int = 4096
    """Of incoming ones: three lanes from each node of a site of a thousand, and room."""
    connections_per_peer: int = 6
    """One for each lane, and the ones they replace while those are not yet known to be dead."""
    handshakes: int = 128
    requests: int = 2048
    """At work for all peers together, in shares (node/exchange/fair_shares.py); a single one can hold a fifth."""
    requests_per_connection: int = REQUESTS_PER_CONNECTION
    answer_bytes: int = 64 << 20
    """Bodies that wait for the peers to take them, in shares; beyond it the answer is `busy`. While no link takes a
    byte the reads of a site leave half of this here: MOST blocks (protocol/window.py) of each node, by turns at all of
    them. Where there are but two nodes, the other one may have just that half."""
    pending_per_connection: int = 512
    """Requests that have no answer yet, the cancelled ones among them."""


@dataclass(frozen=True, slots=True)
class ExchangeStatistics:
    """`traffic`: bytes of frames by peer, since the start."""

    connections_in: int
    connections_out: int
    requests_in: int
    requests_out: int
    bytes_sent: int
    bytes_received: int
    traffic: Mapping[PeerId, Traffic]


DEFAULT_TIMING = Timing()
DEFAULT_LIMITS = Limits()


class _Frame(NamedTuple):
    """`leaving` is called when the frame's turn has come."""

    head: bytes
    body: Body | None = None
    leaving: Callable[[], None] | None = None


class _Writer:
    """The frames that wait for a connection. Those without a body go first and together: a `Waiting` that stood behind
    a block on a slow link would come too late. How many wait is bounded by who puts them."""

    def __init__(self, peer: PeerId, channel: Channel, turns: Turns) -> None:
        self._peer, self._channel, self._turns = peer, channel, turns
        self._small: deque[_Frame] = deque()
        self._large: deque[_Frame] = deque()
        self._work = trio.lowlevel.ParkingLot()

    def put(self, frame: _Frame) -> None:
        (self._large if frame.body else self._small).append(frame)
        self._work.unpark()

    @property
    def small_waiting(self) -> int:
        return len(self._small)

    @property
    def large_waiting(self) -> int:
        return len(self._large)

    @property
    def bytes_waiting(self) -> int:
        return sum(len(frame.body or b"") for frame in self._large)

    async def run(self, scope: trio.CancelScope) -> None:
        """Until the channel fails; cancels `scope` then, for who reads may be waiting for anything else."""
        try:
            while True:
                if self._small:
                    await self._channel.send_all(self._next_small())
                elif self._large and self._turns.take(self._work, self._peer):
                    await self._channel.send_all(*self._next_large())
                    if self._turns.contended:
                        await self._channel.wait_taken()
                    self._turns.give(self._work)
                else:
                    await self._work.park()
        except PeerUnavailableError as error:
            log.debug("writing ended: %s", error)
            scope.cancel()
        finally:
            self._turns.leave(self._work)

    def _next_small(self) -> bytes:
        heads, size = [], 0
        while self._small and size < BATCH_BYTES:
            frame = self._small.popleft()
            heads.append(frame.head)
            size += len(frame.head)
            if frame.leaving is not None:
                frame.leaving()
        return b"".join(heads)

    def _next_large(self) -> tuple[bytes, Body]:
        head, body, leaving = self._large.popleft()
        if leaving is not None:
            leaving()
        return head, body or b""


class _Reader(Generic[Message]):
    """Hello, heads and bodies from a channel; bodies go straight to where they are wanted."""

    def __init__(self, channel: Channel, kind: msgspec.msgpack.Decoder[tuple[int, Message]]) -> None:
        self.channel = channel
        self._heads = wire.Heads(kind)
        self._scratch = memoryview(bytearray(BATCH_BYTES))
        self._body_came = False
        self._turn = 0

    @property
    def at_rest(self) -> bool:
        return self._heads.at_rest

    async def hello(self) -> wire.Hello:
        while (hello := self._heads.hello()) is None:
            await self._feed()
        return hello

    async def head(self) -> wire.Head[Message]:
        while (head := self._heads.next()) is None:
            if not self._heads.at_rest:
                return await self._rest_of_head()
            await self._feed()
        return head

    async def _rest_of_head(self) -> wire.Head[Message]:
        with trio.move_on_after(WHOLE_S):
            while (head := self._heads.next()) is None:
                await self._feed()
            return head
        raise PeerUnavailableError(f"a message did not come whole in {WHOLE_S} s")

    async def body(self, length: int, room: Callable[[], memoryview | None], progress: Callable[[], None]) -> None:
        """Into `room()`, asked anew after each wait; what it has no room for is read and dropped. `progress` is called
        when some of it has come and the rest has not."""
        position = 0
        while position < length:
            view = room()
            view = self._scratch[: length - position] if view is None else view[position:]
            size = self._heads.take(view) or self.channel.receive_nowait(view)
            position += size
            if not size:
                await self.channel.wait_readable(length - position)
            elif position < length:
                progress()
        self._body_came = True
        self._turn += length

    async def _feed(self) -> None:
        """Lets others run, so that a peer that says much holds up nobody. But shards that are all there are taken a
        block at a time: who waits for them then goes on, and asks for the next, at once (a tenth of the CPU)."""
        size = self.channel.receive_nowait(self._scratch)
        self._turn += HEADS_WEIGHT
        if size and (not self._body_came or self._turn >= BLOCK_SIZE):
            self._turn = 0
            await trio.lowlevel.checkpoint()
        self._body_came = False
        while not size:
            await self.channel.wait_readable()
            size = self.channel.receive_nowait(self._scratch)
        self._heads.feed(self._scratch[:size])


class _Outgoing:
    """The connection to a peer for one lane, from the first request for it until it ends."""

    def __init__(self, peer: PeerId, lane: Lane, pending_limit: int) -> None:
        self.peer = peer
        self.lane = lane
        self.scope = trio.CancelScope()
        self.calls: dict[int, Call] = {}
        self.used_at = trio.current_time()
        self.heard_at = math.inf
        self._pending_limit = pending_limit
        self._unsent: list[_Frame] = []
        self._writer: _Writer | None = None
        self._last_id = 0

    def submit(self, call: Call) -> None:
        """Raises PeerUnavailableError where too many requests have no answer yet."""
        if len(self.calls) >= self._pending_limit:
            raise PeerUnavailableError(f"{self.peer} owes {len(self.calls)} answers on one connection")
        request_id = self._next_id()
        frame = _Frame(wire.encode_head(request_id, call.message, 0))
        self.used_at = trio.current_time()
        if not self.calls:
            self.heard_at = max(self.heard_at, self.used_at)
        self.calls[request_id] = call
        if self._writer is None:
            self._unsent.append(frame)
        else:
            self._writer.put(frame)

    def connected(self, writer: _Writer) -> None:
        self._writer = writer
        self.heard_at = trio.current_time()
        for frame in self._unsent:
            writer.put(frame)
        self._unsent.clear()

    def call(self, request_id: int) -> Call:
        """Raises PeerMisbehavedError where nothing of this number was asked."""
        if request_id not in self.calls:
            raise PeerMisbehavedError("an answer to what was not asked")
        return self.calls[request_id]

    def came(self) -> float:
        """When anything last came on it; before it stands, never."""
        return self.heard_at if self._writer is not None else -math.inf

    def quiet_s(self) -> float:
        """How long nothing was heard although something was asked; negative before the connection stands."""
        return trio.current_time() - self.heard_at if self.calls else 0.0

    def end(self, error: ShoalError) -> None:
        for call in self.calls.values():
            call.end(error)
        self.calls.clear()

    def _next_id(self) -> int:
        while True:
            self._last_id = (self._last_id + 1) & 0xFFFFFFFF
            if self._last_id not in self.calls:
                return self._last_id


class _Incoming:
    """A connection that a peer opened, with the requests on it that have no answer yet."""

    def __init__(self, peer: PeerId, writer: _Writer, slots: int) -> None:
        self.peer = peer
        self.writer = writer
        self.scope = trio.CancelScope()
        self.slots = trio.Semaphore(slots)
        self.at_work: set[int] = set()
        self.ready: set[int] = set()
        """Those at work whose answers wait for their turn."""
        self.used_at = trio.current_time()

    def check_number(self, request_id: int) -> None:
        if request_id in self.at_work:
            raise PeerMisbehavedError("a request with the number of one that is at work")


class TlsExchange:
    """`Exchange` over mutual TLS; see there for the promises.

    `peer_of` tells the peer id of a certificate (DER) that TLS has verified, or raises NotAdmittedError; `locate` where
    a member listens, `refused` whose connections are not accepted. It listens from its construction and answers while
    it runs; a port of 0 in `listen` takes a free one, and `address` tells which. With `plain`, blocks go in the clear
    to and from members that want it too.
    """

    def __init__(
        self,
        server_context: ssl.SSLContext,
        client_context: ssl.SSLContext,
        peer_of: Callable[[bytes], PeerId],
        *,
        listen: HostPort,
        locate: Callable[[PeerId], Member | None],
        refused: Callable[[PeerId], bool],
        handler: Handler,
        plain: bool = False,
        timing: Timing = DEFAULT_TIMING,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Raises BadInputError where `listen` is not to be had."""
        self._server_context = server_context
        self._client_context = client_context
        self._peer_of = peer_of
        self._locate = locate
        self._refused = refused
        self._handler = handler
        self._plain = plain
        self._timing = timing
        self._limits = limits
        self._listener = _listen(listen)
        self._outgoing: dict[tuple[PeerId, Lane], _Outgoing] = {}
        self._incoming: set[_Incoming] = set()
        self._unreached: dict[PeerId, tuple[float, Member, str]] = {}
        self._traffic: LRUCache[PeerId, Traffic] = LRUCache(MAX_MEMBERS)
        self._handshakes = trio.Semaphore(limits.handshakes)
        self._requests = Shares(limits.requests)
        self._at_work = AtWork[tuple[_Incoming, int]](timing.waiting_first_s, timing.waiting_every_s)
        self._shaking: Counter[str] = Counter()
        self._paced: LRUCache[PeerId, float] = LRUCache(MAX_MEMBERS)
        self._turns = Turns()
        self._refusals = Refusals()
        self._answer_bytes = Shares(limits.answer_bytes)
        # What waits in it is in `_outgoing` too, which is bounded.
        self._to_dial, self._dials = trio.open_memory_channel[_Outgoing](math.inf)

    @property
    def address(self) -> HostPort:
        host, port = self._listener.getsockname()[:2]
        return HostPort(host, port)

    def statistics(self) -> ExchangeStatistics:
        traffic = {peer: Traffic(one.sent, one.received) for peer, one in self._traffic.items()}
        return ExchangeStatistics(
            connections_in=len(self._incoming),
            connections_out=len(self._outgoing),
            requests_in=sum(len(connection.at_work) for connection in self._incoming),
            requests_out=sum(len(connection.calls) for connection in self._outgoing.values()),
            bytes_sent=sum(one.sent for one in traffic.values()),
            bytes_received=sum(one.received for one in traffic.values()),
            traffic=traffic,
        )

    def disconnect(self, peer: PeerId) -> None:
        for outgoing in [one for one in self._outgoing.values() if one.peer == peer]:
            self._drop(outgoing)
        for incoming in self._incoming:
            if incoming.peer == peer:
                incoming.scope.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept, nursery)
                nursery.start_soon(self._close_idle)
                nursery.start_soon(self._turns.run)
                nursery.start_soon(self._at_work.keep_alive, self._say_waiting)
                task_status.started()
                async for connection in self._dials:
                    nursery.start_soon(self._serve_outgoing, connection)
        finally:
            trio.lowlevel.notify_closing(self._listener)
            self._listener.close()

    async def _close_idle(self) -> None:
        idle_s = self._timing.idle_s
        while True:
            await trio.sleep(idle_s / 4)
            now = trio.current_time()
            for outgoing in [*self._outgoing.values()]:
                idle = not outgoing.calls and now - outgoing.used_at > idle_s
                if idle or outgoing.quiet_s() > self._timing.quiet_s:
                    self._drop(outgoing)
            for incoming in self._incoming:
                if not incoming.at_work and now - incoming.used_at > 3 * idle_s:
                    incoming.scope.cancel()
            self._unreached = {peer: failure for peer, failure in self._unreached.items() if failure[0] > now}

    # The asking side

    async def request(
        self,
        peer: PeerId,
        message: Request,
        *,
        lane: Lane,
        silence_s: float,
        heard: Heard | None = None,
        into: Into | None = None,
    ) -> Answer:
        if self._plain and not _is_for_block(message):
            lane = Lane.CONTROL  # it is encrypted, whatever the peer wants
        connection = self._connection(peer, lane)
        # What is answered from memory needs no patience: another peer can be asked.
        call = Call(peer, message, silence_s, heard, into, connection.came if _is_for_block(message) else never)
        connection.submit(call)
        try:
            return await call.wait()
        finally:
            if connection.quiet_s() > self._timing.quiet_s:
                self._drop(connection)

    def _connection(self, peer: PeerId, lane: Lane) -> _Outgoing:
        """The open one, or one that is about to be dialled. Raises PeerUnavailableError where that is known to fail."""
        connection = self._outgoing.get((peer, lane))
        if connection is not None:
            return connection
        failure = self._unreached.get(peer)
        if failure is not None and trio.current_time() < failure[0] and self._locate(peer) == failure[1]:
            raise PeerUnavailableError(failure[2])
        if len(self._outgoing) >= self._limits.connections:
            raise PeerUnavailableError(f"too many connections are open for one more to {peer}")
        connection = _Outgoing(peer, lane, self._limits.pending_per_connection)
        self._outgoing[peer, lane] = connection
        self._to_dial.send_nowait(connection)
        return connection

    def _drop(self, connection: _Outgoing) -> None:
        """It ends; a request from here on gets a new one."""
        if self._outgoing.get((connection.peer, connection.lane)) is connection:
            del self._outgoing[connection.peer, connection.lane]
        connection.scope.cancel()

    async def _serve_outgoing(self, connection: _Outgoing) -> None:
        error: ShoalError = PeerUnavailableError(f"the connection to {connection.peer} was closed")
        try:
            with connection.scope:
                error = await self._converse(connection)
        finally:
            self._drop(connection)
            connection.end(error)
        if isinstance(error, PeerMisbehavedError):
            log.warning("%s broke the protocol: %s", connection.peer, error)

    async def _converse(self, connection: _Outgoing) -> ShoalError:
        """Returns why the conversation ended."""
        try:
            reader = await self._dial(connection.peer, connection.lane)
        except PeerUnavailableError as error:
            return error
        reason: ShoalError = PeerUnavailableError(f"{connection.peer} takes nothing more")
        try:
            async with trio.open_nursery() as nursery:
                writer = _Writer(connection.peer, reader.channel, self._turns)
                nursery.start_soon(writer.run, nursery.cancel_scope)
                connection.connected(writer)
                reason = await self._read_replies(connection, reader)
                nursery.cancel_scope.cancel()
        finally:
            reader.channel.close()
        return reason

    async def _read_replies(self, connection: _Outgoing, reader: _Reader[Reply]) -> ShoalError:
        try:
            while True:
                head = await reader.head()
                call = connection.call(head.request_id)
                wire.check_answer(call.message, head.message)
                if isinstance(head.message, Waiting):
                    connection.heard_at = trio.current_time()
                    call.waiting(head.message.ready)
                    continue
                await _read_body(connection, call, reader, head)
                del connection.calls[head.request_id]
                call.answered(head.message)
        except (PeerMisbehavedError, PeerUnavailableError) as error:
            return type(error)(f"{connection.peer}: {error}")

    async def _dial(self, peer: PeerId, lane: Lane) -> _Reader[Reply]:
        """Raises PeerUnavailableError when none of the member's addresses leads to it, and remembers that."""
        member = self._locate(peer)
        if member is None:
            raise PeerUnavailableError(f"no address of {peer} is known")
        reasons = []
        for address in member.addresses:
            try:
                return await self._dial_address(peer, lane, HostPort.read("address", address))
            except (PeerUnavailableError, PeerMisbehavedError, BadInputError) as error:
                reasons.append(f"{address}: {error}")
        reason = f"{peer} cannot be reached: {'; '.join(reasons) or 'it has no address'}"
        self._unreached[peer] = (trio.current_time() + self._timing.retry_s, member, reason)
        raise PeerUnavailableError(reason)

    async def _dial_address(self, peer: PeerId, lane: Lane, where: HostPort) -> _Reader[Reply]:
        sock = await _connect(where, self._timing.connect_s)
        try:
            with trio.move_on_after(self._timing.handshake_s):
                return await self._introduce(sock, peer, lane)
        except NotAdmittedError as error:
            self._refusals.tell(CHANNEL, error.peer or where.host, str(where), error)
            raise
        raise PeerUnavailableError("no handshake in time")

    async def _introduce(self, sock: socket.socket, peer: PeerId, lane: Lane) -> _Reader[Reply]:
        channel = await TlsChannel.open(sock, self._client_context, server_side=False, stall_s=self._timing.stall_s)
        try:
            _expect(peer, self._peer_of(channel.peer_certificate()))
            channel.traffic = self._traffic.setdefault(peer, Traffic())
            reader = _Reader(channel, wire.REPLIES)
            plain = self._plain and lane in PLAIN_LANES
            await channel.send_all(wire.encode_hello(lane, plain))
            hello = await reader.hello()
            return await _in_the_clear(reader, wire.REPLIES) if plain and hello.plain else reader
        except BaseException:
            channel.close()
            raise

    # The answering side

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            await self._handshakes.acquire()
            nursery.start_soon(self._serve_incoming, *await self._accept_one())

    async def _accept_one(self) -> tuple[socket.socket, HostPort]:
        """A connection, and where it came from."""
        while True:
            await trio.lowlevel.wait_readable(self._listener)
            try:
                sock, address = self._listener.accept()
                where = HostPort(*address[:2])
                if self._shaking[where.host] < HANDSHAKES_PER_ADDRESS:
                    self._shaking[where.host] += 1
                    return sock, where
                sock.close()
            except OSError as error:
                # Other errors say that the connection was gone before it was accepted: accept(2), "Error handling".
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.error("connections cannot be accepted: %s", error)  # noqa: TRY400 # the reason is all of it
                    await trio.sleep(self._timing.retry_s)

    async def _serve_incoming(self, sock: socket.socket, where: HostPort) -> None:
        try:
            try:
                peer, reader = await self._welcome_in_time(sock)
            finally:
                self._handshakes.release()
                self._shaking[where.host] -= 1
                if not self._shaking[where.host]:
                    del self._shaking[where.host]
            try:
                await self._attend(peer, reader)
            finally:
                reader.channel.close()
        except PeerUnavailableError as error:
            log.debug("an incoming connection ended: %s", error)
        except NotAdmittedError as error:
            self._refusals.tell(CHANNEL, error.peer or where.host, str(where), error)
        except PeerMisbehavedError as error:
            log.warning("an incoming connection broke the protocol: %s", error)

    async def _welcome_in_time(self, sock: socket.socket) -> tuple[PeerId, _Reader[Request]]:
        with trio.move_on_after(self._timing.handshake_s):
            return await self._welcome(sock)
        raise PeerUnavailableError("no handshake in time")

    async def _welcome(self, sock: socket.socket) -> tuple[PeerId, _Reader[Request]]:
        channel = await TlsChannel.open(sock, self._server_context, server_side=True, stall_s=self._timing.stall_s)
        try:
            peer = self._peer_of(channel.peer_certificate())
            channel.traffic = self._traffic.setdefault(peer, Traffic())
            reader = _Reader(channel, wire.REQUESTS)
            hello = await reader.hello()
            self._admit(peer)
            plain = self._plain and hello.lane in PLAIN_LANES
            await channel.send_all(wire.encode_hello(hello.lane, plain))
            return peer, await _in_the_clear(reader, wire.REQUESTS) if plain and hello.plain else reader
        except BaseException:
            channel.close()
            raise

    async def _attend(self, peer: PeerId, reader: _Reader[Request]) -> None:
        """Answer until the connection ends; raises why."""
        self._admit(peer)  # again: others came while this one said hello
        writer = _Writer(peer, reader.channel, self._turns)
        connection = _Incoming(peer, writer, self._limits.requests_per_connection)
        reason: ShoalError = PeerUnavailableError("disconnected")
        self._incoming.add(connection)
        self._unreached.pop(peer, None)
        try:
            with connection.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(writer.run, nursery.cancel_scope)
                    reason = await self._read_requests(connection, reader, nursery)
                    nursery.cancel_scope.cancel()
        finally:
            self._incoming.discard(connection)
            self._answer_bytes.give(peer, writer.bytes_waiting)
            for request_id in [*connection.at_work]:
                self._end_work(connection, request_id)
        raise reason

    def _admit(self, peer: PeerId) -> None:
        """Raises PeerUnavailableError where there is no place for one more connection of this peer."""
        same = sum(connection.peer == peer for connection in self._incoming)
        full = len(self._incoming) >= self._limits.connections or same >= self._limits.connections_per_peer
        if full or self._refused(peer):
            raise PeerUnavailableError(f"{peer} is refused, or has too many connections")

    async def _read_requests(
        self, connection: _Incoming, reader: _Reader[Request], nursery: trio.Nursery
    ) -> ShoalError:
        plain = isinstance(reader.channel, PlainChannel)
        try:
            while True:
                head = await reader.head()
                if head.size > BATCH_BYTES:
                    await self._pace(connection.peer, head.size)
                connection.check_number(head.request_id)
                if plain and not _is_for_block(head.message):
                    raise PeerMisbehavedError(f"{type(head.message).__name__} came in the clear")
                await _acquire(connection.slots)
                if not self._requests.take(connection.peer, 1):
                    await self._requests.wait(connection.peer, 1)
                connection.at_work.add(head.request_id)
                self._at_work.begin((connection, head.request_id))
                connection.used_at = trio.current_time()
                nursery.start_soon(self._answer, connection, head)
        except (PeerMisbehavedError, PeerUnavailableError) as error:
            return type(error)(f"{connection.peer}: {error}")

    async def _pace(self, peer: PeerId, size: int) -> None:
        until = max(trio.current_time(), self._paced.get(peer, 0.0)) + size / HEADS_RATE
        self._paced[peer] = until
        await trio.sleep_until(until)

    async def _answer(self, connection: _Incoming, request: wire.Head[Request]) -> None:
        head, body = await answer(self._handler, connection.peer, request)
        size = len(body or b"")
        if not self._answer_bytes.take(connection.peer, size):
            size, body = 0, None
            head = wire.encode_head(request.request_id, Failed("busy", "too many answers wait to be taken"), 0)
        elif body and connection.writer.large_waiting >= VIEWS:
            body = sole(body)

        def leaving() -> None:
            self._answer_bytes.give(connection.peer, size)
            if body:
                self._end_work(connection, request.request_id)
            connection.slots.release()

        if body:
            connection.ready.add(request.request_id)
        else:  # no `Waiting` may come after the answer: behind a small one it would stand in the queue
            self._end_work(connection, request.request_id)
        connection.writer.put(_Frame(head, body, leaving))

    def _end_work(self, connection: _Incoming, request_id: int) -> None:
        connection.at_work.remove(request_id)
        connection.ready.discard(request_id)
        self._at_work.end((connection, request_id))
        self._requests.give(connection.peer, 1)

    def _say_waiting(self, key: tuple[_Incoming, int]) -> None:
        """Unless the peer does not read: there they would pile up."""
        connection, request_id = key
        if connection.writer.small_waiting < self._limits.requests_per_connection:
            waiting = Waiting(request_id in connection.ready)
            connection.writer.put(_Frame(wire.encode_head(request_id, waiting, 0)))


async def _read_body(connection: _Outgoing, call: Call, reader: _Reader[Reply], head: wire.Head[Reply]) -> None:
    def progress() -> None:
        connection.heard_at = trio.current_time()
        call.progress()

    progress()
    if head.body_length:
        call.expect(head.message, head.body_length)
        await reader.body(head.body_length, call.room, progress)


async def _in_the_clear(
    reader: _Reader[Message], kind: msgspec.msgpack.Decoder[tuple[int, Message]]
) -> _Reader[Message]:
    """What follows is plain. Raises PeerMisbehavedError where more than the hello was said inside TLS."""
    if not reader.at_rest:
        raise PeerMisbehavedError("more than a hello came before plain mode")
    assert isinstance(reader.channel, TlsChannel)
    return _Reader(await reader.channel.to_plain(), kind)


def _is_for_block(message: Request) -> bool:
    """Whether what is found for it is checked by its own signed record."""
    return isinstance(message, GetShard | GetBlock)


def _expect(peer: PeerId, found: PeerId) -> None:
    """An address may have passed to another member."""
    if found != peer:
        raise PeerUnavailableError(f"{found} is there now")


async def _acquire(semaphore: trio.Semaphore) -> None:
    """Without a checkpoint where there is no need to wait: this stands in the way of every request."""
    try:
        semaphore.acquire_nowait()
    except trio.WouldBlock:
        await semaphore.acquire()


async def _connect(where: HostPort, within_s: float) -> socket.socket:
    with trio.move_on_after(within_s):
        try:
            stream = await trio.open_tcp_stream(where.host, where.port)
        except (OSError, ValueError) as error:  # ValueError: a host that is no name at all
            raise PeerUnavailableError(str(error)) from error
        return socket.socket(fileno=stream.socket.detach())
    raise PeerUnavailableError("no connection in time")


def _listen(where: HostPort) -> socket.socket:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    try:
        listener = socket.create_server((where.host, where.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BadInputError(f"cannot listen on {where}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener
