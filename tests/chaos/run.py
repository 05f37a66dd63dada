"""A run of a schedule: the site, its clients and faults, and a watch over its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h11
import trio
from rich.console import Console
from rich.table import Table

from tests.chaos.faults import Site
from tests.chaos.schedule import Fault, faults, pulls
from tests.support import image as images
from tests.support import registry as registries
from tests.support.lab import WAN, Rates, lab
from tests.support.lab_client import Client
from tests.support.leftovers import undone_by
from tests.support.proxy import CountingProxy
from tests.support.pull import PullFailedError
from tests.support.site import UPSTREAM, Node, site, start_all, wait_joined

REPOSITORY = "chaos/app"
MB = 1_000_000
IMAGES_MB = (4, 12, 8, 3, 20, 6)
"""Sizes. The first image is pulled most often."""
RATES = Rates(node=100e6, uplink=50e6)
DISK = "64m"
"""Each node's disk. It is too small for all images and the shards kept for others."""
MEMORY = "8MiB"
DEADLINE_S = 90.0
"""Longest time of a pull. A client gives up on a stalled body long before that."""
GRACE_S = 10.0
"""Time after a fault in which failures are excused: members must see each other again, and breakers must close."""
HEALED_S = 90.0
"""Longest time at the end until all members see each other again. A node that lied stays excluded."""
WATCH_S = 2.0
MAX_RSS = 256 << 20
MAX_FILES = 700
"""Most open files of a daemon: each of 7 other members has a few connections, and the clients have about ten."""
FLAT = 1.5
"""Largest ratio of a daemon's memory at the end to its memory after it served for a while."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True, slots=True)
class Settings:
    seed: int
    seconds: float
    nodes: int
    liars: int = 1

    @property
    def again(self) -> str:
        run = f"python -m tests.chaos --seed {self.seed} --minutes {self.seconds / 60:g}"
        return f"{run} --nodes {self.nodes} --liars {self.liars}"


@dataclass(slots=True)
class Seen:
    """The results of a run. It passes if `wrong` is empty."""

    done: list[float] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    files: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True)
class Run:
    """A run on `site`, which began at `began` seconds of trio's clock."""

    settings: Settings
    site: Site
    seen: Seen
    schedule: list[Fault]
    began: float

    @property
    def now(self) -> float:
        return trio.current_time() - self.began


def run(settings: Settings) -> list[str]:
    """Run, print the results, and return the failures."""
    console.print(f"chaos, seed {settings.seed}: {settings.again}")
    scratch, seen = Path(tempfile.mkdtemp(prefix="shoal-")), Seen()
    try:
        with made(scratch, settings.nodes) as struck:
            trio.run(_play, settings, struck, seen)
            for node in struck.nodes:
                read_log(node, seen.wrong)
            size = sum(images_mb * MB for images_mb in IMAGES_MB)
            console.print(_table(settings, seen, struck.proxy.count.received / size))
    finally:
        shutil.rmtree(scratch / "registry", ignore_errors=True)
        if not seen.wrong:
            shutil.rmtree(scratch, ignore_errors=True)
    if seen.wrong:
        console.print(f"[red]FAILED[/red], {len(seen.wrong)} times; again: {settings.again}; logs: {scratch}")
    for sentence in seen.wrong[:50]:
        console.print(f"  {sentence}", markup=False)
    return seen.wrong


