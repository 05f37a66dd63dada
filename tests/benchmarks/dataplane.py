"""Processor time of the data plane on unshaped loopback: `python -m tests.benchmarks.dataplane [SCENARIO...]`.

Real daemons, a real docker-registry, and clients that verify digests and keep nothing. Every run has a new site without
any block. With `--against COMMIT` that commit's daemons run too, alternating, and the table has the ratios. Figures are
medians of the runs. All processor time is that of the daemons, kernel included, until they are idle again after the
pull; "a GB" is one that a client got.

The counts (task steps, spawned tasks, requests and system calls for each block and node) come from a run of their own,
since counting takes time. They do not depend on the machine. The floor (tests/support/floor.py) is measured in between.

The thin links are in tests/benchmarks/site.py. docs/benchmarks/dataplane.md has results.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import trio
from rich.table import Table

from protocol.ids import BLOCK_SIZE
from tests.support import registry as registries
from tests.support.bench_site import MB, REPOSITORY, console, noise_image
from tests.support.containerd import containerd
from tests.support.counted_daemon import COUNTED, Counts, counts_of
from tests.support.floor import floor
from tests.support.image import Image
from tests.support.lab_client import Client
from tests.support.processes import scratch, terminate, wait_for
from tests.support.proxy import CountingProxy
from tests.support.pull import PullFailedError
from tests.support.site import P2PD, UPSTREAM, Node, cpu_s, site
from tests.support.versions import Comparison, Figures, Version, versions

MEMBERS = 5
IMAGES = {"three": (80, 80, 80), "one": (300,)}
"""MB of the layers of each image, by tag."""
IDLE_S, IDLE_CPU_S, PATIENCE_S = 0.5, 0.05, 60.0
"""A site is idle when all its daemons took at most IDLE_CPU_S in IDLE_S."""


@dataclass(frozen=True, slots=True)
class Use:
    """The processor time of some daemons until now, and what they read from the registry."""

    cpu_s: float
    loop_s: float
    origin: int

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Use:
        return cls(
            sum(node.cpu_s() for node in nodes),
            sum(node.loop_s() for node in nodes),
            sum(node.status()["origin_bytes"] for node in nodes),
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the scenarios run: the registry, and the images in it by tag."""

    scratch: Path
    registry: registries.Registry
    images: dict[str, Image]

    @contextlib.contextmanager
    def site(
        self, version: Version, count: int, program: Sequence[str] = P2PD, url: str | None = None, **values: object
    ) -> Iterator[list[Node]]:
        """A new site of the version's daemons. Its folder disappears with it."""
        with (
            scratch(parent=self.scratch) as folder,
            site(folder, url or self.registry.url, count, program=program, code=version.code, **values) as nodes,
        ):
            yield nodes

    def straight(self, tag: str) -> Client:
        return Client(partial(trio.open_tcp_stream, self.registry.host, self.registry.port), REPOSITORY, tag)


def through(node: Node, tag: str) -> Client:
    return Client(partial(trio.open_tcp_stream, node.host, node.mirror_port), f"{UPSTREAM}/{REPOSITORY}", tag)


