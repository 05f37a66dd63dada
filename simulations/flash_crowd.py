"""All nodes of a site are cold and pull one image at the same moment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

import trio

from simulations.cluster import Cluster, Machine
from simulations.network import SimulatedNetwork, constant, lognormal
from simulations.registry import Registry
from simulations.run import Told, play

MBIT = 1e6 / 8
SITE = "site-0"


@dataclass(frozen=True, slots=True)
class FlashCrowd:
    """What is simulated. Rates in Mbit/s, the image in bytes."""

    nodes: int = 1000
    seed: int = 1
    image: int = 64_000_000
    layers: int = 4
    rate: float = 40.0
    uplink: float = 40.0
    lan_ms: float = 0.2
    wan_ms: float = 10.0
    """Both ways together."""

    @property
    def limit_s(self) -> float:
        """The fluid limit, that no way to share the links can beat."""
        up, total = self.uplink * MBIT, self.image * self.nodes
        return max(
            self.image / up, self.image / (self.rate * MBIT), total / (up + self.nodes * self.rate * MBIT)
        )


@dataclass(frozen=True, slots=True)
class Result:
    seconds: tuple[float, ...]
    """Of each node's pull."""
    limit_s: float
    origin_bytes: int
    origin_requests: int
    sent: tuple[int, ...]
    image: int

    @property
    def copies(self) -> float:
        return self.origin_bytes / self.image

    @property
    def imbalance(self) -> float:
        """The most that a node sent over the mean."""
        return max(self.sent) / statistics.mean(self.sent)


def run(what: FlashCrowd, told: Told) -> Result:
    async def main() -> Result:
        network = SimulatedNetwork(
            Random(f"network {what.seed}"), lognormal(what.lan_ms / 2e3, what.lan_ms * 5 / 2e3)
        )
        registry = Registry(what.seed, constant(what.wan_ms / 1e3))
        network.uplink(SITE).down.rate = what.uplink * MBIT
        image = registry.push("v1", [what.image // what.layers] * what.layers)
        done = 0

        def note(count: int) -> None:
            nonlocal done
            done += count
            told(done / (image.size * what.nodes))

        machine = Machine(what.rate * MBIT, what.rate * MBIT)
        cluster = Cluster(what.seed, what.nodes, network, registry, machine, told=note)
        seconds = [0.0] * what.nodes
        async with trio.open_nursery() as running:
            await cluster.start(running)
            began = trio.current_time()
            before = list(cluster.sent())

            async def pull(number: int) -> None:
                await cluster.nodes[number].pull(image)
                seconds[number] = trio.current_time() - began

            async with trio.open_nursery() as pulling:
                for number in range(what.nodes):
                    pulling.start_soon(pull, number)
            sent = tuple(after - earlier for after, earlier in zip(cluster.sent(), before, strict=True))
            running.cancel_scope.cancel()
        return Result(
            tuple(seconds), what.limit_s, registry.bytes_by_site[SITE], len(registry.requests), sent, image.size
        )

    return play(what.seed, main)
