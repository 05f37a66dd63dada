"""A site pulls steadily from warm caches; then all nodes restart at once with empty caches, under the same load."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import click
import trio
from rich.table import Table

from simulations.run import Report, play
from simulations.scenario import (
    Output,
    Pulled,
    Setting,
    after,
    most_within,
    pull_all,
    pull_once,
    running,
    scenario,
    setting_options,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM_S = 30.0
AGAIN_S = 1.0
"""Pause of a client whose pull was broken off, before it tries again."""


@dataclass(frozen=True, slots=True)
class ColdRestart(Setting):
    images: int = 4
    """Number of images of `image` bytes. A client pulls one at a time, drawn at random."""
    every_s: float = 20.0
    """Mean time between two pulls of a node."""
    cold_s: float = 120.0
    """Time simulated after the restart."""


@dataclass(frozen=True, slots=True)
class Result:
    """Times since the restart."""

    pulls: tuple[Pulled, ...]
    requests: tuple[float, ...]
    sent: tuple[tuple[float, int], ...]
    """Time and size of each part of a body that the registry sent."""
    size: int
    """Bytes of all images together."""

    @property
    def copies(self) -> float:
        """Copies of all images that the registry sent since the restart."""
        return sum(count for at, count in self.sent if at >= 0) / self.size

    def begun(self, since: float, until: float) -> list[Pulled]:
        return [pull for pull in self.pulls if since <= pull.began < until]


def run(setup: ColdRestart, report: Report) -> Result:
    async def main() -> Result:
        registry, rng = setup.registry(), Random(f"clients {setup.seed}")
        images = [setup.push(registry, f"v{number}") for number in range(setup.images)]
        cluster = setup.cluster(registry, lambda count: None)
        pulls: list[Pulled] = []

        async def client(number: int) -> None:
            pause_s = rng.uniform(0, setup.every_s)
            while True:
                await trio.sleep(pause_s)
                pulls.append(await pull_once(cluster.nodes[number], rng.choice(images)))
                pause_s = AGAIN_S if pulls[-1].error else rng.expovariate(1 / setup.every_s)

        async with running(cluster) as nursery, trio.open_nursery() as loading:
            for image in images:
                await pull_all(cluster.nodes, image)
            for number in range(setup.nodes):
                loading.start_soon(client, number)
            await trio.sleep(WARM_S)
            began = trio.current_time()
            await cluster.restart_all(nursery)
            for second in range(int(setup.cold_s)):
                await trio.sleep(1)
                report((second + 1) / int(setup.cold_s))
            loading.cancel_scope.cancel()
        return Result(
            tuple(Pulled(pull.number, pull.began - began, pull.ended - began, pull.error) for pull in pulls),
            tuple(at - began for at in registry.requests),
            tuple((at - began, count) for at, count in registry.sent),
            sum(image.size for image in images),
        )

    return play(setup.seed, main)


def table_of(setup: ColdRestart, result: Result) -> Table:
    title = (
        f"cold restart: {setup.nodes} nodes, {setup.images} images of {setup.image / 1e6:g} MB, "
        f"each node pulls every {setup.every_s:g} s on average"
    )
    table = Table("", "before", "after", title=title)
    warm, cold = result.begun(-WARM_S, 0), result.begun(0, setup.cold_s)
    table.add_row("pulls begun", str(len(warm)), str(len(cold)))
    table.add_row("of them failed", *(str(sum(bool(pull.error) for pull in pulls)) for pulls in (warm, cold)))
    for name, share in (("median", 0.5), ("longest", 1.0)):
        took = [after([pull.ended - pull.began for pull in pulls if not pull.error], share) for pulls in (warm, cold)]
        table.add_row(f"{name} pull", *(f"{seconds:.1f} s" for seconds in took))
    asked = [at for at in result.requests if at < 0 and at >= -WARM_S], [at for at in result.requests if at >= 0]
    table.add_row("requests to the registry", *(str(len(times)) for times in asked))
    table.add_row("most of them in a second", *(str(most_within(times, 1)) for times in asked))
    table.add_row("copies of all images", "", f"{result.copies:.3f}")
    return table


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, sharex=True)
    times, copies = [0.0], [0.0]
    for at, count in result.sent:
        if at >= 0:
            times.append(at)
            copies.append(copies[-1] + count / result.size)
    left.plot(times, copies, "k-")
    left.set(xlabel="seconds since the restart", ylabel="copies asked of the registry", ylim=(0, None))
    longest: dict[int, float] = {}
    for pull in result.begun(-WARM_S, float("inf")):
        second = int(pull.began // 1)
        longest[second] = max(longest.get(second, 0.0), pull.ended - pull.began)
    right.step(sorted(longest), [longest[second] for second in sorted(longest)], "k-", where="post")
    right.set(xlabel="second of a pull's begin", ylabel="seconds that the longest took", ylim=(0, None))


@scenario("cold-restart", nodes=100)
@setting_options
@click.option(
    "--images", type=click.IntRange(1, 100), default=4, show_default=True, help="Number of images, --image bytes each."
)
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Mean seconds between two pulls of a node.",
)
def cold_restart(output: Output, **given: Any) -> None:
    """All nodes of a busy site restart at once with empty caches."""
    output.show(ColdRestart(**given), run, table_of, draw)
