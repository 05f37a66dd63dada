"""The network of a simulation: links with rates, latencies, lost packets, sites and their uplinks, and partitions.

A frame passes the links of its path one after the other, cut through: the next link begins when the first byte has
arrived. Each link sends frames one at a time, in the order of their arrival. Real senders share a link between a few
connections (`node/exchange/send_slots.py`), which moves the same bytes in the same time. Small frames wait at most for
the queue of a switch, because bodies wait in their senders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from random import Random

import trio

from node.exchange.memory import MemoryNetwork
from protocol.ids import PeerId
from simulations.alarms import Alarms

Latency = Callable[[Random], float]
"""Draws the latency of one direction, in seconds."""

PACKET_BYTES = 1448
"""Bytes of a stream in a packet of 1514 bytes on Ethernet."""
WIRE_SHARE = 1514 / PACKET_BYTES
"""Bytes on the wire for each byte of a stream."""
SMALL_BYTES = 8192
"""Frames up to this size do not wait behind bodies."""
QUEUE_BYTES = 37_500
"""Bytes that a busy link sends before a small frame: 7.5 ms at 40 Mbit/s."""
TIMEOUT_S = 0.2
"""TCP's shortest retransmission timeout: it applies to a lost packet that no later packet reveals."""
TAIL_PACKETS = 3
"""Last packets of a frame, whose loss later packets do not reveal (TCP needs three duplicate acknowledgements)."""
MOST_TIMEOUTS = 6


def constant(seconds: float) -> Latency:
    return lambda rng: seconds


def lognormal(median_s: float, p99_s: float) -> Latency:
    """The usual shape of measured latencies: most near the median, few far above."""
    sigma = math.log(p99_s / median_s) / 2.326
    return lambda rng: rng.lognormvariate(math.log(median_s), sigma)


class Link:
    """One direction of a line, `rate` in bytes per second."""

    def __init__(self, rate: float = math.inf) -> None:
        self.rate = rate
        self.carried = 0
        """Bytes, headers not included."""
        self._free_at = 0.0

    def send(self, now: float, size: int) -> tuple[float, float]:
        """The times at which the link begins and ends to send a frame that arrives at `now`."""
        took = size * WIRE_SHARE / self.rate
        free_at = max(now, self._free_at)
        begins = min(free_at, now + QUEUE_BYTES / self.rate) if size <= SMALL_BYTES else free_at
        self._free_at = free_at + took
        self.carried += size
        return begins, begins + took


class Port:
    """The links between a node, or a site, and the network."""

    def __init__(self, up: float = math.inf, down: float = math.inf) -> None:
        self.up, self.down = Link(up), Link(down)


class SimulatedNetwork(MemoryNetwork):
    """`latency`: one direction between two nodes; between sites, `uplink_latency` is added. `alarms.run` must run."""

    def __init__(
        self, rng: Random, latency: Latency, *, uplink_latency: Latency | None = None, tick_s: float = 0.0
    ) -> None:
        super().__init__()
        self.alarms = Alarms(tick_s)
        self._rng, self._latency, self._uplink_latency = rng, latency, uplink_latency or constant(0.0)
        self.loss = 0.0
        """Share of packets that is lost."""
        self._ports: dict[PeerId, Port] = {}
        self._sites: dict[PeerId, str] = {}
        self._uplinks: dict[str, Port] = {}
        self._sides: dict[PeerId, int] = {}
        self._no_uplink: dict[str, bool] = {}
        """Sites whose uplink is cut, and whether connections over it end at once."""
        self._changed = trio.Event()

    def plug(self, peer: PeerId, site: str, port: Port) -> None:
        self._ports[peer], self._sites[peer] = port, site
        self._uplinks.setdefault(site, Port())

    def uplink(self, site: str) -> Port:
        return self._uplinks.setdefault(site, Port())

    def port(self, peer: PeerId) -> Port:
        return self._ports.setdefault(peer, Port())

    # Faults

    def part(self, *sides: Iterable[PeerId]) -> None:
        """From now on nothing passes between the sides. Nodes in none of them belong to the first."""
        self._sides = {peer: number for number, side in enumerate(sides) for peer in side}
        self._change()

    def heal(self) -> None:
        self.part()

    def cut_uplink(self, site: str, *, resets: bool = False) -> None:
        """`resets`: a gateway of the site ends connections over the uplink at once; else they are silent."""
        self._no_uplink[site] = resets

    def mend_uplink(self, site: str) -> None:
        self._no_uplink.pop(site, None)
        self._change()

    def resets_uplink(self, site: str) -> bool:
        return self._no_uplink.get(site, False)

    def has_uplink(self, site: str) -> bool:
        return site not in self._no_uplink

    async def wait_uplink(self, site: str) -> None:
        while not self.has_uplink(site):
            await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def reaches(self, sender: PeerId, receiver: PeerId) -> bool:
        return super().reaches(sender, receiver) and self._passes(sender, receiver)

    def _passes(self, sender: PeerId, receiver: PeerId) -> bool:
        sites = {self._sites.get(sender), self._sites.get(receiver)}
        apart = self._sides.get(sender, 0) != self._sides.get(receiver, 0)
        return not apart and (len(sites) == 1 or not sites & self._no_uplink.keys())

    # Frames

    async def travel(self, sender: PeerId, receiver: PeerId, size: int) -> None:
        while not self._passes(sender, receiver):  # TCP retransmits it until it arrives
            await self._changed.wait()
        path = [self.port(sender).up, self.port(receiver).down]
        latency_s = self._latency(self._rng)
        if (here := self._sites.get(sender)) != (there := self._sites.get(receiver)) and here and there:
            path[1:1] = [self._uplinks[here].up, self._uplinks[there].down]
            latency_s += self._uplink_latency(self._rng)
        await self.carry(path, size, latency_s)
        if not super().reaches(sender, receiver):
            await super().travel(sender, receiver, size)

    async def carry(self, path: Sequence[Link], size: int, latency_s: float, *, rtt_s: float | None = None) -> None:
        """`rtt_s`: round-trip time between the ends that retransmit, if it exceeds that of this path."""
        now = through_at = trio.current_time()
        for number, link in enumerate(path, 1):
            begins, ends = link.send(now, size)
            through_at = max(through_at, ends)
            if begins > now and size > SMALL_BYTES and number < len(path):
                await self.alarms.until(begins)  # the next link first sends frames that reach it before then
            now = begins
        await self.alarms.until(through_at + latency_s + self._lost_s(size, rtt_s or 2 * latency_s))

    def _lost_s(self, size: int, rtt_s: float) -> float:
        """Delay by lost packets: TCP's mean rate under loss (Mathis et al., 1997), and its timeouts if one of the
        last packets is lost."""
        if not self.loss:
            return 0.0
        slow_s = size * rtt_s * math.sqrt(self.loss) / (1.22 * PACKET_BYTES)
        tail = min(TAIL_PACKETS, -(-size // PACKET_BYTES))
        lost = 0
        while lost < MOST_TIMEOUTS and self._rng.random() > (1 - self.loss) ** (tail if lost == 0 else 1):
            lost += 1
        return slow_s + TIMEOUT_S * ((1 << lost) - 1)
