"""What a block of a cold pull may cost each node: steps of tasks, spawned tasks, and requests for blocks and shards.

These counts decide how much processor time the event loop takes for a byte. They hardly depend on the machine, so that
a test can hold them; docs/benchmarks/dataplane.md has the time that they cost. A busy machine adds a few steps, by time
and not by blocks: keep-alives and gossip. So the least of REPEATS pulls counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import trio

from protocol.ids import BLOCK_SIZE
from tests.support import image as images
from tests.support import registry as registries
from tests.support.counted_daemon import COUNTED, Counts, counts_of
from tests.support.lab_client import Client
from tests.support.processes import scratch
from tests.support.site import UPSTREAM, Node, site

BUDGET = {"steps": 15.0, "spawns": 3.0, "requests": 1.0}
"""For each block and node, by the field of `Counts`. A block of a layer of this size costs 1.9 spawned tasks if read as
a whole, 2.4 as shards."""
MEMBERS, REPEATS = 5, 2
LAYER_BYTES = 64 << 20
"""Long enough that the short stripes at both ends do not decide."""
REPOSITORY = "bench/budget"


def total(nodes: list[Node]) -> Counts:
    return sum((counts_of(node.folder) for node in nodes), Counts(0, 0, 0))


def pull(nodes: list[Node], tag: str) -> Counts:
    """The work of a pull of all nodes at once, until the last client has everything."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for node in nodes:
                connect = partial(trio.open_tcp_stream, node.host, node.mirror_port)
                nursery.start_soon(Client(connect, f"{UPSTREAM}/{REPOSITORY}", tag).pull)

    before = total(nodes)
    trio.run(main)
    return total(nodes) - before


@pytest.fixture(scope="module")
def pulls() -> Iterator[list[Counts]]:
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    with (
        scratch() as folder,
        registries.docker_registry(folder / "registry") as registry,
        site(folder, registry.url, MEMBERS, program=COUNTED) as nodes,
    ):
        for number in range(REPEATS):
            layer = ("opt/noise", images.noise(100 + number, LAYER_BYTES))
            image = images.build(folder / f"image-{number}", [[layer]])
            registries.push(registry, image, REPOSITORY, str(number))
        yield [pull(nodes, str(number)) for number in range(REPEATS)]


@pytest.mark.parametrize("kind", BUDGET)
def test_a_block_costs_each_node_no_more_than_its_budget(pulls: list[Counts], kind: str) -> None:
    least = min(getattr(counts, kind) for counts in pulls) / MEMBERS / (LAYER_BYTES / BLOCK_SIZE)
    assert least <= BUDGET[kind]
