"""Compares policies for reading a block from keepers whose answers take as long as those of a large cache's nodes.

Lambda published a week's medians of its cache tiers and, in figure 9, by how much reading 4 of 5 shards is faster than
reading 4 of 4 (Brooker et al., "On-demand Container Loading in AWS Lambda", USENIX ATC'23). Only the time of an answer
is simulated here: links have no limit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist
from typing import TYPE_CHECKING

import click
import trio
from rich.table import Table

from cache.store import READ_HERE
from node.blocks.values import Obtained, Stretch
from node.exchange.contract import Lane
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE, PeerId
from simulations.cluster import Cluster, Machine
from simulations.network import SMALL_BYTES, Latency, SimulatedNetwork, constant
from simulations.policies import Policy, Reader, hedged, k_of_all, k_of_k, one_peer, shipped
from simulations.registry import Registry, locator
from simulations.run import Report, play
from simulations.scenario import Output, after, running, scenario

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEERS = tuple(
    zip(
        (0.5, 0.686, 0.841, 0.888, 0.924, 0.974, 0.98726, 0.999),
        (0.55e-3, 0.614e-3, 0.690e-3, 0.745e-3, 0.812e-3, 1.146e-3, 1.533e-3, 3.7e-3),
        strict=True,
    )
)
"""Quantiles, as (share, seconds), of a keeper's answer with a shard: median and p99.9 as published. The others follow
from figure 9: with independent shards, 4 of 5 would cut the median of 4 of 4 by 11 %, its p90 by 35 % and its p95 by
47 %. Between these the distribution is smooth."""
P95_S = 0.96e-3
"""p95 of these answers. Hedged reads ask for a second copy after this time."""
REGISTRY = ((0.5, 36e-3), (0.999, 175e-3))
MISSING = 0.0006 / 0.3206
"""Share of blocks that no keeper had, among the reads that the node's own cache could not answer."""
SETTLED_S = 60.0
"""After this time a site no longer asks for blocks that keepers of an earlier view may hold."""
SPACING_S = 0.05
"""Pause after a read, in which its cancelled requests end."""
WARM_UP = 100
"""Reads that are not counted, in which the reader learns how its peers answer."""

K_OF_K, K_OF_ALL, URGENT, BULK = "4 of 4", "4 of 5", "shipped, urgent", "shipped, bulk"
MODES: dict[str, tuple[Policy, Lane]] = {
    "one copy": (one_peer, Lane.URGENT),
    "one copy, hedged": (hedged, Lane.URGENT),
    K_OF_K: (k_of_k, Lane.URGENT),
    K_OF_ALL: (k_of_all, Lane.URGENT),
    URGENT: (shipped, Lane.URGENT),
    BULK: (shipped, Lane.BULK),
}
COMPARED = (K_OF_ALL, URGENT)
"""Modes that are compared with 4 of 4 if keepers are slow together."""


@dataclass(frozen=True, slots=True)
class Tail:
    """`shared`: shares of the moments at which all keepers are equally fast or slow, as if they had one host or one
    switch. `slower`: factor by which a keeper's answers take longer than published."""

    nodes: int = 20
    seed: int = 1
    reads: int = 4000
    slower: float = 1.0
    shared: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    modes: tuple[str, ...] = tuple(MODES)
    blocks: int = 200


@dataclass(frozen=True, slots=True)
class Run:
    """`seconds`: duration of each read. `extra`: bytes received beyond those of the blocks, as a share of these."""

    seconds: tuple[float, ...]
    extra: float
    off_formula: float
    """Largest difference between the distribution of the reads' times and 5F^4 - 4F^5, where F is the distribution of
    the answers' times. It is meaningful for reads that ask for all five shards."""


@dataclass(frozen=True, slots=True)
class Result:
    runs: dict[str, Run]
    """Runs in which keepers are slow independently of each other."""
    p95_by_shared: dict[float, dict[str, float]]

    def cut(self, name: str, share: float) -> float:
        """The share by which a mode's quantile is below that of 4 of 4."""
        return 1 - after(self.runs[name].seconds, share) / after(self.runs[K_OF_K].seconds, share)


