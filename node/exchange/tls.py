"""`Exchange` over mutual TLS: the bulk channel of docs/PROTOCOL.md.

A connection carries the requests of the side that opened it, and the answers of the other side. So a node has a
dialler for the requests that it makes, and a listener for those that it answers. This file joins the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import trio

from node.config.quantities import HostPort
from node.exchange.channel import Traffic
from node.exchange.connection import Endpoint
from node.exchange.contract import Answer, Heard, Into, Lane, Part
from node.exchange.dialler import Dialler, Outgoing
from node.exchange.listener import Listener
from node.exchange.requests import Call
from protocol.ids import PeerId
from protocol.messages import Failed, GetShards, Reply, Request


@dataclass(frozen=True, slots=True)
class ExchangeStatistics:
    """A snapshot. `traffic`: bytes of frames by peer since the start. The last two concern incoming connections."""

    connections_in: int
    connections_out: int
    requests_in: int
    requests_out: int
    bytes_sent: int
    bytes_received: int
    traffic: Mapping[PeerId, Traffic]
    answer_bytes_free: int
    small_frames_waiting: int


class TlsExchange:
    """`Exchange` (node/exchange/contract.py) over mutual TLS. Listens from its construction, answers while it runs."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises BadInputError if it cannot listen."""
        self._endpoint = endpoint
        self._dialler = Dialler(endpoint)
        self._listener = Listener(endpoint, self._dialler.forget_failure)
        self.address = self._listener.address

    def statistics(self) -> ExchangeStatistics:
        incoming, outgoing = self._listener.connections, self._dialler.connections
        traffic = {peer: Traffic(counted.sent, counted.received) for peer, counted in self._endpoint.traffic.items()}
        return ExchangeStatistics(
            connections_in=len(incoming),
            connections_out=len(outgoing),
            requests_in=sum(len(connection.work.by_number) for connection in incoming),
            requests_out=sum(len(connection.calls) for connection in outgoing.values()),
            bytes_sent=sum(counted.sent for counted in traffic.values()),
            bytes_received=sum(counted.received for counted in traffic.values()),
            traffic=traffic,
            answer_bytes_free=self._listener.answer_bytes.free,
            small_frames_waiting=sum(len(connection.small) for connection in incoming),
        )

    def links_are_fast(self) -> bool:
        """As `LinkSpeed.is_fast`."""
        return self._endpoint.links.is_fast()

    def reached(self, peer: PeerId) -> HostPort | None:
        return self._dialler.reached.get(peer)

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
        self, peer: PeerId, message: Request, *, lane: Lane, silence_s: float, heard: Heard = None
    ) -> Answer:
        if self._endpoint.plain:
            lane = Lane.CONTROL  # which is encrypted, whatever the peer wants
        # Other bytes of the peer are no sign of life: these answers come from the peer's memory. If one is late while
        # the peer sends other bytes, the caller had better ask another peer.
        call = Call(peer, message, silence_s=silence_s, heard=heard)
        return Answer(await self._ask(self._dialler.connection(peer, lane), call))

    async def stream(
        self,
        peer: PeerId,
        message: GetShards,
        *,
        lane: Lane,
        silence_s: float,
        part: Part,
        heard: Heard = None,
        into: Into = None,
    ) -> Failed | None:
        connection = self._dialler.connection(peer, lane)
        call = Call(peer, message, silence_s=silence_s, heard=heard, part=part, into=into, came=connection.came)
        last = await self._ask(connection, call)
        return last if isinstance(last, Failed) else None

    async def _ask(self, connection: Outgoing, call: Call) -> Reply:
        connection.submit(call)
        try:
            return await call.wait()
        finally:
            if connection.dead:
                self._dialler.drop(connection)
