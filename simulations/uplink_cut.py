"""The uplink is cut in the middle of a flash crowd, and repaired later. Clients retry as kubelet does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import trio
from rich.table import Table

from simulations.run import Report, play
from simulations.scenario import (
    SITE,
    Output,
    Pulled,
    Setting,
    after,
    most_within,
    of_bytes,
    pull_until_done,
    running,
    scenario,
    setting_options,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class UplinkCut(Setting):
    at_s: float = 5.0
    cut_s: float = 120.0
    resets: bool = False
    """Whether connections over the uplink end at once, as at a gateway, or are silent."""

    @property
    def mended_s(self) -> float:
        return self.at_s + self.cut_s


@dataclass(frozen=True, slots=True)
class Result:
    """Times since the crowd began."""

    pulls: tuple[Pulled, ...]
    """All attempts of all nodes."""
    attempts: tuple[float, ...]
    """Requests to the registry, including those that never arrived."""
    copies: float
    cut: tuple[float, float]

    @property
    def seconds(self) -> list[float]:
        """The time at which each node had the whole image."""
        return [pull.ended for pull in self.pulls if not pull.error]

    @property
    def tried(self) -> list[float]:
        """Times of the requests while there was no uplink."""
        return [at for at in self.attempts if self.cut[0] <= at < self.cut[1]]


def run(setup: UplinkCut, report: Report) -> Result:
    async def main() -> Result:
        registry = setup.registry()
        image = setup.push(registry)
        cluster = setup.cluster(registry, of_bytes(image.size * setup.nodes, report))
        pulls: list[Pulled] = []
        async with running(cluster):
            began = trio.current_time()

            async def pull(number: int) -> None:
                for attempt in await pull_until_done(cluster.nodes[number], image):
                    pulls.append(Pulled(number, attempt.began - began, attempt.ended - began, attempt.error))

            async with trio.open_nursery() as pulling:
                for number in range(setup.nodes):
                    pulling.start_soon(pull, number)
                await trio.sleep(setup.at_s)
                cluster.network.cut_uplink(SITE, resets=setup.resets)
                await trio.sleep(setup.cut_s)
                cluster.network.mend_uplink(SITE)
        attempts = tuple(at - began for at, _ in registry.attempts)
        copies = registry.bytes_by_site[SITE] / image.size
        return Result(tuple(pulls), attempts, copies, (setup.at_s, setup.mended_s))

    return play(setup.seed, main)


def table_of(setup: UplinkCut, result: Result) -> Table:
    title = (
        f"uplink cut: {setup.nodes} nodes, {setup.image / 1e6:g} MB, cut from {setup.at_s:g} s to {setup.mended_s:g} s"
    )
    table = Table("", "", title=title, show_header=False)
    failed = [pull for pull in result.pulls if pull.error]
    longest_s = max((pull.ended - pull.began for pull in failed), default=0.0)
    table.add_row("pulls that failed", f"{len(failed)}, after {longest_s:.1f} s at most")
    for name, share in (("first", 0.0), ("median", 0.5), ("last", 1.0)):
        seconds = after(result.seconds, share)
        table.add_row(f"{name} completion", f"{seconds:.1f} s, {seconds - setup.mended_s:+.1f} s from the repair")
    most = most_within(result.tried, MINUTE_S)
    table.add_row(
        "attempts while it was cut", f"{len(result.tried)}, in a minute {most}: {most / setup.nodes:.1f} a node"
    )
    table.add_row("copies asked of the registry", f"{result.copies:.3f}")
    return table


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, sharex=True)
    nodes = len(result.seconds)
    left.plot(sorted(result.seconds), [number / nodes for number in range(1, nodes + 1)], "k-")
    left.set(xlabel="seconds (grey: no uplink)", ylabel="nodes that are done", ylim=(0, 1))
    right.hist(result.attempts, bins=60, color="k")
    right.set(xlabel="seconds", ylabel="attempts at the registry")
    for axes in (left, right):
        axes.axvspan(*result.cut, color="0.9")


@scenario("uplink-cut", nodes=100)
@setting_options
@click.option("--at", "at_s", type=click.FloatRange(0), default=5.0, show_default=True, help="Seconds until the cut.")
@click.option(
    "--cut", "cut_s", type=click.FloatRange(0), default=120.0, show_default=True, help="Seconds until the repair."
)
@click.option("--resets", is_flag=True, help="Connections end at once. Else they are silent.")
def uplink_cut(output: Output, **given: Any) -> None:
    """The uplink is cut in the middle of a flash crowd, and repaired later."""
    output.show(UplinkCut(**given), run, table_of, draw)