def through(points: Sequence[tuple[float, float]], slower: float = 1.0) -> Latency:
    """A latency with the quantiles `points`, as (share, seconds). Between them, and beyond, it is lognormal."""
    places = [NormalDist().inv_cdf(share) for share, _ in points]
    logs = [math.log(slower * seconds) for _, seconds in points]

    def draw(rng: Random) -> float:
        place = rng.gauss(0.0, 1.0)
        right = min(max(1, bisect_right(places, place)), len(places) - 1)
        slope = (logs[right] - logs[right - 1]) / (places[right] - places[right - 1])
        return math.exp(logs[right] + slope * (place - places[right]))

    return draw


class TierNetwork(SimulatedNetwork):
    """Answers with a body take the time that `latency` draws. Other messages take no time."""

    def __init__(self, rng: Random, latency: Latency, shared: float) -> None:
        super().__init__(rng, constant(0.0))
        self._answer, self._share = latency, shared
        self._for_all: float | None = None
        self.answers: list[float] = []

    def next_moment(self) -> None:
        self._for_all = self._answer(self._rng) if self._rng.random() < self._share else None

    async def travel(self, sender: PeerId, receiver: PeerId, size: int) -> None:
        if size > SMALL_BYTES:
            self.answers.append(self._answer(self._rng) if self._for_all is None else self._for_all)
            await trio.sleep(self.answers[-1])
        await super().travel(sender, receiver, size)


async def _fill(cluster: Cluster, stretch: Stretch, keepers: Sequence[PeerId]) -> None:
    """Have all keepers hold the whole block."""
    nodes = {node.peer: node for node in cluster.nodes}
    obtained: list[Obtained] = []
    await nodes[keepers[0]].blocks.home.blocks(stretch, lambda index, block: obtained.append(block))
    held, [index] = obtained[0].held, stretch.indices
    for peer in keepers[1:]:
        await nodes[peer].tiers.put(stretch.piece(index), held.data, held.record, kept_for=READ_HERE)


async def _timed(policy: Policy, reader: Reader, stretch: Stretch) -> float:
    began = trio.current_time()
    try:
        await policy(reader, stretch)
    except UnavailableError:
        await reader.blocks.home.blocks(stretch, lambda index, obtained: None)
    took_s = trio.current_time() - began
    await reader.blocks.site.tiers.discard(stretch.piece(stretch.indices[0]))
    return took_s


def _one(setup: Tail, mode: str, shared: float, report: Report) -> Run:
    policy, lane = MODES[mode]

    async def main() -> Run:
        rng = Random(f"reads {setup.seed}")
        network = TierNetwork(Random(f"network {setup.seed}"), through(PEERS, setup.slower), shared)
        registry = Registry(setup.seed, through(REGISTRY))
        missing = round(MISSING * setup.reads)
        [layer] = registry.push("v1", [(setup.blocks + missing) * BLOCK_SIZE]).layers
        cluster = Cluster(setup.seed, setup.nodes, network, registry, machine=Machine(math.inf, math.inf), readers=1)
        async with running(cluster):
            node = cluster.nodes[0]
            reader = Reader(node.blocks, lane, rng, lambda peer: setup.slower * P95_S, far=True)
            addresses = [Stretch(locator("blobs"), layer, (index,)) for index in range(layer.block_count)]
            cold, warm = addresses[:missing], addresses[missing:]
            for address in warm:
                await _fill(cluster, address, reader.route(address).keepers)
            reads = cold + rng.choices(warm, k=setup.reads - missing)
            rng.shuffle(reads)
            await trio.sleep(SETTLED_S)
            seconds = []
            for number, address in enumerate([*rng.choices(warm, k=WARM_UP), *reads]):
                if number == WARM_UP:
                    network.answers.clear()
                    before = network.port(node.peer).down.carried
                network.next_moment()
                seconds.append(await _timed(policy, reader, address))
                report(number / (WARM_UP + setup.reads))
                await trio.sleep(setup.slower * SPACING_S)
            received = network.port(node.peer).down.carried - before
        counted = seconds[WARM_UP:]
        extra = received / (setup.reads * BLOCK_SIZE) - 1
        return Run(tuple(counted), extra, _off_formula(counted, network.answers))

    return play(setup.seed, main)


