"""Malformed and odd requests at a real p2pd: `python -m tests.fuzz_mirror [--requests N] [--seed N]`.

Whole and mangled requests (tests/support/fuzz.py) in front of a docker-registry that answers. Exit status 1 where the
mirror failed by a fault of its own, wrote a traceback, or grew: after the first third its caches are full.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import trio
from rich.console import Console
from rich.table import Table

from tests.support import image as images
from tests.support import registry as registries
from tests.support.fuzz import Content, Findings, Grammar, fire
from tests.support.site import UPSTREAM, Node, site

REPOSITORY, TAG = "fuzz/app", "v1"
PORTIONS = 9
GROWTH = 16 << 20
"""Bytes of resident memory from the first third to the end: more than the allocator plays with, and less than a leak of
260 bytes for each of 100,000 requests."""
TROUBLE = ("Traceback", "level=error", "level=critical")


@dataclass(frozen=True, slots=True)
class Report:
    findings: list[Findings]
    rss: list[int]
    """Bytes, before everything and after each portion."""
    trouble: list[str]
    """Lines of the log."""
    seconds: float

    @property
    def wrong(self) -> list[str]:
        told = [problem for found in self.findings for problem in found.wrong] + self.trouble
        grown = self.rss[-1] - self.rss[PORTIONS // 3]
        return told + [f"{grown / 2**20:.1f} MiB more resident memory at the end"] * (grown > GROWTH)


@contextmanager
def target(folder: Path) -> Iterator[tuple[Node, Content]]:
    """A node before a registry with one image of several blocks."""
    image = images.build(folder / "layout", [[("noise", images.noise(3, 700_000))], [("small", b"x")]])
    manifests, blobs = (
        {one.digest: image.path(one).read_bytes() for one in some}
        for some in ((image.index, image.manifest), image.blobs)
    )
    with registries.docker_registry(folder / "registry") as registry:
        registries.push(registry, image, REPOSITORY, TAG)
        with site(folder / "site", registry.url, 1) as (node,):
            yield node, Content(UPSTREAM, REPOSITORY, [TAG], manifests, blobs)


def run(folder: Path, requests: int, seed: int) -> Report:
    with target(folder) as (node, content):
        grammar, rss, found = Grammar(seed, content), [node.rss_bytes()], []
        began = time.monotonic()
        for _ in range(PORTIONS):
            found.append(trio.run(fire, node.host, node.mirror_port, grammar, content, requests // PORTIONS))
            rss.append(node.rss_bytes())
        seconds = time.monotonic() - began
        lines = node.log.read_text("utf-8", "replace").splitlines()
    return Report(found, rss, [line for line in lines if any(word in line for word in TROUBLE)], seconds)


def table(report: Report) -> Table:
    shown = Table(title="Odd and malformed requests at one node")
    for name in ("answers", "2xx and 3xx", "4xx", "501 and 505", "wrong", "resident, MiB"):
        shown.add_column(name, justify="right")
    done = 0
    for found, rss in zip(report.findings, report.rss[1:], strict=True):
        done += found.answers
        by_class = {digit: sum(n for code, n in found.statuses.items() if code[0] == digit) for digit in "12345"}
        good = by_class["2"] + by_class["3"]
        cells = (done, good, by_class["4"], by_class["5"], len(found.wrong), f"{rss / 2**20:.1f}")
        shown.add_row(*map(str, cells))
    return shown


@click.command()
@click.option("--requests", default=100_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(requests: int, seed: int) -> None:
    """Fire odd and malformed requests at a mirror, and tell what came of them."""
    if not registries.installed():
        sys.exit("docker-registry is not installed")
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        report = run(Path(folder), requests, seed)
    console = Console()
    console.print(table(report))
    console.print(f"{sum(found.answers for found in report.findings) / report.seconds:.0f} answers a second")
    for problem in report.wrong:
        console.print(problem, markup=False)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
