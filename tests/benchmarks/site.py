"""A whole site under load, against the limit that its links set: `python -m tests.benchmarks.site [SCENARIO...]`.

Each node is a p2pd in a network namespace of its own, with links shaped by the kernel; a docker-registry stands behind
the uplink. No pull can end before the fluid limit T_min = max(F/u_origin, F/d_min, N*F/(u_origin + sum of u_i)) of an
image of F bytes, which counts no headers: Ethernet, IP and TCP take 4.6 % of a link, so 1.05 is what can be reached.

Needs root (namespaces), iproute2 and docker-registry.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import trio
from rich.console import Console
from rich.table import Table

from tests.support import image as images
from tests.support import processes
from tests.support import registry as registries
from tests.support.lab import WAN, Lab, NoLabError, Rates, check_lab, lab
from tests.support.lab_client import Client
from tests.support.proxy import CountingProxy
from tests.support.pull import PullFailedError
from tests.support.site import UPSTREAM, Node, site, start_all, wait_joined

REPOSITORY = "bench/app"
MBIT = 1e6
MB = 1e6
DELAY_S = 0.005
"""Each way between the site and the registry."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


def noise_image(folder: Path, *layers: tuple[int, int]) -> images.Image:
    """Incompressible layers of (seed, bytes)."""
    return images.build(folder, [[(f"noise-{seed}", images.noise(seed, size))] for seed, size in layers])


@dataclass(frozen=True, slots=True)
class Bench:
    lab: Lab
    proxy: CountingProxy
    nodes: list[Node]

    def through_mirror(self, index: int, tag: str) -> Client:
        namespace, node = self.lab.nodes[index], self.nodes[index]
        return Client(lambda: namespace.connect(node.host, node.mirror_port), f"{UPSTREAM}/{REPOSITORY}", tag)

    def straight(self, index: int, tag: str) -> Client:
        namespace = self.lab.nodes[index]
        return Client(lambda: namespace.connect(WAN, self.proxy.port), REPOSITORY, tag)


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one node."""

    cpu_s: float
    received: int
    sent: int
    origin: int
    wire: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(
            self.cpu_s - other.cpu_s, self.received - other.received, self.sent - other.sent,
            self.origin - other.origin, self.wire - other.wire,
        )  # fmt: skip


def read_counters(bench: Bench, index: int) -> Counters:
    node = bench.nodes[index]
    status = node.status()
    return Counters(
        node.cpu_s(), status["bulk"]["bytes_received"], status["bulk"]["bytes_sent"], status["origin_bytes"],
        bench.lab.received(index),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one crowd of pulls took. `size` is the image's, `limit_s` the fluid limit, `resumed` how many bodies were
    cut and asked for again from there."""

    name: str
    size: int
    limit_s: float
    seconds: list[float]
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
        """Processor time for each GB that a client got, of all daemons together."""
        return sum(one.cpu_s for one in self.used) / (self.size * len(self.seconds) / 1e9)

    def row(self) -> list[str]:
        size, count = self.size, len(self.seconds)
        row = [
            self.name, str(count), f"{size / MB:.0f}", f"{self.limit_s:.1f}", f"{self.last:.1f}",
            f"{self.last / self.limit_s:.3f}", f"{self.median / self.limit_s:.3f}", f"{self.origin_bytes / size:.3f}",
            str(self.resumed),
        ]  # fmt: skip
        if not self.used:
            return [*row, "", "", "", ""]
        received = [one.received + one.origin for one in self.used]
        sent = sum(one.sent + one.origin for one in self.used)
        return [
            *row, f"{max(received) / size:.3f}", f"{max(one.wire for one in self.used) / size:.3f}",
            f"{sent / size / count:.3f}", f"{self.cpu_s_per_gb:.1f}",
        ]  # fmt: skip


COLUMNS = (
    "scenario", "N", "MB", "T_min s", "last s", "last/T_min", "median/T_min", "copies", "cut", "received\nmax/image",
    "on the wire\nmax/image", "sent/needed", "CPU s/GB",
)  # fmt: skip


