"""Incoming connections: accept them, identify their peers, and answer their requests.

Before a peer is identified, handshakes are bounded in total, per address, and in time. After that its connections, its
requests in progress and the bytes of its answers are bounded. Requests and bytes have fair shares, so that no peer
takes all. Each request is answered in a task of its own, which sends all parts of a stream.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import trio
from cachetools import LRUCache

from cache.memory import sole
from node.config.quantities import HostPort
from node.exchange.channel import PlainChannel, TlsChannel
from node.exchange.connection import BATCH_BYTES, Connection, Endpoint, Frame, Reader, is_for_block
from node.exchange.contract import State
from node.exchange.fair_shares import Shares
from node.exchange.keep_alive import KeepAlive, OpenWork, Work, waiting
from node.exchange.limits import BACKLOG, HANDSHAKES_PER_ADDRESS, HEADS_RATE, VIEWS
from node.exchange.requests import ROOM_BYTES, answer, failure, serve, serve_at_once
from protocol import wire
from protocol.errors import BadInputError, NotAdmittedError, PeerMisbehavedError, PeerUnavailableError, ShoalError
from protocol.ids import Buffer, PeerId
from protocol.members import MAX_MEMBERS
from protocol.messages import Failed, GetShards, Request, ShardFound

log = logging.getLogger(__name__)


class Incoming(Connection):
    """A connection that a peer opened, with its unanswered requests."""

    def __init__(self, peer: PeerId, endpoint: Endpoint, turn: trio.Lock) -> None:
        super().__init__(peer, endpoint)
        self.places = trio.Semaphore(endpoint.limits.requests_per_connection)
        self.turn = turn
        """The connections of one peer share it."""
        self.work = OpenWork[int]()
        self.queued_bytes = 0
        """Bodies in `large`."""
        self.room = trio.lowlevel.ParkingLot()
        """Where streams wait until few bodies are queued."""


class Parts(Work):
    """The Sender of one stream (node/exchange/contract.py). It ends with its last part, with Failed, or with the
    connection."""

    def __init__(self, listener: Listener, connection: Incoming, number: int, request: GetShards) -> None:
        super().__init__()
        self._listener, self._connection, self._number = listener, connection, number
        self._first, self._missing = request.first, request.wanted
        self.is_over = False
        """Whether nothing more is queued."""

    def send(self, message: ShardFound, body: Buffer) -> None:
        head = wire.encode_head(self._number, message, len(body))
        if self.is_over:
            return
        connection, size = self._connection, len(body)
        if not self._listener.answer_bytes.take(connection.peer, size):
            self.fail(Failed("busy", "too many answers wait for this peer"))
            return
        if len(connection.large) >= VIEWS:
            body = sole(body)
        self._missing &= ~(1 << max(0, message.record.index - self._first))
        self.is_over = not self._missing
        self.queued += 1
        connection.queued_bytes += size
        connection.put(Frame(head, body, partial(self._leaving, size)))

    async def room(self) -> None:
        connection = self._connection
        while not self.is_over and connection.queued_bytes >= ROOM_BYTES:
            await connection.room.park()
        if self.is_over:
            raise PeerUnavailableError("the stream is over")

    def coming(self) -> None:
        self.is_coming = True

    def end(self, error: ShoalError) -> None:
        self.fail(failure(error))

    def fail(self, failed: Failed) -> None:
        """End the stream behind the parts that are queued, unless it is over."""
        if self.is_over:
            return
        self.is_over = True
        head = wire.encode_head(self._number, failed, 0)
        behind = bool(self.queued)
        if behind:
            self.queued += 1
        else:  # now, not in `leaving`: a `Waiting` sent meanwhile would be queued behind this frame
            self._listener.end_work(self._connection, self._number)
        leaving = partial(self._leaving, 0) if behind else self._connection.places.release
        self._connection.put(Frame(head, None, leaving), behind_bodies=behind)

    def _leaving(self, size: int) -> None:
        connection = self._connection
        self._listener.answer_bytes.give(connection.peer, size)
        connection.queued_bytes -= size
        self.queued -= 1
        if self.is_over and not self.queued:
            self._listener.end_work(connection, self._number)
            connection.places.release()
        if not connection.queued_bytes:
            connection.room.unpark_all()
        elif connection.queued_bytes < ROOM_BYTES:
            connection.room.unpark()


class Listener:
    """Listens from its construction; accepts and answers while it runs. Closes when `run` ends."""

    def __init__(self, endpoint: Endpoint, arrived: Callable[[PeerId], None]) -> None:
        """`arrived` is called with each admitted peer. Raises BadInputError if it cannot listen."""
        self._endpoint, self._arrived = endpoint, arrived
        self._timing, self._limits = endpoint.timing, endpoint.limits
        self._socket = _listen(endpoint.listen)
        self.address = HostPort(*self._socket.getsockname()[:2])
        self.connections: set[Incoming] = set()
        self._handshakes = trio.Semaphore(self._limits.handshakes)
        self._handshakes_by_host: Counter[str] = Counter()
        self._requests = Shares(self._limits.requests)
        self.answer_bytes = Shares(self._limits.answer_bytes)
        self._keep_alive = KeepAlive[Incoming, int](self._timing.waiting_first_s, self._timing.waiting_every_s)
        self._paced_until: LRUCache[PeerId, float] = LRUCache(MAX_MEMBERS)

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_alive.run, self._say_waiting)
                while True:
                    await self._handshakes.acquire()
                    nursery.start_soon(self._serve, *await self._accept())
        finally:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def disconnect(self, peer: PeerId) -> None:
        for connection in self.connections:
            if connection.peer == peer:
                connection.scope.cancel()

    def close_idle(self, now: float) -> None:
        for connection in self.connections:
            if not connection.work.by_number and now - connection.used_at > 3 * self._timing.idle_s:
                connection.scope.cancel()

    async def _accept(self) -> tuple[socket.socket, HostPort]:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                sock, address = self._socket.accept()
                where = HostPort(*address[:2])
                if self._handshakes_by_host[where.host] < HANDSHAKES_PER_ADDRESS:
                    self._handshakes_by_host[where.host] += 1
                    return sock, where
                sock.close()
            except OSError as error:
                # Other errors mean that the connection broke before it was accepted: accept(2), "Error handling".
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.error("connections cannot be accepted: %s", error)  # noqa: TRY400 # no traceback needed
                    await trio.sleep(self._timing.retry_s)

    async def _serve(self, sock: socket.socket, where: HostPort) -> None:
        try:
            try:
                peer, reader = await self._welcome(sock)
            finally:
                self._handshakes.release()
                self._handshakes_by_host -= Counter([where.host])  # also drops a count of 0
            raise await self._attend(peer, reader)
        except PeerUnavailableError as error:
            log.debug("an incoming connection ended: %s", error)
        except NotAdmittedError as error:
            self._endpoint.log_refusal(error, where)
        except PeerMisbehavedError as error:
            log.warning("an incoming connection broke the protocol: %s", error)

    async def _welcome(self, sock: socket.socket) -> tuple[PeerId, Reader[Request]]:
        """The peer at the other end and a reader of its requests, once both sides have said hello."""
        with trio.move_on_after(self._timing.handshake_s):
            channel = await TlsChannel.open(sock, self._endpoint.server_context, self._timing.stall_s)
            try:
                peer = self._endpoint.identify(channel)
                reader = Reader(channel, wire.REQUESTS)
                hello = await reader.hello()
                self._admit(peer)
                plain = self._endpoint.wants_plain(hello.lane)
                await channel.send_all(wire.encode_hello(hello.lane, plain))
                self._endpoint.check_version(peer, hello)  # after the answer: it tells the other side why
                return peer, await reader.to_plain() if plain and hello.plain else reader
            except BaseException:
                channel.close()
                raise
        raise PeerUnavailableError("no handshake in time")

    def _admit(self, peer: PeerId) -> None:
        """Raises PeerUnavailableError if the peer may open no further connection."""
        same = sum(connection.peer == peer for connection in self.connections)
        full = len(self.connections) >= self._limits.connections or same >= self._limits.connections_per_peer
        if full or self._endpoint.refused(peer):
            raise PeerUnavailableError(f"{peer} is refused, or has too many connections")

    async def _attend(self, peer: PeerId, reader: Reader[Request]) -> ShoalError:
        """Answer requests until the connection ends. Returns the reason."""
        reason: ShoalError = PeerUnavailableError(f"the connection with {peer} was closed")
        turns = (other.turn for other in self.connections if other.peer == peer)
        connection = Incoming(peer, self._endpoint, next(turns, None) or trio.Lock())
        try:
            self._admit(peer)  # again: other connections may have been admitted during this one's hello
            self.connections.add(connection)
            self._arrived(peer)
            with connection.scope:
                reason = await connection.run(reader.channel, partial(self._read_requests, connection, reader))
        finally:
            reader.channel.close()
            self.connections.discard(connection)
            self.answer_bytes.give(peer, connection.queued_bytes)
            for number, work in [*connection.work.by_number.items()]:
                if isinstance(work, Parts):
                    work.is_over = True
                self.end_work(connection, number)
        return reason

    async def _read_requests(self, connection: Incoming, reader: Reader[Request], nursery: trio.Nursery) -> NoReturn:
        """Raises PeerMisbehavedError and PeerUnavailableError."""
        peer, plain = connection.peer, isinstance(reader.channel, PlainChannel)
        while True:
            head = await reader.head()
            if head.size > BATCH_BYTES:
                await self._pace(peer, head.size)
            if head.request_id in connection.work.by_number:
                raise PeerMisbehavedError("a request has the number of another unanswered request")
            if plain and not is_for_block(head.message):
                raise PeerMisbehavedError(f"{type(head.message).__name__} was sent unencrypted")
            if connection.places.value:  # without the checkpoint of `acquire`: every request passes here
                connection.places.acquire_nowait()
            else:
                await connection.places.acquire()
            if not self._requests.take(peer, 1):
                await self._requests.wait(peer, 1)
            self._begin(connection, head, nursery)
            if reader.has_more:
                # One request of each peer in a pass of all tasks: a flood on many connections delays others by no more.
                async with connection.turn:
                    await trio.lowlevel.checkpoint()

    def _begin(self, connection: Incoming, request: wire.Head[Request], nursery: trio.Nursery) -> None:
        connection.used_at = trio.current_time()
        self._keep_alive.begin(connection, connection.work)
        message = request.message
        if not isinstance(message, GetShards):
            connection.work.by_number[request.request_id] = Work()
            nursery.start_soon(self._answer, connection, request)
            return
        parts = Parts(self, connection, request.request_id, message)
        connection.work.by_number[request.request_id] = parts
        has_room = connection.queued_bytes < ROOM_BYTES
        if not (has_room and serve_at_once(self._endpoint.at_once, connection.peer, message, parts)):
            nursery.start_soon(self._serve_stream, connection.peer, message, parts)

    async def _pace(self, peer: PeerId, size: int) -> None:
        until = max(trio.current_time(), self._paced_until.get(peer, 0.0)) + size / HEADS_RATE
        self._paced_until[peer] = until
        await trio.sleep_until(until)

    async def _serve_stream(self, peer: PeerId, request: GetShards, parts: Parts) -> None:
        parts.fail(await serve(self._endpoint.server, peer, request, parts))

    async def _answer(self, connection: Incoming, request: wire.Head[Request]) -> None:
        head = await answer(self._endpoint.handler, connection.peer, request)
        # Now, not when the frame leaves: a `Waiting` sent meanwhile would be queued behind it.
        self.end_work(connection, request.request_id)
        connection.put(Frame(head, None, connection.places.release))

    def end_work(self, connection: Incoming, number: int) -> None:
        del connection.work.by_number[number]
        self._requests.give(connection.peer, 1)

    def _say_waiting(self, connection: Incoming, report: list[tuple[int, State]]) -> None:
        """Send `Waiting`, except to a peer that does not read: the frames would pile up."""
        if len(connection.small) < self._limits.requests_per_connection:
            connection.put(Frame(wire.encode_head(0, waiting(report), 0)))


def _listen(where: HostPort) -> socket.socket:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    try:
        listener = socket.create_server((where.host, where.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BadInputError(f"cannot listen on {where}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener
