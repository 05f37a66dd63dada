"""The parts that scenarios share: the site that most of them simulate, their options, and how a result is shown."""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import click
import trio
from rich.console import Console
from rich.table import Table

from protocol.errors import ShoalError
from protocol.ids import BLOCK_SIZE
from simulations.cluster import Cluster, Machine, Node
from simulations.network import SimulatedNetwork, constant, lognormal
from simulations.registry import Image, Registry
from simulations.run import Report, with_progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SetupT = TypeVar("SetupT")
Result = TypeVar("Result")

MBIT = 1e6 / 8
SITE = "site-0"
TICK_SHARE = 0.01
"""Resolution of the simulated clock, as a share of the time that one shard takes on a link."""

PAUSE_S, LONGEST_PAUSE_S, MAX_ATTEMPTS = 10.0, 300.0, 100
"""Pauses between attempts as in kubelet's ImagePullBackOff, and a bound for a run that never succeeds."""

image_option = click.option(
    "--image", type=click.IntRange(1), default=32_000_000, show_default=True, help="Bytes, in --layers equal layers."
)
layers_option = click.option("--layers", type=click.IntRange(1, 128), default=4, show_default=True)
rate_option = click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=40.0, show_default=True, help="Mbit/s of a node."
)
uplink_option = click.option(
    "--uplink", type=click.FloatRange(0, min_open=True), default=40.0, show_default=True, help="Mbit/s of a site."
)


def setting_options(work: Callable[..., None]) -> Callable[..., None]:
    """The options of a `Setting`, by the names of its fields."""
    return image_option(layers_option(rate_option(uplink_option(work))))


@dataclass(frozen=True, slots=True)
class Setting:
    """Nodes on equal links, and an image. Rates in Mbit/s, the image in bytes."""

    nodes: int = 1000
    seed: int = 1
    image: int = 32_000_000
    layers: int = 4
    rate: float = 40.0
    uplink: float = 40.0
    lan_ms: float = 0.2
    wan_ms: float = 10.0
    """Round-trip time, as `lan_ms` is."""

    def registry(self) -> Registry:
        return Registry(self.seed, constant(self.wan_ms / 1e3))

    def push(self, registry: Registry, tag: str = "v1") -> Image:
        return registry.push(tag, [self.image // self.layers] * self.layers)

    def cluster(self, registry: Registry, report: Callable[[int], None], *, sites: int = 1) -> Cluster:
        """`report` is called with a number of bytes each time a client receives some."""
        latency = lognormal(self.lan_ms / 2e3, self.lan_ms * 5 / 2e3)
        tick_s = TICK_SHARE * BLOCK_SIZE / 4 / (self.rate * MBIT)
        network = SimulatedNetwork(Random(f"network {self.seed}"), latency, tick_s=tick_s)
        for number in range(sites):
            network.uplink(f"site-{number}").down.rate = self.uplink * MBIT
        machine = Machine(self.rate * MBIT, self.rate * MBIT)
        return Cluster(self.seed, self.nodes, network, registry, machine=machine, sites=sites, report=report)


@asynccontextmanager
async def running(cluster: Cluster) -> AsyncIterator[trio.Nursery]:
    """Run the cluster in a nursery while the context lasts."""
    async with trio.open_nursery() as nursery:
        await cluster.start(nursery)
        yield nursery
        nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pull by one node, or one attempt. `error` is "" if the whole image arrived."""

    number: int
    began: float
    ended: float
    error: str = ""


async def pull_once(node: Node, image: Image) -> Pulled:
    began, failure = trio.current_time(), ""
    try:
        with node.client() as client:
            await node.pull(image)
        if client.cancelled_caught:
            failure = "the node stopped"
    except* ShoalError as group:
        failure = str(group.exceptions[0])
    return Pulled(node.number, began, trio.current_time(), failure)


async def pull_all(nodes: Iterable[Node], image: Image) -> list[Pulled]:
    """All nodes begin their pulls at the same moment."""
    pulls: list[Pulled] = []

    async def pull(node: Node) -> None:
        pulls.append(await pull_once(node, image))

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(pull, node)
    return pulls


def most_within(times: Sequence[float], seconds: float) -> int:
    """The largest number of `times` (sorted) in any window of `seconds`."""
    return max((number + 1 - bisect_left(times, at - seconds) for number, at in enumerate(times)), default=0)


async def pull_until_done(node: Node, image: Image) -> list[Pulled]:
    """Try again after a pause that doubles, as kubelet does. Returns all attempts, MAX_ATTEMPTS at most."""
    attempts = [await pull_once(node, image)]
    while attempts[-1].error and len(attempts) < MAX_ATTEMPTS:
        await trio.sleep(min(PAUSE_S * 2 ** (len(attempts) - 1), LONGEST_PAUSE_S))
        attempts.append(await pull_once(node, image))
    return attempts


def of_bytes(total: int, report: Report) -> Callable[[int], None]:
    """A callback for `Setting.cluster` in a run that ends when clients have received `total` bytes."""
    done = 0

    def note(count: int) -> None:
        nonlocal done
        done += count
        report(done / total)

    return note


def after(seconds: Sequence[float], share: float) -> float:
    """The time within which this share of the pulls ended: a quantile of `seconds`."""
    return sorted(seconds)[max(0, math.ceil(share * len(seconds)) - 1)]


@dataclass(frozen=True, slots=True)
class Output:
    """The form in which the user asked for a scenario's result."""

    name: str
    as_json: bool
    plot_path: Path | None

    def show(
        self,
        setup: SetupT,
        run: Callable[[SetupT, Report], Result],
        table_of: Callable[[SetupT, Result], Table],
        draw: Callable[[Result, Figure], None],
    ) -> None:
        result = with_progress(self.name, lambda report: run(setup, report))
        if self.plot_path is not None:
            _plot(self.plot_path, lambda figure: draw(result, figure))
        if self.as_json:
            click.echo(json.dumps({"what": _fields(setup), **_fields(result)}, indent=2))
        else:
            Console(width=100).print(table_of(setup, result))


def scenario(name: str, *, nodes: int) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command from a function with the parameters `output`, `nodes`, `seed` and its own options."""

    def made(work: Callable[..., None]) -> click.Command:
        @click.command(name)
        @click.option("--nodes", type=click.IntRange(1, 10_000), default=nodes, show_default=True)
        @click.option("--seed", type=int, default=1, show_default=True)
        @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
        @click.option(
            "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write an SVG or PNG."
        )
        @functools.wraps(work)
        def command(as_json: bool, plot_path: Path | None, **given: Any) -> None:
            work(output=Output(name, as_json, plot_path), **given)

        return command

    return made


def _fields(value: Any) -> dict[str, Any]:
    return asdict(value)


def _plot(path: Path, draw: Callable[[Figure], None]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    draw(figure)
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
