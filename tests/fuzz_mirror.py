"""Malformed and odd requests at a real p2pd: `python -m tests.fuzz_mirror [--requests N] [--seed N]`.

Sends whole and mangled requests (tests/support/fuzz.py) to a mirror of a docker-registry. The exit status is 1 if the
mirror failed by its own fault, logged a traceback, used more memory after the first third, which fills its caches, or
had a turn of its loop of LONG_TURN_S or more (tests/support/turns.py).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import trio
from rich.console import Console
from rich.table import Table

from tests.support import image as images
from tests.support import registry as registries
from tests.support.fuzz import Content, Findings, Grammar, fire
from tests.support.site import UPSTREAM, Node, site
from tests.support.turns import LIMIT_S, LongTurn
from tests.support.watched_daemon import WATCHED, turns_of

REPOSITORY, TAG = "fuzz/app", "v1"
PORTIONS = 9
GROWTH = 16 << 20
"""Largest growth of resident memory in bytes after the first third: more than the allocator's variation, and less than
a leak of 260 bytes in each of 100,000 requests."""
LONG_TURN_S = 0.1
"""CPU time of a turn that delays all other clients."""
TROUBLE = ("Traceback", "level=error", "level=critical")


@dataclass(frozen=True, slots=True)
class Report:
    findings: list[Findings]
    rss: list[int]
    """Bytes, before the first portion and after each."""
    trouble: list[str]
    """Lines of the log."""
    turns: list[LongTurn]
    seconds: float

    @property
    def wrong(self) -> list[str]:
        problems = [problem for portion in self.findings for problem in portion.wrong] + self.trouble
        problems += [str(turn) for turn in self.turns if turn.cpu_s >= LONG_TURN_S]
        grown = self.rss[-1] - self.rss[PORTIONS // 3]
        return problems + [f"{grown / 2**20:.1f} MiB more resident memory at the end"] * (grown > GROWTH)


@contextmanager
def target(folder: Path) -> Iterator[tuple[Node, Content]]:
    """A node in front of a registry with one image of several blocks."""
    image = images.build(folder / "layout", [[("noise", images.noise(3, 700_000))], [("small", b"x")]])
    manifests, blobs = (
        {part.digest: image.path(part).read_bytes() for part in parts}
        for parts in ((image.index, image.manifest), image.blobs)
    )
    with registries.docker_registry(folder / "registry") as registry:
        registries.push(registry, image, REPOSITORY, TAG)
        content = Content(UPSTREAM, REPOSITORY, [TAG], manifests=manifests, blobs=blobs)
        with site(folder / "site", registry.url, 1, start=False) as (node,):
            node.program = WATCHED
            node.start()
            yield node, content


def run(folder: Path, requests: int, seed: int) -> Report:
    with target(folder) as (node, content):
        grammar, rss, findings = Grammar(seed, content), [node.rss_bytes()], []
        shoot = partial(fire, node.host, node.mirror_port, grammar)
        started, began = len(turns_of(node.data)), time.monotonic()
        for _ in range(PORTIONS):
            findings.append(trio.run(shoot, content, requests // PORTIONS))
            rss.append(node.rss_bytes())
        seconds = time.monotonic() - began
        lines = node.log.read_text("utf-8", "replace").splitlines()
        turns = turns_of(node.data, started)
    return Report(findings, rss, [line for line in lines if any(word in line for word in TROUBLE)], turns, seconds)


def table(report: Report) -> Table:
    shown = Table(title="Odd and malformed requests at one node")
    for name in ("answers", "2xx and 3xx", "4xx", "501 and 505", "wrong", "resident, MiB"):
        shown.add_column(name, justify="right")
    done = 0
    for portion, rss in zip(report.findings, report.rss[1:], strict=True):
        done += portion.answers
        by_class = {digit: sum(n for code, n in portion.statuses.items() if code[0] == digit) for digit in "12345"}
        good = by_class["2"] + by_class["3"]
        cells = (done, good, by_class["4"], by_class["5"], len(portion.wrong), f"{rss / 2**20:.1f}")
        shown.add_row(*map(str, cells))
    return shown


@click.command()
@click.option("--requests", default=100_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(requests: int, seed: int) -> None:
    """Send odd and malformed requests to a mirror, and print the results."""
    if not registries.installed():
        sys.exit("docker-registry is not installed")
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        report = run(Path(folder), requests, seed)
    console = Console()
    console.print(table(report))
    longest = max((turn.cpu_s for turn in report.turns), default=0.0)
    console.print(
        f"{len(report.turns)} turns of the loop over {LIMIT_S * 1e3:.0f} ms, the longest {longest * 1e3:.0f} ms"
    )
    console.print(f"{sum(portion.answers for portion in report.findings) / report.seconds:.0f} answers a second")
    for problem in report.wrong:
        console.print(problem, markup=False)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
