"""Two sites with one registry and an uplink each pull the same image. The second site may begin later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import trio
from rich.table import Table

from simulations.run import Report, play
from simulations.scenario import (
    Output,
    Setting,
    after,
    of_bytes,
    pull_all,
    running,
    scenario,
    setting_options,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITES = ("site-0", "site-1")


@dataclass(frozen=True, slots=True)
class TwoSites(Setting):
    later_s: float = 0.0
    """Seconds until the second site begins."""


@dataclass(frozen=True, slots=True)
class AtSite:
    name: str
    seconds: tuple[float, ...]
    """Duration of each node's pull."""
    copies: float
    sent: int
    """Bytes to the other site, including gossip."""


@dataclass(frozen=True, slots=True)
class Result:
    sites: tuple[AtSite, ...]


def run(setup: TwoSites, report: Report) -> Result:
    async def main() -> Result:
        registry = setup.registry()
        image = setup.push(registry)
        cluster = setup.cluster(registry, of_bytes(image.size * setup.nodes, report), sites=len(SITES))
        outcomes: dict[str, AtSite] = {}

        async def pull(site: str, later_s: float) -> None:
            await trio.sleep(later_s)
            pulls = await pull_all([node for node in cluster.nodes if node.own.site == site], image)
            assert not any(pull.error for pull in pulls)
            seconds = tuple(pull.ended - pull.began for pull in pulls)
            sent = cluster.network.uplink(site).up.carried
            outcomes[site] = AtSite(site, seconds, registry.bytes_by_site[site] / image.size, sent)

        async with running(cluster), trio.open_nursery() as pulling:
            for number, site in enumerate(SITES):
                pulling.start_soon(pull, site, number * setup.later_s)
        return Result(tuple(outcomes[site] for site in SITES))

    return play(setup.seed, main)


def table_of(setup: TwoSites, result: Result) -> Table:
    title = (
        f"two sites: {setup.nodes} nodes, {setup.image / 1e6:g} MB, uplinks {setup.uplink:g}, {setup.later_s:g} s apart"
    )
    table = Table("", *(site.name for site in result.sites), title=title)
    for name, share in (("median", 0.5), ("last", 1.0)):
        table.add_row(f"{name} completion", *(f"{after(site.seconds, share):.1f} s" for site in result.sites))
    table.add_row("copies asked of the registry", *(f"{site.copies:.3f}" for site in result.sites))
    table.add_row("bytes to the other site", *(f"{site.sent:,}" for site in result.sites))
    return table


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    for site, style in zip(result.sites, ("k-", "k--"), strict=True):
        nodes = len(site.seconds)
        shares = [number / nodes for number in range(1, nodes + 1)]
        axes.plot(sorted(site.seconds), shares, style, label=f"{site.name}: {site.copies:.2f} copies")
    axes.set(xlabel="seconds", ylabel="nodes that are done", xlim=(0, None), ylim=(0, 1))
    axes.legend()


@scenario("two-sites", nodes=100)
@setting_options
@click.option(
    "--later", "later_s", type=click.FloatRange(0), default=0.0, show_default=True, help="Delay of site-1 in seconds."
)
def two_sites(output: Output, **given: Any) -> None:
    """Two sites, each with its own uplink, pull one image."""
    output.show(TwoSites(**given), run, table_of, draw)
