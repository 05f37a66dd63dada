"""All nodes of a site are cold and pull one image at the same moment."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio
from rich.table import Table

from simulations.run import Report, play
from simulations.scenario import (
    MBIT,
    SITE,
    Output,
    Setting,
    after,
    of_bytes,
    running,
    scenario,
    setting_options,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class FlashCrowd(Setting):
    @property
    def limit_s(self) -> float:
        """The fluid limit: no schedule of the links is faster."""
        up, total = self.uplink * MBIT, self.image * self.nodes
        return max(self.image / up, self.image / (self.rate * MBIT), total / (up + self.nodes * self.rate * MBIT))


@dataclass(frozen=True, slots=True)
class Result:
    seconds: tuple[float, ...]
    """Duration of each node's pull."""
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
        """Bytes sent by the busiest node over the mean."""
        return max(self.sent) / statistics.mean(self.sent)


def run(setup: FlashCrowd, report: Report) -> Result:
    async def main() -> Result:
        registry = setup.registry()
        image = setup.push(registry)
        cluster = setup.cluster(registry, of_bytes(image.size * setup.nodes, report))
        seconds = [0.0] * setup.nodes
        async with running(cluster):
            began = trio.current_time()
            before = list(cluster.sent())

            async def pull(number: int) -> None:
                await cluster.nodes[number].pull(image)
                seconds[number] = trio.current_time() - began

            async with trio.open_nursery() as pulling:
                for number in range(setup.nodes):
                    pulling.start_soon(pull, number)
            sent = tuple(after - earlier for after, earlier in zip(cluster.sent(), before, strict=True))
        return Result(
            tuple(seconds),
            setup.limit_s,
            origin_bytes=registry.bytes_by_site[SITE],
            origin_requests=len(registry.requests),
            sent=sent,
            image=image.size,
        )

    return play(setup.seed, main)


def table_of(setup: FlashCrowd, result: Result) -> Table:
    title = (
        f"flash crowd: {setup.nodes} nodes, {setup.image / 1e6:g} MB, {setup.rate:g} Mbit/s, uplink {setup.uplink:g}"
    )
    table = Table("", "", title=title, show_header=False)
    table.add_row("fluid limit", f"{result.limit_s:.1f} s")
    for name, share in (("first", 0.0), ("median", 0.5), ("p99", 0.99), ("last", 1.0)):
        seconds = after(result.seconds, share)
        table.add_row(f"{name} completion", f"{seconds:.1f} s, {seconds / result.limit_s:.3f} of the limit")
    table.add_row("copies asked of the registry", f"{result.copies:.3f} in {result.origin_requests} requests")
    table.add_row("sent by a node, most over mean", f"{result.imbalance:.2f}")
    return table


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    nodes = len(result.seconds)
    left.plot(sorted(result.seconds), [number / nodes for number in range(1, nodes + 1)], "k-")
    left.axvline(result.limit_s, linestyle=":", color="k")
    left.set(xlabel="seconds (dotted: the fluid limit)", ylabel="nodes that are done", xlim=(0, None), ylim=(0, 1))
    right.hist([count / result.image for count in result.sent], bins=30, color="k")
    right.set(xlabel="images sent by a node", ylabel="nodes")


@scenario("flash-crowd", nodes=1000)
@setting_options
def flash_crowd(output: Output, **given: Any) -> None:
    """All nodes of a site are cold and pull one image at the same moment."""
    output.show(FlashCrowd(**given), run, table_of, draw)
