"""The cost of verifying a whole object before its first byte is sent: `python -m tests.benchmarks.check_first`.

Two sites of five nodes that differ only in this read the same blobs in turns. A node reads from the registry (cold),
another node from the site (warm), and then from its own verified file, which is equally fast in both. Medians.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from tests.support import image as images
from tests.support import registry as registries
from tests.support.processes import scratch
from tests.support.raw_http import Client, Server
from tests.support.site import UPSTREAM, Node, site, start_all

REPOSITORY, TAG = "demo/app", "v1"
SIZES_MIB, ROUNDS, COUNT = (1, 4, 16, 64), 7, 5
BOUNDS = {"as it comes": 0, "checked first": 64 << 20}
PROGRAM = "import node.content.library; node.content.library.CHECKED_FIRST = {}; from node.daemon import main; main()"


def timed(node: Node, digest: str) -> tuple[float, float]:
    """Returns the seconds to the first byte of a blob, and to the last."""
    server = Server(node.name, node.mirror_port, base=f"/v2/{UPSTREAM}/{REPOSITORY}", host=node.host)
    with contextlib.closing(Client(server)) as client:
        start = time.perf_counter()
        _, length = client.ask(server.request(f"blobs/{digest}"))
        client.drop(1)
        first = time.perf_counter() - start
        client.drop(length - 1)
        return first, time.perf_counter() - start


def main() -> None:
    sizes = [size for size in SIZES_MIB for _ in range(ROUNDS)]
    times: dict[tuple[int, str, str], list[tuple[float, float]]] = defaultdict(list)
    with scratch("shoal-check-") as folder:
        layers = [[("noise", images.noise(number, (size << 20) - 4096))] for number, size in enumerate(sizes)]
        image = images.build(folder / "image", layers)
        with contextlib.ExitStack() as stack:
            registry = stack.enter_context(registries.docker_registry(folder / "registry"))
            registries.push(registry, image, REPOSITORY, TAG)
            sites = {}
            for name, bound in BOUNDS.items():
                nodes = stack.enter_context(site(folder / str(bound), registry.url, COUNT, start=False))
                for node in nodes:
                    node.program = [sys.executable, "-c", PROGRAM.format(bound)]
                start_all(nodes)
                sites[name] = nodes
            for number, (size, blob) in enumerate(zip(sizes, image.layers, strict=True)):
                for name in sorted(sites, reverse=bool(number % 2)):
                    first, second = (sites[name][(number + offset) % COUNT] for offset in (0, 1))
                    for read, node in (("cold", first), ("warm", second), ("again", second)):
                        times[size, read, name].append(timed(node, blob.digest))
    table = Table("MiB", "from", *(f"{name}: {byte}" for byte in ("first byte", "last byte") for name in BOUNDS), "÷")
    for size in SIZES_MIB:
        for read, place in (("cold", "registry"), ("warm", "site"), ("again", "own file")):
            columns = [zip(*times[size, read, name], strict=True) for name in BOUNDS]
            medians = [statistics.median(column) for pair in zip(*columns, strict=True) for column in pair]
            table.add_row(str(size), place, *(f"{1000 * s:.1f} ms" for s in medians), f"{medians[3] / medians[2]:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
