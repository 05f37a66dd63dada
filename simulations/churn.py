"""Nodes die and return with empty caches while all nodes pull one image after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import click
import trio
from rich.table import Table

from protocol.ids import PeerId
from simulations.cluster import Cluster, Node
from simulations.registry import Image
from simulations.run import Report, play
from simulations.scenario import SITE, Output, Setting, after, pull_once, rate_option, running, scenario, uplink_option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MET = 2
"""Members whose addresses a returning node knows."""
ATTEMPTS, AGAIN_S = 10, 1.0
"""Attempts at a pull, and the pause between two of them."""
SETTLE_S = 60.0
"""Time simulated after the last change."""


@dataclass(frozen=True, slots=True)
class Churn(Setting):
    """A new image appears every `image_s`, and each node begins to pull it in the first half of that time. A returning
    node also pulls the newest image. A node dies every `change_s` on average, and returns after `away_s`."""

    nodes: int = 40
    image: int = 16_000_000
    images: int = 8
    image_s: float = 60.0
    change_s: float = 10.0
    away_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Result:
    """`deaths` and `returns`: seconds from each change until every living node's view was right about it; a returning
    node must also see all others. `quiet` is the same run without changes."""

    seconds: tuple[float, ...]
    """Duration of each pull that ended, including attempts that failed."""
    failed: int
    """Attempts that failed."""
    cut_off: int
    """Pulls that ended with the death of their own node."""
    copies: float
    """Copies of all images that the registry sent."""
    deaths: tuple[float, ...] = ()
    returns: tuple[float, ...] = ()
    unsettled: int = 0
    """Changes about which some view was wrong at the end."""
    quiet: Result | None = None


@dataclass(slots=True)
class _Change:
    peer: PeerId
    is_there: bool
    at: float
    wrong: set[PeerId]
    """The nodes whose view is wrong about it."""


class _Views:
    """Watches whether the living nodes' views are right about each change."""

    def __init__(self, nodes: list[Node]) -> None:
        self._living = {node.peer for node in nodes}
        self.open: list[_Change] = []
        self.settled: dict[bool, list[float]] = {False: [], True: []}

    def changed(self, node: Node, *, is_there: bool) -> None:
        (self._living.add if is_there else self._living.discard)(node.peer)
        if not is_there:
            for change in self.open:
                change.wrong.discard(node.peer)
        self.open.append(_Change(node.peer, is_there, trio.current_time(), set(self._living)))

    async def watch(self, node: Node) -> None:
        while True:
            self._look(node.peer, {member.peer_id for member in node.membership.site})
            await node.membership.wait_changed()

    def _look(self, viewer: PeerId, seen: set[PeerId]) -> None:
        for change in self.open:
            right = self._living <= seen if viewer == change.peer else (change.peer in seen) == change.is_there
            if right:
                change.wrong.discard(viewer)
        for change in [change for change in self.open if not change.wrong]:
            self.open.remove(change)
            self.settled[change.is_there].append(trio.current_time() - change.at)


class _Site:
    """The nodes, their clients, and the results."""

    def __init__(
        self, setup: Churn, cluster: Cluster, images: list[Image], nursery: trio.Nursery, report: Report
    ) -> None:
        self._setup, self._cluster, self._images = setup, cluster, images
        self._nursery, self._report = nursery, report
        self._rng = Random(f"churn {setup.seed}")
        self._dead: set[int] = set()
        self._pulling: set[int] = set()
        self._began = trio.current_time()
        self.views = _Views(cluster.nodes)
        self.seconds: list[float] = []
        self.failed = self.cut_off = 0
        for node in cluster.nodes:
            nursery.start_soon(self._live, node, 0)

    async def _live(self, node: Node, first: int) -> None:
        """Run a node's clients until it dies. `first` is the number of the first image that they pull."""
        with node.client():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.views.watch, node)
                for number in range(first, len(self._images)):
                    await trio.sleep_until(self._began + self._setup.image_s * (number + self._rng.uniform(0.0, 0.5)))
                    await self._pull(node, self._images[number])

    async def _pull(self, node: Node, image: Image) -> None:
        began = trio.current_time()
        self._pulling.add(node.number)
        for _ in range(ATTEMPTS):
            if not (await pull_once(node, image)).error:
                break
            self.failed += 1
            await trio.sleep(AGAIN_S)
        self._pulling.discard(node.number)
        self.seconds.append(trio.current_time() - began)
        self._report(min(1.0, len(self.seconds) / (self._setup.nodes * self._setup.images)))

    async def change(self) -> None:
        """Let nodes die and return until the time of the last image is over."""
        until = self._began + self._setup.image_s * self._setup.images
        while (at := trio.current_time() + self._rng.expovariate(1.0) * self._setup.change_s) < until:
            await trio.sleep_until(at)
            changing = {change.peer for change in self.views.open}
            victims = [
                node for node in self._cluster.nodes if node.number not in self._dead and node.peer not in changing
            ]
            self._nursery.start_soon(self._die, self._rng.choice(victims))
        await trio.sleep_until(until + SETTLE_S)

    async def _die(self, node: Node) -> None:
        """Kill a node, and restart it later. Half of the deaths are silent: requests then wait and are not refused."""
        network, number = self._cluster.network, node.number
        self._dead.add(number)
        self.cut_off += number in self._pulling
        self._pulling.discard(number)
        self.views.changed(node, is_there=False)
        if self._rng.random() < 0.5:
            network.stop(node.peer)
            for client in node.clients:
                client.cancel()
        else:
            node.stop()
        await trio.sleep(self._setup.away_s)
        node.stop()
        await trio.sleep(0.0)
        network.resume(node.peer)
        met = self._rng.sample([other for other in self._cluster.nodes if other.number not in self._dead], MET)
        self._dead.discard(number)
        node = await self._cluster.restart(number, self._nursery, met=met)
        self.views.changed(node, is_there=True)
        newest = int((trio.current_time() - self._began) / self._setup.image_s)
        self._nursery.start_soon(self._live, node, newest)