@contextlib.contextmanager
def made(scratch: Path, count: int, **values: object) -> Iterator[Site]:
    """A lab of `count` running nodes. `values` are for their configurations."""
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(lab(count, RATES))
        registry = stack.enter_context(registries.docker_registry(scratch / "registry", network.wan))
        pushed: dict[str, tuple[str, int, str]] = {}
        with network.wan.entered():
            for number, size in enumerate(IMAGES_MB):
                layers = [[(f"n-{part}", images.noise(10 * number + part, size * MB // 2))] for part in range(2)]
                image = images.build(scratch / f"image-{number}", layers)
                registries.push(registry, image, REPOSITORY, tag_of(number))
                pushed[tag_of(number)] = (image.index.digest, image.index.size, image.index.media_type)
                shutil.rmtree(scratch / f"image-{number}")
        proxy = stack.enter_context(
            CountingProxy(registry.host, registry.port, delay_s=0.005, namespace=network.wan, listen=WAN)
        )
        folder = scratch / "s"
        for index in range(count):
            stack.enter_context(_disk(folder / f"node-{index + 1}" / "data"))
        nodes = stack.enter_context(site(folder, proxy.url, count, start=False, lab=network, memory=MEMORY, **values))
        start_all(nodes)
        yield Site(network, proxy, nodes, set(), pushed)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "chaos", path], check=True)
    with undone_by("umount", "--lazy", str(path)):
        yield


def tag_of(number: int) -> str:
    return f"v{number}"


# The run


async def _play(settings: Settings, struck: Site, seen: Seen) -> None:
    schedule = faults(settings.seed, settings.nodes, settings.seconds, settings.liars)
    this = Run(settings, struck, seen, schedule, began=trio.current_time())
    async with trio.open_nursery() as watching:
        watching.start_soon(_watch, struck, seen)
        async with trio.open_nursery() as nursery:
            for fault in schedule:
                nursery.start_soon(_strike, this, fault)
            for index in range(settings.nodes):
                nursery.start_soon(_client, this, index)
        ended = trio.current_time()
        await _heal(struck, seen, settings.liars)
        console.print(f"all well again after {trio.current_time() - ended:.1f} s")
        watching.cancel_scope.cancel()


async def _strike(this: Run, fault: Fault) -> None:
    await trio.sleep_until(this.began + fault.start)
    where = ",".join(this.site.nodes[index].name for index in fault.nodes)
    console.print(f"{fault.start:6.1f} s  {fault.kind} {where} for {fault.end - fault.start:.1f} s")
    try:
        async with this.site.struck_by(fault):
            await trio.sleep_until(this.began + fault.end)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        this.seen.wrong.append(f"{fault.start:.1f} s: {fault.kind} {where}: {error}")


async def _client(this: Run, index: int) -> None:
    tags = [tag_of(number) for number in range(len(IMAGES_MB))]
    for pause_s, tag in pulls(this.settings.seed, index, tags):
        await trio.sleep(pause_s)
        start = this.now
        if start > this.settings.seconds:
            return
        problem = await pull(this.site, index, tag)
        end = this.now
        excuse = next((fault for fault in this.schedule if fault.excuses(index, start, end, GRACE_S)), None)
        if not problem:
            this.seen.done.append(end - start)
        elif excuse is not None and not problem.startswith("WRONG"):
            this.seen.excused[excuse.kind] += 1
        else:
            name = this.site.nodes[index].name
            this.seen.wrong.append(f"{start:.1f} to {end:.1f} s: {tag} through {name}: {problem[:300]}")


async def pull(struck: Site, index: int, tag: str) -> str:
    """Returns the problem, "" if there was none. A problem that begins with WRONG has no excuse."""
    namespace, node = struck.lab.nodes[index], struck.nodes[index]
    connect = partial(namespace.connect, node.host, node.mirror_port)
    client = Client(connect, f"{UPSTREAM}/{REPOSITORY}", tag, digest=struck.images[tag][0])
    problem = ""
    with trio.move_on_after(DEADLINE_S) as deadline:
        try:
            await client.pull()
        except* (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as group:
            problem = f"the connection broke: {_first(group)!r}"
        except* PullFailedError as group:
            problem = str(_first(group))
            problem = f"WRONG BYTES: {problem}" if "has the bytes of" in problem else problem
            problem = f"WRONG IMAGE: {problem}" if "stands for" in problem else problem
    return f"WRONG: not over after {DEADLINE_S:.0f} s" if deadline.cancelled_caught else problem


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _watch(struck: Site, seen: Seen) -> None:
    """Record deaths, and the memory and open files of each process."""
    reported: set[int] = set()
    while True:
        await trio.sleep(WATCH_S)
        for index, node in enumerate(struck.nodes):
            pid = node.process.pid
            if index in struck.down or pid in reported:
                continue
            status = node.process.poll()
            if status is not None:
                reported.add(pid)
                seen.wrong.append(f"{node.name} (pid {pid}) died with {status}")
                continue
            seen.rss[pid].append(node.rss_bytes())
            seen.files[pid].append(len(os.listdir(f"/proc/{pid}/fd")))


async def _heal(struck: Site, seen: Seen, liars: int) -> None:
    """After all faults: members see each other, and every node pulls every image."""
    honest = len(struck.nodes) - liars
    for node in struck.nodes[:honest]:
        try:
            await trio.to_thread.run_sync(wait_joined, [node], honest, HEALED_S)
        except AssertionError as error:
            seen.wrong.append(str(error))
    for number in range(len(IMAGES_MB)):
        for index, node in enumerate(struck.nodes):
            problem = await pull(struck, index, tag_of(number))
            if problem:
                seen.wrong.append(f"at the end: {tag_of(number)} through {node.name}: {problem[:300]}")
    for node in struck.nodes:
        _flat(node, seen)


def _flat(node: Node, seen: Seen) -> None:
    rss, files = seen.rss[node.process.pid], seen.files[node.process.pid]
    if max(rss, default=0) > MAX_RSS or max(files, default=0) > MAX_FILES:
        seen.wrong.append(f"{node.name}: {max(rss) >> 20} MiB, {max(files)} files")
    if len(rss) > 60 and statistics.median(rss[-10:]) > FLAT * statistics.median(rss[20:30]):
        seen.wrong.append(f"{node.name}: memory grew from {rss[25] >> 20} to {rss[-1] >> 20} MiB")


def read_log(node: Node, wrong: list[str]) -> None:
    lines = node.log.read_text("utf-8", "replace").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("Traceback"):
            wrong.append(f"{node.name} had a bug: " + " / ".join(lines[number - 1 : number + 25])[:1500])
            return


def _table(settings: Settings, seen: Seen, copies: float) -> Table:
    table = Table(title=f"{settings.nodes} nodes, {settings.seconds:.0f} s, seed {settings.seed}", title_justify="left")
    took = sorted(seen.done) or [0.0]
    cells = {
        "pulls": str(len(seen.done)),
        "median s": f"{statistics.median(took):.2f}",
        "p99 s": f"{took[int(0.99 * (len(took) - 1))]:.2f}",
        "slowest s": f"{took[-1]:.2f}",
        "excused": ", ".join(f"{count} {kind}" for kind, count in seen.excused.most_common()) or "0",
        "copies of all images": f"{copies:.2f}",
        "memory MiB": str(max(map(max, seen.rss.values())) >> 20),
        "files": str(max(map(max, seen.files.values()))),
    }
    for column in cells:
        table.add_column(column, justify="right")
    table.add_row(*cells.values())
    return table
