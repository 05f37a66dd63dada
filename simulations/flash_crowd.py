"""All nodes of a site are cold and pull one image at the same moment."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import click
import trio
from rich.console import Console
from rich.table import Table

from simulations.cluster import Cluster, Machine
from simulations.network import SimulatedNetwork, constant, lognormal
from simulations.registry import Registry
from simulations.run import Told, play, with_progress

MBIT = 1e6 / 8
SITE = "site-0"
TICK_S = 0.0002
"""A shard takes from a hundred to a thousand times as long on these links."""


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
    """Both ways together, as all latencies here."""

    @property
    def limit_s(self) -> float:
        """The fluid limit, that no way to share the links can beat."""
        up, total = self.uplink * MBIT, self.image * self.nodes
        return max(self.image / up, self.image / (self.rate * MBIT), total / (up + self.nodes * self.rate * MBIT))


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

    def after(self, share: float) -> float:
        """Seconds until this share of the nodes was done."""
        return sorted(self.seconds)[max(0, math.ceil(share * len(self.seconds)) - 1)]

    @property
    def imbalance(self) -> float:
        """The most that a node sent over the mean."""
        return max(self.sent) / statistics.mean(self.sent)


def run(what: FlashCrowd, told: Told) -> Result:
    async def main() -> Result:
        latency = lognormal(what.lan_ms / 2e3, what.lan_ms * 5 / 2e3)
        network = SimulatedNetwork(Random(f"network {what.seed}"), latency, tick_s=TICK_S)
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


def table_of(what: FlashCrowd, result: Result) -> Table:
    title = f"flash crowd: {what.nodes} nodes, {what.image / 1e6:g} MB, {what.rate:g} Mbit/s, uplink {what.uplink:g}"
    table = Table("", "", title=title, show_header=False)
    table.add_row("fluid limit", f"{result.limit_s:.1f} s")
    for name, share in (("first", 0.0), ("median", 0.5), ("p99", 0.99), ("last", 1.0)):
        seconds = result.after(share)
        table.add_row(f"{name} completion", f"{seconds:.1f} s, {seconds / result.limit_s:.3f} of the limit")
    table.add_row("copies asked of the registry", f"{result.copies:.3f} in {result.origin_requests} requests")
    table.add_row("sent by a node, most over mean", f"{result.imbalance:.2f}")
    return table


def plot(result: Result, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    nodes = len(result.seconds)
    left.plot(sorted(result.seconds), [number / nodes for number in range(1, nodes + 1)], "k-")
    left.axvline(result.limit_s, linestyle=":", color="k")
    left.set(xlabel="seconds (dotted: the fluid limit)", ylabel="nodes that are done", xlim=(0, None), ylim=(0, 1))
    right.hist([count / result.image for count in result.sent], bins=30, color="k")
    right.set(xlabel="images sent by a node", ylabel="nodes")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


@click.command("flash-crowd")
@click.option("--nodes", type=click.IntRange(1, 10_000), default=1000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--image", type=click.IntRange(1), default=64_000_000, show_default=True, help="Bytes, in --layers equal layers."
)
@click.option("--layers", type=click.IntRange(1, 128), default=4, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=40.0, show_default=True, help="Mbit/s of a node."
)
@click.option(
    "--uplink", type=click.FloatRange(0, min_open=True), default=40.0, show_default=True, help="Mbit/s of the site."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write an SVG or PNG.")
def flash_crowd(
    nodes: int, seed: int, image: int, layers: int, rate: float, uplink: float, as_json: bool, plot_path: Path | None
) -> None:
    """All nodes of a site are cold and pull one image at the same moment."""
    what = FlashCrowd(nodes, seed, image, layers, rate, uplink)
    result = with_progress("flash-crowd", lambda told: run(what, told))
    if plot_path is not None:
        plot(result, plot_path)
    if as_json:
        click.echo(json.dumps({"what": asdict(what), **asdict(result)}, indent=2))
    else:
        Console(width=100).print(table_of(what, result))
