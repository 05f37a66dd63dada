"""The frames of one connection of the bulk channel (docs/PROTOCOL.md): how they wait, are written, and are read.

Each side has one task that reads and one that writes. Each does as much as the socket allows before it waits. Frames
without a body are written first, many as one TLS record: behind a block on a slow link, a `Waiting` would arrive too
late. A body is read straight into its asker's memory. If both sides want plain mode, TLS ends after the hellos, and
blocks are sent unencrypted.
"""

from __future__ import annotations

import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Generic, NamedTuple, NoReturn, Protocol, TypeVar

import msgspec
import trio
from cachetools import LRUCache

from node.config.quantities import HostPort
from node.exchange.channel import Channel, TlsChannel, Traffic
from node.exchange.contract import AtOnce, Handler, Lane, Server
from node.exchange.limits import Limits, Timing
from node.exchange.link_speed import LinkSpeed
from node.exchange.requests import nothing_at_once, serve_nothing
from node.exchange.send_slots import SendSlots
from node.runtime.refusals import Refusals
from protocol import wire
from protocol.errors import NotAdmittedError, PeerMisbehavedError, PeerUnavailableError, ShoalError
from protocol.ids import Buffer, PeerId
from protocol.members import MAX_MEMBERS, Member
from protocol.messages import GetShards, Request

log = logging.getLogger(__name__)

BATCH_BYTES = 16384
"""Waiting small frames are written together up to this size, one TLS record. Heads are read in the same portions."""
HEADS_WEIGHT = 4 * BATCH_BYTES
"""A read of heads counts as this many bytes of bodies: it may hold hundreds of messages."""
TURN_BYTES = 512 << 10
"""Bodies that a connection sends before it gives its slot to another one that queues for it."""
CHECKPOINT_BYTES = 1 << 20
"""A connection yields to other tasks after reading or writing this many bytes, also while the socket is ready."""
WHOLE_S = 10.0
"""Longest time from a message's first byte to the end of its header. Bounds the memory held by incomplete headers."""

Message = TypeVar("Message")


def is_for_block(message: Request) -> bool:
    """Whether the answer's body is verified against a signed record, and so may be sent unencrypted."""
    return isinstance(message, GetShards)


@dataclass(frozen=True)
class Endpoint:
    """One node's end of all its connections: its settings, and the state that dialled and accepted connections share.

    `peer_of` returns the peer id of a certificate (DER) that TLS has verified, or raises NotAdmittedError. `locate`
    returns a member with its addresses. Connections of peers for which `refused` is true are not accepted. Port 0 in
    `listen` lets the kernel choose one. With `plain`, blocks travel unencrypted between members that both want it.
    """

    server_context: ssl.SSLContext
    client_context: ssl.SSLContext
    peer_of: Callable[[bytes], PeerId]
    _: KW_ONLY
    listen: HostPort
    locate: Callable[[PeerId], Member | None]
    refused: Callable[[PeerId], bool]
    handler: Handler
    server: Server = serve_nothing
    at_once: AtOnce = nothing_at_once
    plain: bool = False
    timing: Timing = field(default_factory=Timing)
    limits: Limits = field(default_factory=Limits)
    slots: SendSlots = field(default_factory=SendSlots, init=False)
    links: LinkSpeed = field(default_factory=LinkSpeed, init=False)
    traffic: LRUCache[PeerId, Traffic] = field(default_factory=lambda: LRUCache(MAX_MEMBERS), init=False)
    refusals: Refusals = field(default_factory=Refusals, init=False)

    def identify(self, channel: TlsChannel, expected: PeerId | None = None) -> PeerId:
        """The peer at the other end; the channel then counts its bytes as that peer's. Raises as `TlsChannel.open`."""
        peer = self.peer_of(channel.peer_certificate())
        if expected not in (None, peer):  # another member may have got this address
            raise PeerUnavailableError(f"{peer} answers at this address now")
        channel.traffic = self.traffic.setdefault(peer, Traffic())
        return peer

    def check_version(self, peer: PeerId, hello: wire.Hello) -> None:
        """Raises NotAdmittedError unless `peer` speaks this node's version of the bulk channel."""
        wire.check_version("bulk channel", hello.version, wire.VERSION, peer)

    def wants_plain(self, lane: str) -> bool:
        return self.plain and lane != Lane.CONTROL

    def log_refusal(self, error: NotAdmittedError, where: HostPort) -> None:
        self.refusals.tell("bulk", error.peer or where.host, str(where), error)


class Frame(NamedTuple):
    """`leaving` is called when the frame is taken from the queue to be written."""

    head: bytes
    body: Buffer | None = None
    leaving: Callable[[], None] | None = None


