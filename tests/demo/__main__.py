"""`make demo`: five daemons, a registry, a real image, and one killed node. Exit status 0 only if every claim held."""

from __future__ import annotations

import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support import image as images
from tests.support import registry as registries
from tests.support.processes import scratch, wait_for
from tests.support.proxy import CountingProxy
from tests.support.pull import TOOLS, Pull, best_tool, verify, wait_all
from tests.support.site import UPSTREAM, Node, site

REPOSITORY = "demo/app"
TAG = "v1"
UPLINK = 50_000_000
"""Bytes per second between the site and the registry, for all connections together: 400 Mbit/s, a good edge uplink.

Without this limit the registry would be as near as a peer, and a site would gain nothing."""
MAX_COPIES = 1.05
KILL_AT = 0.05
"""The node is killed when both clients have written this share of the image."""
MB = 1e6

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(slots=True)
class Report:
    """The claims that were checked, each with the measured value and whether it held."""

    claims: list[tuple[str, str, bool]] = field(default_factory=list)

    def claim(self, text: str, seen: str, held: bool) -> None:
        self.claims.append((text, seen, held))

    @property
    def holds(self) -> bool:
        return bool(self.claims) and all(held for _, _, held in self.claims)


@dataclass(frozen=True, slots=True)
class Pulled:
    phase: str
    through: str
    seconds: float
    verified: int
    digests: int


def step(text: str) -> None:
    console.print(f"[bold cyan]==>[/] {text}", soft_wrap=True)


def build_image(folder: Path) -> images.Image:
    """A Debian root file system, Python's library, and the wheels that this project runs on: three layers."""
    library = Path(sysconfig.get_path("stdlib"))
    wheels = Path(sysconfig.get_path("purelib"))

    def source(path: Path) -> bool:
        return path.suffix != ".pyc" and not {"site-packages", "dist-packages"} & set(path.parts)

    layers: list[Iterator[images.Entry]] = [
        images.debian_root() if shutil.which("dpkg-query") else images.tree(Path("/usr/bin"), "usr/bin"),
        images.tree(library, "usr/local/lib/python3", source),
        images.tree(wheels, "opt/app", lambda path: path.suffix != ".pyc"),
    ]
    return images.build(folder, layers)


def start_pulls(phase: str, bases: dict[str, str], repository: str, folder: Path) -> dict[str, Pull]:
    """Start a client for each of `bases` (URLs by name), all at once."""
    return {
        name: TOOLS[best_tool()](base, repository, TAG, folder / f"{phase}-{name}".replace(" ", "-"))
        for name, base in bases.items()
    }


def finish(phase: str, pulls: dict[str, Pull], image: images.Image) -> list[Pulled]:
    """Wait, hash all files that were written, and remove them."""
    wait_all(list(pulls.values()))
    done = []
    for name, pull in pulls.items():
        verified, digests = verify(pull.folder, image), len(image.blobs) + 1
        done.append(Pulled(phase, name, seconds=pull.seconds, verified=verified, digests=digests))
        shutil.rmtree(pull.folder)
    return done


def run_demo(folder: Path, stack: ExitStack) -> bool:
    report = Report()
    step("building an image from this machine's files: a Debian root file system, Python's library, Python wheels")
    image = build_image(folder / "image")
    sizes = ", ".join(f"{layer.size / MB:.1f}" for layer in image.layers)
    console.print(
        f"    {image.size / MB:.1f} MB compressed; layers of {sizes} MB; {image.index.digest}", soft_wrap=True
    )

    if registries.installed():
        origin = stack.enter_context(registries.docker_registry(folder / "registry"))
        registries.push(origin, image, REPOSITORY, TAG)
    else:
        step("docker-registry is not installed: a small embedded read-only registry takes its place")
        origin = stack.enter_context(registries.embedded_origin(image, REPOSITORY, TAG, folder / "registry"))
    client = "skopeo" if best_tool() == "skopeo" else "the built-in client (skopeo is not installed)"
    proxy = stack.enter_context(CountingProxy(origin.host, origin.port, rate=UPLINK))
    step(f"{origin.kind} at {origin.url}, behind a counting proxy with a limit of {UPLINK * 8 / 1e6:.0f} Mbit/s")

    nodes = stack.enter_context(site(folder / "site", proxy.url))
    ready = max(node.ready_s for node in nodes)
    step(f"five daemons see each other; the slowest was ready after {ready:.1f} s")
    proxy.reset()
    pulled = _first_phase(folder, nodes, image, client)
    cold = proxy.count.received
    before = {node.name: node.status() for node in nodes}
    second, in_the_middle = _second_phase(folder, nodes, image)
    total = proxy.count.received
    after = {node.name: node.status() for node in nodes if node is not nodes[2]}

    step("for comparison: three clients pull straight from the registry, over the same uplink")
    straight = _straight(folder, origin, image, stack)

    console.print(pulls_table([*straight, *pulled, *second]))
    console.print(bytes_table(nodes, before, after, killed=nodes[2]))
    copies = total / image.size
    report.claim("copies read from the registry, both pulls", f"{copies:.3f} (max. {MAX_COPIES})", copies <= MAX_COPIES)
    copies = cold / image.size
    report.claim("copies in the first pull, by three nodes", f"{copies:.3f}", copies <= MAX_COPIES)
    verified = sum(pull.digests for pull in [*pulled, *second])
    report.claim("digests verified in the clients' files", f"{verified} of {verified} right", verified == 5 * 5)
    report.claim("node-3 was killed while both clients were reading", "yes" if in_the_middle else "no", in_the_middle)
    console.print(claims_table(report))
    return report.holds