def _play(setup: Churn, report: Report) -> Result:
    async def main() -> Result:
        registry = setup.registry()
        images = [setup.push(registry, f"v{number}") for number in range(setup.images)]
        cluster = setup.cluster(registry, lambda count: None)
        async with running(cluster) as nursery:
            site = _Site(setup, cluster, images, nursery, report=report)
            await site.change()
        copies = registry.bytes_by_site[SITE] / sum(image.size for image in images)
        settled = site.views.settled
        return Result(
            tuple(site.seconds),
            site.failed,
            site.cut_off,
            copies,
            deaths=tuple(settled[False]),
            returns=tuple(settled[True]),
            unsettled=len(site.views.open),
        )

    return play(setup.seed, main)


def run(setup: Churn, report: Report) -> Result:
    changed = _play(setup, lambda share: report(share / 2))
    quiet = _play(replace(setup, change_s=math.inf), lambda share: report((1 + share) / 2))
    return replace(changed, quiet=quiet)


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    times = ", ".join(f"p{100 * share:g} {after(seconds, share):.1f}" for share in (0.5, 0.95, 0.99))
    return f"{len(seconds)}: {times}, longest {max(seconds):.1f} s"


def table_of(setup: Churn, result: Result) -> Table:
    table = Table(
        "", "", title=f"{setup.nodes} nodes, one dies every {setup.change_s:g} s on average", show_header=False
    )
    assert result.quiet is not None
    for name, part in (("", result), (" without changes", result.quiet)):
        table.add_row(f"pulls{name}", _percentiles(part.seconds))
        table.add_row(f"copies of each image{name}", f"{part.copies:.3f}")
        table.add_row(f"attempts that failed{name}", f"{part.failed}")
    table.add_row("pulls that their node's death ended", f"{result.cut_off}")
    table.add_row("until all views are right about a death", _percentiles(result.deaths))
    table.add_row("about a return", _percentiles(result.returns))
    table.add_row("changes that some view missed", f"{result.unsettled}")
    return table


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    assert result.quiet is not None
    for name, seconds in (("with changes", result.seconds), ("without", result.quiet.seconds)):
        left.plot(sorted(seconds), [number / len(seconds) for number in range(1, len(seconds) + 1)], label=name)
    left.set(xlabel="seconds of a pull", ylabel="pulls that are done", xlim=(0, None), ylim=(0, 1))
    left.legend()
    for name, seconds in (("deaths", result.deaths), ("returns", result.returns)):
        right.plot(sorted(seconds), [number / len(seconds) for number in range(1, len(seconds) + 1)], label=name)
    right.set(xlabel="seconds until all views are right", ylabel="changes", xlim=(0, None), ylim=(0, 1))
    right.legend()


@scenario("churn", nodes=40)
@click.option(
    "--every",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Mean seconds between two deaths.",
)
@rate_option
@uplink_option
def churn(output: Output, nodes: int, seed: int, every: float, rate: float, uplink: float) -> None:
    """Nodes die and return with empty caches while all nodes pull one image after the other."""
    output.show(Churn(nodes, seed, rate=rate, uplink=uplink, change_s=every), run, table_of, draw)