def table_of(outcomes: Sequence[Outcome], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for outcome in outcomes:
        table.add_row(*outcome.row())
    return table


def fluid_limit(size: int, count: int, rates: Rates) -> float:
    """Seconds below which `count` nodes cannot all have `size` bytes that only the uplink brings."""
    bits = size * 8
    return max(bits / rates.uplink, bits / rates.node, count * bits / (rates.uplink + count * rates.node))


@contextlib.contextmanager
def bench_site(
    folder: Path, stored: Path, count: int, rates: Rates, *, running: int | None = None, **keys: Any
) -> Iterator[Bench]:
    """`count` nodes of which the first `running` are started; the registry serves what lies in `stored`."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(lab(count, rates))
        registry = stack.enter_context(registries.docker_registry(stored, made.wan))
        proxy = stack.enter_context(
            CountingProxy(registry.host, registry.port, delay_s=DELAY_S, namespace=made.wan, listen=WAN)
        )
        nodes = stack.enter_context(site(folder, proxy.url, running or count, lab=made, **keys))
        yield Bench(made, proxy, nodes)


def run_crowd(
    bench: Bench, name: str, size: int, clients: Sequence[Client], indices: Sequence[int], limit_s: float,
    *, meanwhile: Callable[[trio.Nursery], None] | None = None,
) -> Outcome:  # fmt: skip
    """All clients at once. `indices` are the nodes whose use is told."""
    bench.proxy.reset()
    before = [read_counters(bench, index) for index in indices]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.pull)
            if meanwhile is not None:
                meanwhile(nursery)

    trio.run(main)
    used = [read_counters(bench, index) - one for index, one in zip(indices, before, strict=True)]
    return Outcome(
        name, size, limit_s, [client.seconds for client in clients], bench.proxy.count.received,
        used, sum(client.resumed for client in clients),
    )  # fmt: skip


# Scenarios


@dataclass(frozen=True, slots=True)
class Store:
    """A registry's folder with the images of all scenarios, by tag; all of one repository."""

    folder: Path
    images: dict[str, images.Image]

    def size(self, tag: str) -> int:
        return self.images[tag].size


STRAGGLERS = ("healthy", "slow", "stopped", "killed", "garbage")


def make_store(scratch: Path, scale: float, wanted: Sequence[str]) -> Store:
    """v2 shares all but one layer with v1."""
    parts = {"v1": (1, 2, 3, 4), "v2": (5, 2, 3, 4), "straight": (1,), "wave": (7, 8)}
    parts |= {one: (20 + n, 30 + n) for n, one in enumerate(STRAGGLERS)}
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


def crowd(bench: Bench, store: Store, tag: str, name: str, indices: Sequence[int], limit_s: float) -> Outcome:
    clients = [bench.through_mirror(index, tag) for index in indices]
    return run_crowd(bench, name, store.size(tag), clients, indices, limit_s)


def flash(scratch: Path, store: Store) -> list[Outcome]:
    """Ten cold nodes at once, on equal links and behind a slow uplink; the next version, one node after the other."""
    rates, everyone, outcomes = Rates(40 * MBIT, 40 * MBIT), range(10), []
    with bench_site(scratch / "flash", store.folder, 10, rates) as bench:
        limit_s = fluid_limit(store.size("v1"), 10, rates)
        outcomes.append(crowd(bench, store, "v1", "flash crowd", everyone, limit_s))
        outcomes.append(rolling_update(bench, store))
        clients = [bench.straight(index, "straight") for index in everyone]
        small = store.size("straight")
        limit_s = 10 * small * 8 / rates.uplink
        outcomes.append(run_crowd(bench, "straight from the registry (limit 10 F/u)", small, clients, (), limit_s))
    rates = Rates(40 * MBIT, 10 * MBIT)
    with bench_site(scratch / "edge", store.folder, 10, rates) as bench:
        limit_s = fluid_limit(store.size("v1"), 10, rates)
        outcomes.append(crowd(bench, store, "v1", "flash crowd, uplink 10 Mbit/s", everyone, limit_s))
    return outcomes


def rolling_update(bench: Bench, store: Store) -> Outcome:
    """Told as one: each node's seconds, bytes and processor time of all together. The limit is that of the first."""
    changed = store.images["v2"].layers[0].size
    outcomes = [
        crowd(bench, store, "v2", "", (index,), changed * 8 / bench.lab.rates.uplink)
        for index in range(len(bench.nodes))
    ]
    seconds = [outcome.last for outcome in outcomes]
    copies = sum(outcome.origin_bytes for outcome in outcomes)
    used = [outcome.used[0] for outcome in outcomes]
    return Outcome("rolling update, 10 % changed", changed, outcomes[0].limit_s, seconds, copies, used)


class Results:
    """What the crowds of a scenario took, and what the pulls that failed said."""

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
    """Five keepers, of which the last one limps, stands still, dies or lies while the other four pull."""
    rates, results = Rates(40 * MBIT, 40 * MBIT), Results()
    with bench_site(scratch / "straggler", store.folder, 5, rates) as bench:
        for trouble in STRAGGLERS:
            name = f"one of five keepers {trouble}"

            def pull(trouble: str = trouble, name: str = name) -> Outcome:
                size, limit_s = store.size(trouble), fluid_limit(store.size(trouble), 4, rates)
                clients = [bench.through_mirror(index, trouble) for index in range(4)]
                with troubled(bench, trouble) as later:
                    return run_crowd(bench, name, size, clients, range(4), limit_s, meanwhile=later)

            results.note(name, pull)
    return results


def _first(group: BaseExceptionGroup[PullFailedError]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)[:300]


AFTER_S = 2.0
"""What befalls a node befalls it in the middle of the pull."""


@contextlib.contextmanager
def troubled(bench: Bench, trouble: str) -> Iterator[Callable[[trio.Nursery], None] | None]:
    """Yields what is to be started with the pull. Afterwards, also if that failed, the node is as it was."""
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
            wait_joined(bench.nodes, len(bench.nodes), 60.0)
        elif trouble == "killed":
            node.start()
            wait_joined(bench.nodes, len(bench.nodes), 60.0)


def second_wave(scratch: Path, store: Store) -> list[Outcome]:
    """Five nodes have the image; then the registry is cut off, and five more come."""
    rates = Rates(40 * MBIT, 40 * MBIT)
    with bench_site(scratch / "wave", store.folder, 10, rates, start=False) as bench:
        start_all(bench.nodes[:5])
        limit_s = fluid_limit(store.size("wave"), 5, rates)
        first = crowd(bench, store, "wave", "first wave", range(5), limit_s)
        start_all(bench.nodes[5:], 10)
        bench.proxy.cut()
        # Five that have it all feed five that have none of it.
        limit_s = store.size("wave") * 8 / rates.node
        return [first, crowd(bench, store, "wave", "second wave, no registry", range(5, 10), limit_s)]


def growth(scratch: Path, store: Store, counts: Sequence[int]) -> Results:
    """One site that grows, and in it a crowd on an image of its own at each size, with links so slow that this machine
    is not the limit."""
    rates, results = Rates(240 / max(counts) * MBIT, 240 / max(counts) * MBIT), Results()
    with bench_site(scratch / "growth", store.folder, max(counts), rates, start=False) as bench:
        for before, count in itertools.pairwise([0, *counts]):
            start_all(bench.nodes[before:count], count)

            def pull(count: int = count) -> Outcome:
                limit_s = fluid_limit(store.size(f"crowd-{count}"), count, rates)
                return crowd(bench, store, f"crowd-{count}", "growth", range(count), limit_s)

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


SCENARIOS = {
    "flash": ("v1", "v2", "straight"), "stragglers": STRAGGLERS, "wave": ("wave",), "growth": (),
}  # fmt: skip


@click.command()
@click.argument("scenarios", nargs=-1, type=click.Choice(list(SCENARIOS)))
@click.option("--scale", default=1.0, show_default=True, help="Of all image sizes.")
@click.option("--counts", default="5,10,20,40", show_default=True, help="Nodes in `growth`.")
@click.option("--plot", type=click.Path(path_type=Path), help="A file for the plot of `growth`, SVG or PNG.")
def main(scenarios: tuple[str, ...], scale: float, counts: str, plot: Path | None) -> None:
    """Without a SCENARIO: all of them. Exit status 1 where a pull failed."""
    try:
        check_lab()
    except NoLabError as error:
        sys.exit(f"site benchmark: {error}")
    chosen = scenarios or tuple(SCENARIOS)
    sizes = sorted({int(count) for count in counts.split(",")})
    failures: list[str] = []
    with processes.scratch() as scratch:
        tags = [tag for name in chosen for tag in SCENARIOS[name]]
        tags += [f"crowd-{count}" for count in sizes if "growth" in chosen]
        store = make_store(scratch, scale, tags)
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