def _first_phase(folder: Path, nodes: Sequence[Node], image: images.Image, client: str) -> list[Pulled]:
    step(f"first pull: {client} reads the image through node-1, node-2 and node-3 at once; no node holds any of it")
    pulls = start_pulls("cold", {node.name: node.mirror for node in nodes[:3]}, f"{UPSTREAM}/{REPOSITORY}", folder)
    return finish("cold", pulls, image)


def _second_phase(folder: Path, nodes: Sequence[Node], image: images.Image) -> tuple[list[Pulled], bool]:
    """Returns also whether both clients were still reading when the node died."""
    step("second pull: through node-4 and node-5; node-3 is killed (SIGKILL) in the middle of it")
    pulls = start_pulls("kill", {node.name: node.mirror for node in nodes[3:]}, f"{UPSTREAM}/{REPOSITORY}", folder)
    wait_for(
        "both clients read",
        lambda: all(pull.written() > KILL_AT * image.size or not pull.running for pull in pulls.values()),
    )
    nodes[2].kill()
    in_the_middle = all(pull.running for pull in pulls.values())
    return finish("with a node killed", pulls, image), in_the_middle


def _straight(folder: Path, origin: registries.Registry, image: images.Image, stack: ExitStack) -> list[Pulled]:
    proxy = stack.enter_context(CountingProxy(origin.host, origin.port, rate=UPLINK))
    clients = {f"client {number}": proxy.url for number in (1, 2, 3)}
    pulls = start_pulls("straight", clients, REPOSITORY, folder)
    return finish("straight from the registry", pulls, image)


def pulls_table(pulled: Sequence[Pulled]) -> Table:
    table = Table(title="The pulls", title_justify="left")
    table.add_column("pull")
    table.add_column("through")
    for name in ("seconds", "MB verified", "digests right"):
        table.add_column(name, justify="right")
    for pull in pulled:
        numbers = (f"{pull.seconds:.1f}", f"{pull.verified / MB:.1f}", str(pull.digests))
        table.add_row(pull.phase, pull.through, *numbers)
    return table


def bytes_table(
    nodes: Sequence[Node], before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], *, killed: Node
) -> Table:
    """MB, by the daemons' counters. A killed daemon's values are those before its last pull."""
    sources = ("memory", "disk", "peer", "origin")
    table = Table(
        title="Bytes by source, MB (p2pctl status --json)",
        title_justify="left",
        caption="to the client: the sources of the bytes in the node's own answers; "
        "from the registry, to peers: bytes that the node read and sent for the whole site",
    )
    table.add_column("node")
    for source in sources:
        table.add_column(f"to the client,\nfrom {source}", justify="right")
    table.add_column("read from\nthe registry", justify="right")
    table.add_column("sent to\npeers", justify="right")
    for node in nodes:
        status = after.get(node.name, before[node.name])
        row = [status["bytes_served"].get(source, 0) for source in sources]
        row += [status["origin_bytes"], status.get("bulk", {}).get("bytes_sent", 0)]
        name = f"{node.name} (killed)" if node is killed else node.name
        table.add_row(name, *(f"{value / MB:.1f}" for value in row))
    return table


def claims_table(report: Report) -> Table:
    table = Table(title="What this run showed", title_justify="left")
    table.add_column("claim")
    table.add_column("seen")
    table.add_column("held")
    for text, seen, held in report.claims:
        table.add_row(text, seen, "[green]yes[/]" if held else "[bold red]NO[/]")
    return table


def _interrupted(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupted)
    started = time.monotonic()
    try:
        with scratch("shoal-demo-") as folder, ExitStack() as stack:
            held = run_demo(folder, stack)
    except AssertionError as error:  # a failed pull or start: its message is the report
        console.print(f"[bold red]FAILED[/] {type(error).__name__}: {error}", soft_wrap=True)
        held = False
    console.print(f"{'All claims held' if held else 'NOT all claims held'}; {time.monotonic() - started:.0f} s.")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
