"""Outgoing connections: one for each peer and lane, dialled at the first request for it and shared by all later ones.

A connection exists from that request on: requests wait in its queue while it is dialled. A peer that could not be
reached is not dialled again for `Timing.retry_s`, unless its addresses change or it connects to this node.
"""

from __future__ import annotations

import logging
import math
import socket
from functools import partial
from itertools import count, filterfalse
from typing import NoReturn

import trio
from cachetools import LRUCache

from node.config.quantities import HostPort
from node.exchange.channel import Channel, TlsChannel
from node.exchange.connection import Connection, Endpoint, Frame, Reader
from node.exchange.contract import Lane, State
from node.exchange.requests import Call
from protocol import wire
from protocol.errors import BadInputError, NotAdmittedError, PeerMisbehavedError, PeerUnavailableError, ShoalError
from protocol.ids import PeerId
from protocol.members import Member
from protocol.messages import Reply, ShardFound, Waiting

log = logging.getLogger(__name__)


class Outgoing(Connection):
    """The connection to a peer for one lane, with its unanswered calls."""

    def __init__(self, endpoint: Endpoint, peer: PeerId, lane: Lane) -> None:
        super().__init__(peer, endpoint)
        self.lane = lane
        self.calls: dict[int, Call] = {}
        self.channel: Channel | None = None
        """None until it is connected."""
        self._busy_since = -math.inf
        """When a request began while no other was open."""
        self._limits, self._timing = endpoint.limits, endpoint.timing
        numbers = (1 + number % wire.MAX_ID for number in count())
        self._free_numbers = filterfalse(self.calls.__contains__, numbers)

    def submit(self, call: Call) -> None:
        """Raises PeerUnavailableError if too many requests have no answer yet."""
        if len(self.calls) >= self._limits.pending_per_connection:
            raise PeerUnavailableError(f"{self.peer} owes {len(self.calls)} answers on one connection")
        request_id = next(self._free_numbers)
        frame = Frame(wire.encode_head(request_id, call.message, 0))
        self.used_at = trio.current_time()
        if not self.calls:
            self._busy_since = self.used_at
        self.calls[request_id] = call
        self.put(frame)

    async def read_replies(self, reader: Reader[Reply], nursery: trio.Nursery) -> NoReturn:
        """Raises PeerMisbehavedError and PeerUnavailableError."""
        channel = reader.channel
        while True:
            head = await reader.head()
            message = head.message
            if isinstance(message, Waiting):
                self._note_waiting(head.request_id, message, channel.received_at)
                continue
            call = self._call(head.request_id)
            call.accept(message, channel.received_at)
            if isinstance(message, ShardFound):
                call.expect(message, head.body_length)
                await reader.body(head.body_length, call)
                call.arrived(message)
            if not call.missing:
                del self.calls[head.request_id]
                call.end(message)

    def _call(self, request_id: int) -> Call:
        call = self.calls.get(request_id)
        if call is None:
            raise PeerMisbehavedError("an answer to a request that was not made")
        return call

    def _note_waiting(self, request_id: int, message: Waiting, now: float) -> None:
        if request_id:
            raise PeerMisbehavedError("a Waiting with the number of a request")
        for number, state in message.requests:
            self._call(number).waiting(State(state), now)

    def came(self) -> float:
        """When a byte last arrived, or a request began while no other was open; minus infinity until connected."""
        return max(self.channel.received_at, self._busy_since) if self.channel is not None else -math.inf

    @property
    def dead(self) -> bool:
        """Whether it is established and has open requests, but received nothing for `Timing.quiet_s`."""
        quiet = self.channel is not None and trio.current_time() - self.came() > self._timing.quiet_s
        return bool(self.calls) and quiet

    def end(self, error: ShoalError) -> None:
        for call in self.calls.values():
            call.end(error)
        self.calls.clear()


