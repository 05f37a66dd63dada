"""Containers of one image start on all hosts at the same time, and each reads a small part of the image.

The setting is DADI's run in a cloud (Li et al., "DADI: Block-Level Image Service for Agile and Elastic Application
Deployment", USENIX ATC'20): 10,000 containers on 1,000 hosts read 15 MB of an image of 894 MB each, and took 3.01 s
cold and 2.91 s warm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import click
import trio
from rich.table import Table

from protocol.ids import BLOCK_SIZE, ObjectRef
from simulations.cluster import Node
from simulations.registry import Image, locator
from simulations.run import Report, play
from simulations.scenario import SITE, Output, Setting, after, of_bytes, running, scenario

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = tuple[ObjectRef, int, int]
"""A layer, and the bytes `[start, stop)` of it."""


@dataclass(frozen=True, slots=True)
class FleetStart(Setting):
    """`nodes` are hosts. A container reads `read` bytes, in runs of `run` bytes anywhere in the image, and spends
    `warm_s` on other work. `traced`: each host knows these runs from an earlier start, and reads them ahead."""

    image: int = 894_000_000
    layers: int = 6
    rate: float = 1500.0
    uplink: float = 10_000.0
    containers: int = 10
    read: int = 15_000_000
    run: int = 1_000_000
    warm_s: float = 2.91
    traced: bool = False

    def runs(self, image: Image) -> list[Run]:
        """The reads of a start in their order, the same for all containers."""
        rng, runs = Random(f"runs {self.seed}"), list[Run]()
        for start in range(0, self.read, self.run):
            layer = rng.choice(image.layers)
            length = min(self.run, self.read - start, layer.size)
            at = rng.randrange(layer.size - length + 1)
            runs.append((layer, at, at + length))
        return runs


@dataclass(frozen=True, slots=True)
class Result:
    seconds: tuple[float, ...]
    """Duration of each container's start."""
    needed: int
    """Bytes of the blocks that a start touches."""
    origin_bytes: int
    received: int
    """Bytes received by all hosts."""

    @property
    def copies(self) -> float:
        """Copies of these blocks that the registry sent."""
        return self.origin_bytes / self.needed


def _pauses(rng: Random, count: int, total_s: float) -> Iterator[float]:
    """Pauses before each of `count` reads and after the last: exponential, `total_s` in total."""
    shares = [rng.expovariate(1.0) for _ in range(count + 1)]
    return (total_s * share / sum(shares) for share in shares)


async def _start(node: Node, image: Image, runs: Sequence[Run], pauses: Iterator[float]) -> None:
    await node.library.resolve(locator("manifests"), image.tag)
    await node.read(image.manifest, "manifests")
    for (layer, start, stop), pause_s in zip(runs, pauses, strict=False):
        await trio.sleep(pause_s)
        await node.read(layer, span=(start, stop))
    await trio.sleep(next(pauses))


async def _host(setup: FleetStart, node: Node, image: Image, seconds: list[float]) -> None:
    runs = setup.runs(image)
    rng = Random(f"containers {setup.seed} {node.number}")
    began = trio.current_time()

    async def container() -> None:
        await _start(node, image, runs, _pauses(rng, len(runs), setup.warm_s))
        seconds.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for _ in range(setup.containers):
            nursery.start_soon(container)
        if setup.traced:
            for layer, start, stop in runs:
                await node.read(layer, span=(start, stop))


def run(setup: FleetStart, report: Report) -> Result:
    async def main() -> Result:
        registry = setup.registry()
        image = setup.push(registry)
        reads = setup.nodes * (setup.containers + setup.traced) * setup.read
        cluster = setup.cluster(
            registry, of_bytes(reads + setup.nodes * setup.containers * image.manifest.size, report)
        )
        seconds: list[float] = []
        async with running(cluster):
            before = sum(cluster.network.port(node.peer).down.carried for node in cluster.nodes)
            async with trio.open_nursery() as starting:
                for node in cluster.nodes:
                    starting.start_soon(partial(_host, setup, node, image, seconds))
            received = sum(cluster.network.port(node.peer).down.carried for node in cluster.nodes) - before
        blocks = {
            layer.block(index): layer.block_length(index)
            for layer, start, stop in setup.runs(image)
            for index in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
        }
        needed = sum(blocks.values()) + image.manifest.size
        return Result(tuple(seconds), needed, registry.bytes_by_site[SITE], received)

    return play(setup.seed, main)


def table_of(setup: FleetStart, result: Result) -> Table:
    links = f"{setup.rate:g} Mbit/s, uplink {setup.uplink:g}"
    title = f"{setup.nodes * setup.containers} containers on {setup.nodes} hosts, {links}"
    table = Table("", "", title=title, show_header=False)
    table.add_row("warm start", f"{setup.warm_s:.2f} s")
    for name, share in (("median", 0.5), ("p99", 0.99), ("last", 1.0)):
        table.add_row(f"{name} cold start", f"{after(result.seconds, share):.2f} s")
    table.add_row("read by a container", f"{setup.read / 1e6:g} MB of {setup.image / 1e6:g}")
    table.add_row("blocks that this touches", f"{result.needed / 1e6:.1f} MB")
    table.add_row("received by a host", f"{result.received / setup.nodes / 1e6:.1f} MB")
    table.add_row("copies asked of the registry", f"{result.copies:.3f}")
    return table


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    seconds = sorted(result.seconds)
    picked = range(0, len(seconds), max(1, len(seconds) // 300))
    axes.plot([seconds[i] for i in picked], [i / len(seconds) for i in picked], "k-")
    axes.set(xlabel="seconds from the start of all", ylabel="containers that are up", xlim=(0, None), ylim=(0, 1))


@scenario("fleet-start", nodes=1000)
@click.option("--containers", type=click.IntRange(1), default=10, show_default=True, help="Containers on each node.")
@click.option(
    "--run", "run_bytes", type=click.IntRange(1), default=1_000_000, show_default=True, help="Bytes read in a row."
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=1500.0, show_default=True, help="Mbit/s of a node."
)
@click.option(
    "--uplink", type=click.FloatRange(0, min_open=True), default=10_000.0, show_default=True, help="Mbit/s of the site."
)
@click.option("--traced", is_flag=True, help="Each host knows the reads of a start, and reads ahead.")
def fleet_start(
    output: Output, nodes: int, seed: int, containers: int, run_bytes: int, rate: float, uplink: float, traced: bool
) -> None:
    """Containers start on all nodes at once, and each reads the same 15 MB of an image of 894 MB."""
    setup = FleetStart(nodes, seed, rate=rate, uplink=uplink, containers=containers, run=run_bytes, traced=traced)
    output.show(setup, run, table_of, draw)