def pull(clients: Sequence[Client]) -> float:
    """Pull by all clients at once. Returns the seconds until the last has ended."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.pull)

    trio.run(main)
    return max(client.seconds for client in clients)


def wait_idle(nodes: Sequence[Node]) -> None:
    def idle() -> bool:
        before = sum(node.cpu_s() for node in nodes)
        time.sleep(IDLE_S)
        return sum(node.cpu_s() for node in nodes) - before <= IDLE_CPU_S

    wait_for("the daemons are idle", idle, seconds=PATIENCE_S)


def measured(nodes: Sequence[Node], delivered: int, work: Callable[[], float]) -> Figures:
    """`work` makes the clients of `nodes` get `delivered` bytes, and returns its seconds."""
    wait_idle(nodes)
    before = Use.of(nodes)
    wall_s = work()
    wait_idle(nodes)
    used, gigabytes = Use.of(nodes), delivered / 1e9
    return {
        "CPU s/GB": (used.cpu_s - before.cpu_s) / gigabytes,
        "of the loops, s/GB": (used.loop_s - before.loop_s) / gigabytes,
        "wall s": wall_s,
        "copies": (used.origin - before.origin) / (delivered / len(nodes)),
        "peak RSS MiB": max(node.rss_bytes("VmHWM") for node in nodes) / (1 << 20),
    }


# Scenarios: each returns the figures of one run of one version.


def crowd(tag: str, stage: Stage, version: Version) -> Figures:
    """Five nodes pull the image at once, which only the registry has."""
    size = stage.images[tag].size
    with stage.site(version, MEMBERS) as nodes:
        registry_s = cpu_s(stage.registry.pid)
        figures = measured(nodes, size * MEMBERS, lambda: pull([through(node, tag) for node in nodes]))
        return figures | {"registry CPU s": cpu_s(stage.registry.pid) - registry_s}


def second_wave(stage: Stage, version: Version) -> Figures:
    """One node has the image, and the four others pull it at once."""
    size = stage.images["three"].size
    with stage.site(version, MEMBERS) as (holder, *readers):
        pull([through(holder, "three")])
        wait_idle([holder])
        before = Use.of([holder])
        figures = measured(readers, size * len(readers), lambda: pull([through(node, "three") for node in readers]))
        wait_idle([holder])
        after = Use.of([holder])
        figures["holder CPU s/GB"] = (after.cpu_s - before.cpu_s) / (size * len(readers) / 1e9)
        figures["copies"] += (after.origin - before.origin) / size
        return figures


def alone(stage: Stage, version: Version) -> Figures:
    """A first node pulls through its mirror, and another client straight from the registry."""
    size = stage.images["three"].size
    straight_s = pull([stage.straight("three")])
    with stage.site(version, 1) as nodes:
        figures = measured(nodes, size, lambda: pull([through(nodes[0], "three")]))
    return figures | {"straight s": straight_s, "wall / straight": figures["wall s"] / straight_s}


def through_containerd(stage: Stage, version: Version) -> Figures:
    """Five containerd, each with its own node, fetch the image at once: three layers, as many as kubelet fetches."""
    size = stage.images["three"].size
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(stage.site(version, MEMBERS))
        folder = stack.enter_context(scratch(parent=stage.scratch))
        engines = [stack.enter_context(containerd(folder / node.name)) for node in nodes]
        for engine, node in zip(engines, nodes, strict=True):
            engine.use_mirror(UPSTREAM, stage.registry.url, node.mirror)

        def fetch() -> float:
            began = time.monotonic()
            with ThreadPoolExecutor(MEMBERS) as pool:
                answers = list(pool.map(lambda engine: engine.fetch(f"{UPSTREAM}/{REPOSITORY}:three"), engines))
            for answer in answers:
                if answer.returncode:
                    raise PullFailedError(answer.stderr)
            return time.monotonic() - began

        return measured(nodes, size * MEMBERS, fetch)


SCENARIOS: dict[str, Callable[[Stage, Version], Figures]] = {
    "image": partial(crowd, "three"),
    "layer": partial(crowd, "one"),
    "second-wave": second_wave,
    "alone": alone,
    "containerd": through_containerd,
}
CROWDS = {"image": "three", "layer": "one"}
"""The scenarios with a floor and counts, and their tags."""


# Counts


@contextlib.contextmanager
def system_calls(nodes: Sequence[Node]) -> Iterator[list[int]]:
    """Yields a list that has the number of the nodes' system calls after the context; nothing if perf cannot count."""
    counted: list[int] = []
    pids = ",".join(str(node.process.pid) for node in nodes)
    command = ["perf", "stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", pids]
    if shutil.which("perf") is None:
        yield counted
        return
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield counted
    finally:
        process.send_signal(2)
        _, output = process.communicate()
        value = output.decode().partition(",")[0].strip()
        if value.isdigit():
            counted.append(int(value))
        terminate(process)