class Dialler:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._timing = endpoint.timing
        self.connections: dict[tuple[PeerId, Lane], Outgoing] = {}
        self._failures: dict[PeerId, tuple[float, Member, str]] = {}
        """By peer: until when it is not dialled again, the member (with addresses) that was dialled, and the reason."""
        self.reached: LRUCache[PeerId, HostPort] = LRUCache(endpoint.limits.connections)
        """Where each peer last proved who it is."""
        # Unbounded: every entry is in `connections` too, which is bounded.
        self._to_dial, self._dials = trio.open_memory_channel[Outgoing](math.inf)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for connection in self._dials:
                nursery.start_soon(self._serve, connection)

    def connection(self, peer: PeerId, lane: Lane) -> Outgoing:
        """The open connection, or a new one that `run` dials.

        Raises PeerUnavailableError if the last dial failed a moment ago, or if too many connections are open.
        """
        connection = self.connections.get((peer, lane))
        if connection is not None:
            return connection
        failure = self._failures.get(peer)
        if failure is not None and trio.current_time() < failure[0] and self._endpoint.locate(peer) == failure[1]:
            raise PeerUnavailableError(failure[2])
        if len(self.connections) >= self._endpoint.limits.connections:
            raise PeerUnavailableError(f"too many connections are open to open another one to {peer}")
        connection = Outgoing(self._endpoint, peer, lane)
        self.connections[peer, lane] = connection
        self._to_dial.send_nowait(connection)
        return connection

    def drop(self, connection: Outgoing) -> None:
        """End it. Later requests use a new connection."""
        if self.connections.get((connection.peer, connection.lane)) is connection:
            del self.connections[connection.peer, connection.lane]
        connection.scope.cancel()

    def disconnect(self, peer: PeerId) -> None:
        for connection in [*self.connections.values()]:
            if connection.peer == peer:
                self.drop(connection)

    def forget_failure(self, peer: PeerId) -> None:
        self._failures.pop(peer, None)

    def close_idle(self, now: float) -> None:
        for connection in [*self.connections.values()]:
            idle = not connection.calls and now - connection.used_at > self._timing.idle_s
            if idle or connection.dead:
                self.drop(connection)
        self._failures = {peer: failure for peer, failure in self._failures.items() if failure[0] > now}

    async def _serve(self, connection: Outgoing) -> None:
        error: ShoalError = PeerUnavailableError(f"the connection to {connection.peer} was closed")
        try:
            with connection.scope:
                reader = await self._dial(connection.peer, connection.lane)
                connection.channel = reader.channel
                error = await connection.run(reader.channel, partial(connection.read_replies, reader))
        except PeerUnavailableError as failure:
            error = failure
        finally:
            self.drop(connection)
            connection.end(error)
        if isinstance(error, PeerMisbehavedError):
            log.warning("%s broke the protocol: %s", connection.peer, error)

    async def _dial(self, peer: PeerId, lane: Lane) -> Reader[Reply]:
        """Raises PeerUnavailableError if the member answers at none of its addresses, and remembers that failure."""
        member = self._endpoint.locate(peer)
        if member is None:
            raise PeerUnavailableError(f"no address of {peer} is known")
        reasons = []
        for address in member.addresses:
            try:
                return await self._dial_address(peer, lane, HostPort.read("address", address))
            except (PeerUnavailableError, PeerMisbehavedError, BadInputError) as error:
                reasons.append(f"{address}: {error}")
        reason = f"{peer} cannot be reached: {'; '.join(reasons) or 'it has no address'}"
        self._failures[peer] = (trio.current_time() + self._timing.retry_s, member, reason)
        raise PeerUnavailableError(reason)

    async def _dial_address(self, peer: PeerId, lane: Lane, where: HostPort) -> Reader[Reply]:
        sock = await _connect(where, self._timing.connect_s)
        try:
            with trio.move_on_after(self._timing.handshake_s):
                return await self._introduce(sock, peer, lane)
        except NotAdmittedError as error:
            self._endpoint.log_refusal(error, where)
            raise
        raise PeerUnavailableError("no handshake in time")

    async def _introduce(self, sock: socket.socket, peer: PeerId, lane: Lane) -> Reader[Reply]:
        where = HostPort(*sock.getpeername()[:2])
        channel = await TlsChannel.open(sock, self._endpoint.client_context, self._timing.stall_s)
        try:
            self._endpoint.identify(channel, expected=peer)
            self.reached[peer] = where
            reader = Reader(channel, wire.REPLIES)
            plain = self._endpoint.wants_plain(lane)
            await channel.send_all(wire.encode_hello(lane, plain))
            hello = await reader.hello()
            self._endpoint.check_version(peer, hello)
            return await reader.to_plain() if plain and hello.plain else reader
        except BaseException:
            channel.close()
            raise


async def _connect(where: HostPort, within_s: float) -> socket.socket:
    try:
        with trio.fail_after(within_s):
            stream = await trio.open_tcp_stream(where.host, where.port)
    except (OSError, ValueError, trio.TooSlowError) as error:  # ValueError: a host that is no name at all
        raise PeerUnavailableError(str(error) or "no connection in time") from error
    return socket.socket(fileno=stream.socket.detach())