class Connection:
    """A connection with a peer: the frames that wait to be written, and the two tasks while it is open.

    How many frames may wait is bounded by the callers of `put`. Cancelling `scope` ends the connection.
    """

    def __init__(self, peer: PeerId, endpoint: Endpoint) -> None:
        self.peer = peer
        self.scope = trio.CancelScope()
        self.used_at = trio.current_time()
        self.small: deque[Frame] = deque()
        self.large: deque[Frame] = deque()  # those with a body, and those that must not overtake them
        self._slots, self._links = endpoint.slots, endpoint.links
        self._work = trio.lowlevel.ParkingLot()

    def put(self, frame: Frame, *, behind_bodies: bool = False) -> None:
        (self.large if frame.body or behind_bodies else self.small).append(frame)
        self._work.unpark()

    async def run(self, channel: Channel, read: Callable[[trio.Nursery], Awaitable[NoReturn]]) -> ShoalError:
        """Write frames, and read by calling `read`, until either fails. Returns the reason. Closes `channel`."""
        reason: ShoalError = PeerUnavailableError(f"{self.peer} accepts no more bytes")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, channel, nursery.cancel_scope)
                try:
                    await read(nursery)
                except (PeerMisbehavedError, PeerUnavailableError) as error:
                    reason = type(error)(f"{self.peer}: {error}")
                nursery.cancel_scope.cancel()
        finally:
            channel.close()
        return reason

    async def _write(self, channel: Channel, scope: trio.CancelScope) -> None:
        """Write until the channel fails, then cancel `scope`: the reading task may be waiting for something else."""
        written = turn = 0
        try:
            while True:
                if self.large and self._slots.take(self._work, self.peer):
                    head, body = self._next_large(self._next_small())
                    waited = await channel.send_all(head, body)
                    channel.tell_speed(self._links)
                    turn += len(body)
                    if not self.large or turn >= TURN_BYTES:
                        await self._end_turn(channel)
                        turn = 0
                elif self.small:
                    head, body = self._next_small(), b""
                    waited = await channel.send_all(head)
                else:
                    await self._work.park()
                    written = 0
                    continue
                written = 0 if waited else written + len(head) + len(body)
                if written >= CHECKPOINT_BYTES:
                    await trio.lowlevel.checkpoint()
                    written = 0
        except PeerUnavailableError as error:
            log.debug("writing ended: %s", error)
            scope.cancel()
        finally:
            self._slots.leave(self._work)

    async def _end_turn(self, channel: Channel) -> None:
        if self._slots.contended:
            await channel.wait_taken()
        self._slots.give(self._work)

    def _next_small(self) -> bytes:
        heads, size = [], 0
        while self.small and size < BATCH_BYTES:
            frame = self.small.popleft()
            heads.append(frame.head)
            size += len(frame.head)
            if frame.leaving is not None:
                frame.leaving()
        return b"".join(heads)

    def _next_large(self, before: bytes) -> tuple[bytes, Buffer]:
        """The next head, behind the small frames `before`, and its body."""
        head, body, leaving = self.large.popleft()
        if leaving is not None:
            leaving()
        return before + head, body or b""


class Sink(Protocol):
    """Takes a body. `room` is its memory, or None once the body is not wanted any more. `progress` is called with the
    time at which bytes last arrived."""

    def room(self) -> memoryview | None: ...

    def progress(self, now: float) -> None: ...


class Reader(Generic[Message]):
    """Reads the hello, then heads of `kind` and their bodies."""

    def __init__(self, channel: Channel, kind: msgspec.msgpack.Decoder[tuple[int, Message]]) -> None:
        self.channel = channel
        self._kind = kind
        self._heads = wire.Heads(kind)
        self._scratch = memoryview(bytearray(BATCH_BYTES))
        self._body_came = False
        self._since_checkpoint = 0
        """Bytes read, with HEADS_WEIGHT for each read of heads."""

    async def hello(self) -> wire.Hello:
        while (hello := self._heads.hello()) is None:
            await self._feed()
        return hello

    @property
    def has_more(self) -> bool:
        """Whether bytes behind the last head were received."""
        return not self._heads.at_rest

    async def to_plain(self) -> Reader[Message]:
        """End TLS. The returned reader reads the unencrypted rest of the connection.

        Raises PeerMisbehavedError if the peer sent more than its hello inside TLS.
        """
        if not self._heads.at_rest:
            raise PeerMisbehavedError("sent more than a hello before plain mode")
        assert isinstance(self.channel, TlsChannel)
        return Reader(await self.channel.to_plain(), self._kind)

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
        raise PeerUnavailableError(f"a message's header did not arrive completely in {WHOLE_S} s")

    async def body(self, length: int, sink: Sink) -> None:
        """Read a body into the memory that `sink.room` returns. While that is None, the bytes are dropped."""
        channel = self.channel
        position = self._heads.take(self._place(sink, 0, length))
        while position < length:
            position += channel.receive_nowait(self._place(sink, position, length))
            if position < length:
                sink.progress(channel.received_at)
                await channel.wait_readable(length - position)
                self._since_checkpoint = 0
        self._body_came = True
        self._since_checkpoint += length

    def _place(self, sink: Sink, position: int, length: int) -> memoryview:
        """Where the bytes of a body from `position` on belong."""
        room = sink.room()
        if room is None:
            return self._scratch[: length - position]
        return room[position:] if position else room

    async def _feed(self) -> None:
        """Read more heads, after a checkpoint: a peer that sends much must hold up no other task. After a body, one
        checkpoint in CHECKPOINT_BYTES is enough: the task that waits for parts resumes with all that have arrived."""
        size = self.channel.receive_nowait(self._scratch)
        self._since_checkpoint += HEADS_WEIGHT
        if size and (not self._body_came or self._since_checkpoint >= CHECKPOINT_BYTES):
            self._since_checkpoint = 0
            await trio.lowlevel.checkpoint()
        self._body_came = False
        while not size:
            await self.channel.wait_readable()
            self._since_checkpoint = 0
            size = self.channel.receive_nowait(self._scratch)
        self._heads.feed(self._scratch[:size])
