"""A whole site under load, against the limit that its links set: `python -m tests.benchmarks.site [SCENARIO...]`.

Each node is a p2pd in a network namespace of its own, with links shaped by the kernel; a docker-registry stands behind
the uplink. No pull can end before the fluid limit T_min = max(F/u_origin, F/d_min, N*F/(u_origin + sum of u_i)) of an
image of F bytes, which counts no headers: Ethernet, IP and TCP take 4.6 % of a link, so 1.05 is what can be reached.

Needs root (namespaces), iproute2 and docker-registry.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import trio
from rich.console import Console
from rich.table import Table

from tests.support import image as images
from tests.support import registry as registries
from tests.support.lab import WAN, Lab, NoLabError, Rates, check_lab, lab
from tests.support.lab_client import Client
from tests.support.proxy import CountingProxy
from tests.support.site import UPSTREAM, Node, site

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
    """What one crowd of pulls took. `size` is the image's, `limit_s` the fluid limit."""

    name: str
    size: int
    limit_s: float
    seconds: list[float]
    origin_bytes: int
    used: list[Counters] = field(default_factory=list)

    @property
    def last(self) -> float:
        return max(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> list[str]:
        size, count = self.size, len(self.seconds)
        row = [
            self.name, str(count), f"{size / MB:.0f}", f"{self.limit_s:.1f}", f"{self.last:.1f}",
            f"{self.last / self.limit_s:.3f}", f"{self.median / self.limit_s:.3f}", f"{self.origin_bytes / size:.3f}",
        ]  # fmt: skip
        if not self.used:
            return [*row, "", "", "", ""]
        received = [one.received + one.origin for one in self.used]
        sent = sum(one.sent + one.origin for one in self.used)
        return [
            *row, f"{max(received) / size:.3f}", f"{max(one.wire for one in self.used) / size:.3f}",
            f"{sent / size / count:.3f}", f"{sum(one.cpu_s for one in self.used) / (size * count / 1e9):.1f}",
        ]  # fmt: skip


COLUMNS = (
    "scenario", "N", "MB", "T_min s", "last s", "last/T_min", "median/T_min", "copies", "received\nmax/image",
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
    *, meanwhile: Callable[[], None] | None = None,
) -> Outcome:  # fmt: skip
    """All clients at once. `indices` are the nodes whose use is told."""
    bench.proxy.reset()
    before = [read_counters(bench, index) for index in indices]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.pull)
            if meanwhile is not None:
                meanwhile()

    trio.run(main)
    used = [read_counters(bench, index) - one for index, one in zip(indices, before, strict=True)]
    return Outcome(name, size, limit_s, [client.seconds for client in clients], bench.proxy.count.received, used)


def flash_crowd(
    scratch: Path, stored: Path, image: images.Image, tag: str, count: int, rates: Rates, name: str
) -> Outcome:
    with bench_site(scratch / "site", stored, count, rates) as bench:
        everyone = range(count)
        clients = [bench.through_mirror(index, tag) for index in everyone]
        outcome = run_crowd(bench, name, image.size, clients, everyone, fluid_limit(image.size, count, rates))
    shutil.rmtree(scratch / "site")
    return outcome


@click.command()
@click.option("--nodes", default=10)
@click.option("--node-rate", default=40.0, help="Mbit/s")
@click.option("--uplink", default=40.0, help="Mbit/s")
@click.option("--size", default=100, help="MB")
def main(nodes: int, node_rate: float, uplink: float, size: int) -> None:
    try:
        check_lab()
    except NoLabError as error:
        sys.exit(f"{error}")
    rates = Rates(node_rate * MBIT, uplink * MBIT)
    scratch = Path(tempfile.mkdtemp(prefix="shoal-"))
    try:
        image = noise_image(scratch / "image", *((n, size * 100_000 * n) for n in (1, 2, 3, 4)))
        with registries.docker_registry(scratch / "registry") as registry:
            registries.push(registry, image, REPOSITORY, "v1")
        outcome = flash_crowd(scratch, scratch / "registry", image, "v1", nodes, rates, "flash crowd")
        console.print(table_of([outcome], f"{node_rate:g} Mbit/s a node, uplink {uplink:g} Mbit/s"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