def _off_formula(seconds: Sequence[float], answers: Sequence[float]) -> float:
    answers, count = sorted(answers), len(seconds)
    most = 0.0
    for number, took_s in enumerate(sorted(seconds)):
        f = bisect_right(answers, took_s) / len(answers)
        expected = 5 * f**4 - 4 * f**5
        most = max(most, abs(number / count - expected), abs((number + 1) / count - expected))
    return most


def run(setup: Tail, report: Report) -> Result:
    reads = [(mode, 0.0) for mode in setup.modes]
    reads += [(mode, shared) for shared in setup.shared for mode in (K_OF_K, *COMPARED)]
    runs = {
        (mode, shared): _one(setup, mode, shared, lambda share, done=number: report((done + share) / len(reads)))  # type: ignore[misc]
        for number, (mode, shared) in enumerate(reads)
    }
    p95: dict[float, dict[str, float]] = {}
    for (mode, shared), result in runs.items():
        p95.setdefault(shared, {})[mode] = after(result.seconds, 0.95)
    return Result({mode: runs[mode, 0.0] for mode in setup.modes}, p95)


def table_of(setup: Tail, result: Result) -> Table:
    shares = (0.5, 0.9, 0.95, 0.99, 0.999)
    table = Table(title=f"{setup.reads} reads of a block from {setup.nodes} nodes: milliseconds, against 4 of 4")
    for column in ("", *(f"p{100 * share:g}" for share in shares), "p95 cut by", "extra bytes"):
        table.add_column(column, justify="right" if column else "left")
    for name, reads in result.runs.items():
        times = [f"{1e3 * after(reads.seconds, share):.2f}" for share in shares]
        table.add_row(name, *times, f"{result.cut(name, 0.95):.0%}", f"{reads.extra:.1%}")
    table.add_section()
    for shared, p95 in result.p95_by_shared.items():
        cuts = ", ".join(f"{name} {1 - p95[name] / p95[K_OF_K]:.0%}" for name in COMPARED)
        table.add_row(f"slow together {shared:.0%}", *[""] * len(shares), cuts)
    table.add_section()
    table.add_row("off 5F^4 - 4F^5", f"{100 * result.runs[K_OF_ALL].off_formula:.1f} points")
    return table


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    beyond = [10 ** (-step / 15) for step in range(45)]
    for name, reads in result.runs.items():
        times = [1e3 * after(reads.seconds, 1 - share) for share in beyond]
        left.plot(times, beyond, "--" if name.startswith("one copy") else "-", label=name, linewidth=1)
    left.set(xlabel="milliseconds", ylabel="reads that take longer", xscale="log", yscale="log")
    left.minorticks_off()
    left.legend(fontsize="small")
    for name in COMPARED:
        cuts = [100 * (1 - p95[name] / p95[K_OF_K]) for p95 in result.p95_by_shared.values()]
        right.plot([100 * shared for shared in result.p95_by_shared], cuts, ".-", label=name)
    right.set(xlabel="moments at which all keepers are slow together, %", ylabel="cut off p95 of 4 of 4, %")
    right.legend(fontsize="small")


SLOWER = "Factor by which every answer of a keeper takes longer."


@scenario("tail", nodes=20)
@click.option("--reads", type=click.IntRange(100), default=4000, show_default=True)
@click.option("--slower", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help=SLOWER)
def tail(output: Output, nodes: int, seed: int, reads: int, slower: float) -> None:
    """Single blocks from keepers with a large cache's latencies: plain copies, hedged, 4 of 4, 4 of 5, as shipped."""
    output.show(Tail(nodes, seed, reads, slower), run, table_of, draw)
