"""A site under load, compared with the limit that its links set: `python -m tests.benchmarks.site [SCENARIO...]`.

Each node is a p2pd in a network namespace of its own, with links shaped by the kernel; a docker-registry is behind the
uplink. N nodes cannot pull an image of F bytes in less than the fluid limit T_min = max(F/u_origin, F/d_min,
N*F/(u_origin + sum of u_i)). It counts no headers. Ethernet, IP and TCP take 4.6 % of a link: 1.05 T_min is reachable.

Needs root (namespaces), iproute2 and docker-registry.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from operator import sub
from pathlib import Path

import click
import trio
from rich.table import Table

from tests.support import image as images
from tests.support import processes
from tests.support import registry as registries
from tests.support.bench_site import MB, MBIT, REPOSITORY, Bench, bench_site, console, noise_image
from tests.support.lab import NoLabError, Rates, check_lab
from tests.support.lab_client import Client
from tests.support.pull import PullFailedError
from tests.support.site import start_all, wait_joined
from tests.support.versions import Comparison, Version, versions


@dataclass(frozen=True, slots=True)
class Counters:
    """Processor time and bytes of a node. `origin` is read from the registry; `wire` arrived on its link."""

    cpu_s: float
    received: int
    sent: int
    origin: int
    wire: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*map(sub, astuple(self), astuple(other)))


def read_counters(bench: Bench, index: int) -> Counters:
    node = bench.nodes[index]
    status = node.status()
    return Counters(
        cpu_s=node.cpu_s(),
        received=status["bulk"]["bytes_received"],
        sent=status["bulk"]["bytes_sent"],
        origin=status["origin_bytes"],
        wire=bench.lab.received(index),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a crowd of pulls. `size` is the image's, `limit_s` the fluid limit, `seconds` those of each pull.

    `used` has the resources of each node, and `resumed` counts the bodies that were cut and requested again."""

    name: str
    size: int
    limit_s: float
    seconds: Sequence[float]
    origin_bytes: int
    used: list[Counters] = field(default_factory=list)
    resumed: int = 0

    @property
    def last(self) -> float:
        return max(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor time of all daemons for each GB that the clients received."""
        return sum(node.cpu_s for node in self.used) / (self.size * len(self.seconds) / 1e9)

    def row(self) -> list[str]:
        size, count = self.size, len(self.seconds)
        row = [self.name, str(count), f"{size / MB:.0f}", f"{self.limit_s:.1f}", f"{self.last:.1f}"]
        row += [f"{part:.3f}" for part in (self.last / self.limit_s, self.median / self.limit_s)]
        row += [f"{self.origin_bytes / size:.3f}", str(self.resumed)]
        if not self.used:
            return row
        received = max(node.received + node.origin for node in self.used)
        sent = sum(node.sent + node.origin for node in self.used)
        shares = (received / size, max(node.wire for node in self.used) / size, sent / size / count)
        return [*row, *(f"{share:.3f}" for share in shares), f"{self.cpu_s_per_gb:.1f}"]


COLUMNS = ["N", "MB", "T_min s", "last s", "last/T_min", "median/T_min", "copies", "cut"]
USED = ["received\nmax/image", "on the wire\nmax/image", "sent/needed", "CPU s/GB"]
"""Columns that are empty where no node's use was counted."""


def table_of(outcomes: Sequence[Outcome], title: str) -> Table:
    table = Table("scenario", title=title, title_justify="left")
    for column in (*COLUMNS, *USED):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        table.add_row(*outcome.row())
    return table


def fluid_limit(size: int, count: int, rates: Rates) -> float:
    """T_min in seconds, for `count` nodes that all pull `size` bytes which only the registry has."""
    bits = size * 8
    return max(bits / rates.uplink, bits / rates.node, count * bits / (rates.uplink + count * rates.node))


@dataclass(frozen=True, slots=True)
class Crowd:
    """The nodes `indices`. Their clients pull an image of `size` bytes by `tag` at the same time."""

    name: str
    tag: str
    size: int
    indices: Sequence[int]
    limit_s: float

    def pull(self, bench: Bench, meanwhile: Callable[[trio.Nursery], None] | None = None) -> Outcome:
        clients = [bench.through_mirror(index, self.tag) for index in self.indices]
        before = [read_counters(bench, index) for index in self.indices]
        outcome = self.pull_by(clients, bench, meanwhile)
        used = [read_counters(bench, index) - own for index, own in zip(self.indices, before, strict=True)]
        return replace(outcome, used=used)

    def pull_by(
        self, clients: Sequence[Client], bench: Bench, meanwhile: Callable[[trio.Nursery], None] | None = None
    ) -> Outcome:
        """Pull by these clients, without counting the resources of the nodes."""
        bench.proxy.reset()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(client.pull)
                if meanwhile is not None:
                    meanwhile(nursery)

        trio.run(main)
        seconds, resumed = [client.seconds for client in clients], sum(client.resumed for client in clients)
        copies = bench.proxy.count.received
        return Outcome(self.name, self.size, self.limit_s, seconds=seconds, origin_bytes=copies, resumed=resumed)


# Scenarios


@dataclass(frozen=True, slots=True)
class Store:
    """A registry's folder with the images of all scenarios, by tag, in one repository."""

    folder: Path
    images: dict[str, images.Image]

    def size(self, tag: str) -> int:
        return self.images[tag].size

    def crowd(self, name: str, tag: str, indices: Sequence[int], limit_s: float) -> Crowd:
        return Crowd(name, tag, self.size(tag), indices=indices, limit_s=limit_s)


STRAGGLERS = ("healthy", "slow", "stopped", "killed", "garbage")


def make_store(scratch: Path, scale: float, wanted: Sequence[str]) -> Store:
    """Make the images of the tags `wanted`. All layers of v2 except one are those of v1."""
    parts = {"v1": (1, 2, 3, 4), "v2": (5, 2, 3, 4), "straight": (1,), "wave": (7, 8)}
    parts |= {trouble: (20 + n, 30 + n) for n, trouble in enumerate(STRAGGLERS)}
    parts |= {tag: (40 + n,) for n, tag in enumerate(tag for tag in wanted if tag.startswith("crowd-"))}
    sizes = {1: 10, 2: 20, 3: 30, 4: 40, 5: 10, 7: 10, 8: 10} | dict.fromkeys(range(20, 40), 20)
    sizes |= dict.fromkeys(range(40, 60), 8)
    built = {
        tag: noise_image(scratch / f"image-{tag}", *((n, int(sizes[n] * scale * MB)) for n in parts[tag]))
        for tag in wanted
    }
    with registries.docker_registry(scratch / "registry") as registry:
        for tag, image in built.items():
            registries.push(registry, image, REPOSITORY, tag)
    for tag in wanted:
        shutil.rmtree(scratch / f"image-{tag}")
    return Store(scratch / "registry", built)


def flash(scratch: Path, store: Store) -> list[Outcome]:
    """Ten cold nodes at once, with equal links and with a slow uplink; the next version, one node after the other."""
    rates, everyone = Rates(40 * MBIT, 40 * MBIT), range(10)
    with bench_site(scratch / "flash", store.folder, 10, rates) as bench:
        limit_s = fluid_limit(store.size("v1"), 10, rates)
        outcomes = [store.crowd("flash crowd", "v1", everyone, limit_s).pull(bench), rolling_update(bench, store)]
        limit_s = 10 * store.size("straight") * 8 / rates.uplink
        straight = store.crowd("straight from the registry (limit 10 F/u)", "straight", everyone, limit_s)
        outcomes.append(straight.pull_by([bench.straight(index, "straight") for index in everyone], bench))
    rates = Rates(40 * MBIT, 10 * MBIT)
    with bench_site(scratch / "edge", store.folder, 10, rates) as bench:
        limit_s = fluid_limit(store.size("v1"), 10, rates)
        outcomes.append(store.crowd("flash crowd, uplink 10 Mbit/s", "v1", everyone, limit_s).pull(bench))
    return outcomes


LINKS = {
    "links-20": (10, Rates(20 * MBIT, 20 * MBIT)),
    "links-40": (10, Rates(40 * MBIT, 40 * MBIT)),
    "links-100": (10, Rates(100 * MBIT, 100 * MBIT)),
    "links-100-five": (5, Rates(100 * MBIT, 100 * MBIT)),
    "uplink-10": (10, Rates(40 * MBIT, 10 * MBIT)),
}
"""The number of nodes, and the links, of the flash crowds that can be compared with those of another commit."""


def links(name: str, scratch: Path, store: Store, compared: Sequence[Version], runs: int) -> Comparison:
    """A flash crowd of each version in turn, each on a new site."""
    count, rates = LINKS[name]
    limit_s = fluid_limit(store.size("v1"), count, rates)
    comparison = Comparison()
    for number, version in itertools.product(range(runs), compared):
        folder = scratch / f"{name}-{number}-{version.name}"
        with bench_site(folder, store.folder, count, rates, code=version.code) as bench:
            outcome = store.crowd(name, "v1", range(count), limit_s).pull(bench)
        shutil.rmtree(folder)
        sent = sum(node.sent + node.origin for node in outcome.used)
        figures = {"last / T_min": outcome.last / limit_s, "median / T_min": outcome.median / limit_s}
        figures |= {"CPU s/GB": outcome.cpu_s_per_gb, "copies": outcome.origin_bytes / outcome.size}
        comparison.add(version, figures | {"sent / needed": sent / outcome.size / count})
    return comparison


def rolling_update(bench: Bench, store: Store) -> Outcome:
    """The pulls of all nodes as a single outcome. Its limit is that of the first node."""
    changed = store.images["v2"].layers[0].size
    limit_s = changed * 8 / bench.lab.rates.uplink
    outcomes = [store.crowd("", "v2", (index,), limit_s).pull(bench) for index in range(len(bench.nodes))]
    return Outcome(
        "rolling update, 10 % changed",
        changed,
        limit_s,
        seconds=[outcome.last for outcome in outcomes],
        origin_bytes=sum(outcome.origin_bytes for outcome in outcomes),
        used=[outcome.used[0] for outcome in outcomes],
    )


class Results:
    """The outcomes of a scenario's crowds, and the messages of failed pulls."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.failures: list[str] = []

    def note(self, name: str, run: Callable[[], Outcome]) -> None:
        try:
            self.outcomes.append(run())
        except* PullFailedError as group:
            self.failures.append(f"{name}: {_first(group)}")

    def show(self, title: str) -> None:
        console.print(table_of(self.outcomes, title))
        for failure in self.failures:
            console.print(f"[bold red]FAILED[/] {failure}", soft_wrap=True)


def stragglers(scratch: Path, store: Store) -> Results:
    """Five keepers: the last one is slow, stops, dies or lies while the other four pull."""
    rates, results = Rates(40 * MBIT, 40 * MBIT), Results()
    with bench_site(scratch / "straggler", store.folder, 5, rates) as bench:
        for trouble in STRAGGLERS:
            name = f"one of five keepers {trouble}"

            def pull(trouble: str = trouble, name: str = name) -> Outcome:
                limit_s = fluid_limit(store.size(trouble), 4, rates)
                with troubled(bench, trouble) as later:
                    return store.crowd(name, trouble, range(4), limit_s).pull(bench, later)

            results.note(name, pull)
    return results


def _first(group: BaseExceptionGroup[PullFailedError]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)[:300]


AFTER_S = 2.0
"""Time from the start of the pull to the fault, which then falls into the middle of the pull."""


@contextlib.contextmanager
def troubled(bench: Bench, trouble: str) -> Iterator[Callable[[trio.Nursery], None] | None]:
    """Yields a function to call at the start of the pull, which starts the fault. The end of the context repairs it."""
    node, index = bench.nodes[-1], len(bench.nodes) - 1

    async def befall() -> None:
        await trio.sleep(AFTER_S)
        (node.pause if trouble == "stopped" else node.kill)()

    if trouble == "slow":
        bench.lab.set_node_rate(index, bench.lab.rates.node / 50)
    elif trouble == "garbage":
        node.stop()
        node.program = [sys.executable, "-m", "tests.support.liar"]
        start_all([node], len(bench.nodes))
    try:
        yield (lambda nursery: nursery.start_soon(befall)) if trouble in ("stopped", "killed") else None
    finally:
        if trouble == "slow":
            bench.lab.set_node_rate(index, bench.lab.rates.node)
        elif trouble == "stopped":
            node.resume()
            wait_joined(bench.nodes, len(bench.nodes))
        elif trouble == "killed":
            node.start()
            wait_joined(bench.nodes, len(bench.nodes))


def second_wave(scratch: Path, store: Store) -> list[Outcome]:
    """Five nodes pull the image; then the registry is cut off, and five more nodes join and pull."""
    rates = Rates(40 * MBIT, 40 * MBIT)
    with bench_site(scratch / "wave", store.folder, 10, rates, start=False) as bench:
        start_all(bench.nodes[:5])
        limit_s = fluid_limit(store.size("wave"), 5, rates)
        first = store.crowd("first wave", "wave", range(5), limit_s).pull(bench)
        start_all(bench.nodes[5:], 10)
        bench.proxy.cut()
        # Five nodes that hold all of it send it to five that hold nothing.
        limit_s = store.size("wave") * 8 / rates.node
        return [first, store.crowd("second wave, no registry", "wave", range(5, 10), limit_s).pull(bench)]


def growth(scratch: Path, store: Store, counts: Sequence[int]) -> Results:
    """A growing site. At each size all nodes pull a new image, over links that are slower than this machine."""
    rates, results = Rates(240 / max(counts) * MBIT, 240 / max(counts) * MBIT), Results()
    with bench_site(scratch / "growth", store.folder, max(counts), rates, start=False) as bench:
        for before, count in itertools.pairwise([0, *counts]):
            start_all(bench.nodes[before:count], count)

            def pull(count: int = count) -> Outcome:
                limit_s = fluid_limit(store.size(f"crowd-{count}"), count, rates)
                return store.crowd("growth", f"crowd-{count}", range(count), limit_s).pull(bench)

            results.note(f"growth, {count} nodes at {rates.node / MBIT:g} Mbit/s", pull)
    return results


def plot_growth(outcomes: Sequence[Outcome], target: Path) -> None:
    from matplotlib import pyplot

    counts = [len(outcome.seconds) for outcome in outcomes]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    left.plot(counts, [outcome.last / outcome.limit_s for outcome in outcomes], "o-", label="last completion / T_min")
    left.plot(counts, [outcome.median / outcome.limit_s for outcome in outcomes], "o-", label="median / T_min")
    left.plot(
        counts, [outcome.origin_bytes / outcome.size for outcome in outcomes], "o-", label="copies from the registry"
    )
    left.set_ylim(bottom=0)
    left.legend()
    right.plot(counts, [outcome.cpu_s_per_gb for outcome in outcomes], "o-", label="CPU s/GB of each node")
    right.set_ylim(bottom=0)
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("nodes that pull at once")
    figure.tight_layout()
    figure.savefig(target)


SCENARIOS = {"flash": ("v1", "v2", "straight"), "stragglers": STRAGGLERS, "wave": ("wave",), "growth": ()}
"""The tags that each scenario pulls; `growth` has a tag for each size."""
ALL = SCENARIOS | dict.fromkeys(LINKS, ("v1",))


@click.command()
@click.argument("scenarios", nargs=-1, type=click.Choice(list(ALL)))
@click.option("--against", help="For the LINKS: a commit of this repository to compare with.")
@click.option("--commit", help="For the LINKS: measure this commit, and not the files of this tree.")
@click.option("--runs", default=3, show_default=True, help="For the LINKS: runs of each version, for medians.")
@click.option("--scale", default=1.0, show_default=True, help="Factor of all image sizes.")
@click.option("--counts", default="5,10,20,40", show_default=True, help="Nodes in `growth`.")
@click.option("--plot", type=click.Path(path_type=Path), help="File for the plot of `growth`, SVG or PNG.")
def main(
    scenarios: tuple[str, ...],
    against: str | None,
    commit: str | None,
    *,
    runs: int,
    scale: float,
    counts: str,
    plot: Path | None,
) -> None:
    """Without a SCENARIO: all but the LINKS, from links-20 to uplink-10. The exit status is 1 if a pull failed."""
    try:
        check_lab()
    except NoLabError as error:
        sys.exit(f"site benchmark: {error}")
    chosen = scenarios or tuple(SCENARIOS)
    sizes = sorted({int(count) for count in counts.split(",")})
    failures: list[str] = []
    with processes.scratch() as scratch:
        tags = list(dict.fromkeys(tag for name in chosen for tag in ALL[name]))
        tags += [f"crowd-{count}" for count in sizes if "growth" in chosen]
        store = make_store(scratch, scale, tags)
        compared = versions(against, commit, scratch)
        for name in (name for name in chosen if name in LINKS):
            console.print(links(name, scratch, store, compared, runs).table(f"{name}, median of {runs}"))
        if "flash" in chosen:
            console.print(table_of(flash(scratch, store), "Flash crowd and update, 40 Mbit/s a node, uplink 40 Mbit/s"))
        if "stragglers" in chosen:
            results = stragglers(scratch, store)
            results.show("Stragglers, five nodes, four pull, 40 Mbit/s")
            failures += results.failures
        if "wave" in chosen:
            console.print(table_of(second_wave(scratch, store), "Second wave, 40 Mbit/s"))
        if "growth" in chosen:
            results = growth(scratch, store, sizes)
            results.show("Growth, node and uplink 240 Mbit/s over the largest N")
            failures += results.failures
            if plot is not None and results.outcomes:
                plot_growth(results.outcomes, plot)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
