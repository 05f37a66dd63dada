"""A site in a lab for the benchmarks: p2pd in network namespaces, and a docker-registry behind the site's uplink."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tests.support import image as images
from tests.support import registry as registries
from tests.support.lab import WAN, Lab, Rates, lab
from tests.support.lab_client import Client
from tests.support.proxy import CountingProxy
from tests.support.site import UPSTREAM, Node, site

REPOSITORY = "bench/app"
MBIT = 1e6
MB = 1e6
DELAY_S = 0.005
"""Delay in each direction between the site and the registry."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


def noise_image(folder: Path, *layers: tuple[int, int]) -> images.Image:
    """An image of incompressible layers; each is a pair of seed and bytes."""
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


@contextlib.contextmanager
def bench_site(
    folder: Path,
    stored: Path,
    count: int,
    rates: Rates,
    *,
    running: int | None = None,
    start: bool = True,
    **values: object,
) -> Iterator[Bench]:
    """A lab of `count` nodes, with daemons on the first `running`; the registry serves the images in `stored`."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(lab(count, rates))
        registry = stack.enter_context(registries.docker_registry(stored, made.wan))
        proxy = stack.enter_context(
            CountingProxy(registry.host, registry.port, delay_s=DELAY_S, namespace=made.wan, listen=WAN)
        )
        nodes = stack.enter_context(site(folder, proxy.url, running or count, lab=made, start=start, **values))
        yield Bench(made, proxy, nodes)
