"""`Exchange` over mutual TLS: the bulk channel of docs/PROTOCOL.md.

A connection carries the requests of the side that opened it, and the answers of the other side. So a node has a
dialler, for the requests that it makes, and a listener, for those that it answers; this file joins them.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

import trio

from node.config.schema import HostPort
from node.exchange.channel import Traffic
from node.exchange.connection import Endpoint, is_for_block
from node.exchange.contract import Answer, Handler, Heard, Into, Lane
from node.exchange.dialler import Dialler
from node.exchange.limits import DEFAULT_LIMITS, DEFAULT_TIMING, ExchangeStatistics, Limits, Timing
from node.exchange.listener import Listener
from node.exchange.requests import Call, never
from protocol.ids import PeerId
from protocol.members import Member
from protocol.messages import Request


class TlsExchange:
    """`Exchange` (node/exchange/contract.py) over mutual TLS.

    `peer_of` returns the peer id of a certificate (DER) that TLS has verified, or raises NotAdmittedError. `locate`
    returns a member with its addresses. Connections of peers for which `refused` is true are not accepted. It listens
    from its construction and answers while it runs; with port 0 in `listen` the kernel chooses one, see `address`.
    With `plain`, blocks go in the clear to and from members that want it too.
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
        """Raises BadInputError where `listen` cannot be used."""
        self._endpoint = endpoint = Endpoint(peer_of, plain, timing, limits)
        self._dialler = Dialler(endpoint, client_context, locate)
        arrived = self._dialler.forget_failure
        self._listener = Listener(
            endpoint, server_context, listen=listen, refused=refused, handler=handler, arrived=arrived
        )
        self.address = self._listener.address

    def statistics(self) -> ExchangeStatistics:
        incoming, outgoing = self._listener.connections, self._dialler.connections
        traffic = {peer: Traffic(counted.sent, counted.received) for peer, counted in self._endpoint.traffic.items()}
        return ExchangeStatistics(
            connections_in=len(incoming),
            connections_out=len(outgoing),
            requests_in=sum(len(connection.at_work) for connection in incoming),
            requests_out=sum(len(connection.calls) for connection in outgoing.values()),
            bytes_sent=sum(counted.sent for counted in traffic.values()),
            bytes_received=sum(counted.received for counted in traffic.values()),
            traffic=traffic,
            answer_bytes_free=self._listener.answer_bytes.free,
            small_frames_waiting=sum(len(connection.small) for connection in incoming),
        )

    def disconnect(self, peer: PeerId) -> None:
        self._dialler.disconnect(peer)
        self._listener.disconnect(peer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listener.run)
            nursery.start_soon(self._dialler.run)
            nursery.start_soon(self._endpoint.slots.run)
            task_status.started()
            while True:
                await trio.sleep(self._endpoint.timing.idle_s / 4)
                now = trio.current_time()
                self._dialler.close_idle(now)
                self._listener.close_idle(now)

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
        for_block = is_for_block(message)
        if self._endpoint.plain and not for_block:
            lane = Lane.CONTROL  # which is encrypted, whatever the peer wants
        connection = self._dialler.connection(peer, lane)
        # Any byte from the peer counts as life for a block's request only: other answers come from the peer's memory,
        # so a late one is worth no patience. Another peer can be asked.
        came = connection.came if for_block else never
        call = Call(peer, message, silence_s=silence_s, heard=heard, into=into, came=came)
        connection.submit(call)
        try:
            return await call.wait()
        finally:
            if connection.dead:
                self._dialler.drop(connection)