def counted(tag: str, stage: Stage, version: Version) -> Figures:
    """The counts of a crowd, for each block and node."""
    blocks = sum(-(-layer.size // BLOCK_SIZE) for layer in stage.images[tag].layers)
    with (
        CountingProxy(stage.registry.host, stage.registry.port) as proxy,
        stage.site(version, MEMBERS, COUNTED, proxy.url) as nodes,
    ):

        def total() -> Counts:
            return sum((counts_of(node.folder) for node in nodes), Counts(0, 0, 0))

        wait_idle(nodes)
        before = total()
        proxy.reset()
        with system_calls(nodes) as calls:
            pull([through(node, tag) for node in nodes])
            wait_idle(nodes)
        work = total() - before
        figures = {
            "task steps a block": work.steps / blocks / MEMBERS,
            "spawns a block": work.spawns / blocks / MEMBERS,
            "shard requests a block": work.requests / blocks / MEMBERS,
            "registry requests": proxy.count.requests,
        }
        if calls:
            figures["system calls a block"] = calls[0] / blocks / MEMBERS
        return figures


# Runs and tables


def run(name: str, stage: Stage, compared: Sequence[Version], runs: int, counts: bool) -> None:
    results = Comparison()
    tag = CROWDS.get(name)
    for _ in range(runs):
        floor_s = sum(cost.total for cost in floor(MEMBERS)) if tag else None
        for version in compared:
            figures = SCENARIOS[name](stage, version)
            if floor_s is not None:
                figures |= {"floor s/GB": floor_s, "CPU / floor": figures["CPU s/GB"] / floor_s}
            results.add(version, figures)
            console.print(f"{name}, {version.name}: {figures['CPU s/GB']:.1f} CPU s/GB, {figures['wall s']:.1f} s")
    if tag and counts:
        for version in compared:
            found = counted(tag, stage, version)
            for figures in results.by_version[version]:
                figures |= found
    console.print(results.table(f"{name}, median of {runs}"))
    if tag and counts and "system calls a block" not in results.by_version[compared[-1]][0]:
        console.print("System calls were not counted: perf may not trace raw_syscalls:sys_enter here.")


def show_floor() -> None:
    table = Table("floor of five nodes", "s/GB", "passes", title_justify="left")
    for cost in floor(MEMBERS):
        table.add_row(cost.name, f"{cost.seconds:.3f}", f"{cost.passes:.2f}")
    console.print(table)


@contextlib.contextmanager
def stage_for(names: Sequence[str], folder: Path) -> Iterator[Stage]:
    tags = {CROWDS.get(name, "three") for name in names}
    images = {
        tag: noise_image(folder / f"image-{tag}", *((size + n, size * int(MB)) for n, size in enumerate(IMAGES[tag])))
        for tag in tags
    }
    with registries.docker_registry(folder / "registry") as registry:
        for tag, image in images.items():
            registries.push(registry, image, REPOSITORY, tag)
            shutil.rmtree(image.folder)
        yield Stage(folder, registry, images)


@click.command()
@click.argument("scenarios", nargs=-1, type=click.Choice(list(SCENARIOS)))
@click.option("--against", help="A commit of this repository to compare with.")
@click.option("--commit", help="Measure this commit, and not the files of this tree.")
@click.option("--runs", default=3, show_default=True, help="Runs of each version; the figures are medians.")
@click.option("--counts/--no-counts", default=True, help="Whether to count steps, requests and system calls.")
def main(scenarios: tuple[str, ...], against: str | None, commit: str | None, runs: int, counts: bool) -> None:
    """Without a SCENARIO: image and layer."""
    chosen = scenarios or tuple(CROWDS)
    if not registries.installed():
        sys.exit("dataplane benchmark: docker-registry is not installed")
    with scratch() as folder, stage_for(chosen, folder) as stage:
        compared = versions(against, commit, folder)
        show_floor()
        for name in chosen:
            run(name, stage, compared, runs, counts)


if __name__ == "__main__":
    main()
