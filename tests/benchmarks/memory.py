"""Resident memory while 8 clients of a node pull 8 different 1 GiB layers at once.

`python -m tests.benchmarks.memory [one|alone|site|slow ...]`; about 2 minutes without `one`. The registry generates its
bytes while it sends them (tests/support/generated_origin.py). Everything else is real: p2pd with the default memory
budget, its disk store, and TLS between the nodes. Pulls are cut after a time, because five nodes share a machine.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support.generated_origin import REPOSITORY
from tests.support.leftovers import ended_with_the_run
from tests.support.processes import free_ports, scratch, terminate
from tests.support.site import ROOT, UPSTREAM, Node, site

BOUND_MIB = 256
SAMPLE_S = 0.1
SLOW_BYTES_PER_S = 1_000_000


@dataclass(frozen=True, slots=True)
class Scenario:
    """`seconds`: when the pulls are cut. `rate`: bytes per second that each client reads, 0 for no limit."""

    title: str
    nodes: int
    clients: int
    seconds: float
    rate: int = 0


SCENARIOS = {
    "one": Scenario("alone, 1 client", 1, 1, 20),
    "alone": Scenario("alone, 8 clients", 1, 8, 70),
    "site": Scenario("site of five, 8 clients at each", 5, 8, 30),
    "slow": Scenario("alone, 8 clients at 1 MB/s", 1, 8, 8, rate=SLOW_BYTES_PER_S),
}


@dataclass(slots=True)
class Memory:
    """The memory of a process in MiB: when it was idle, and the largest values of the other fields."""

    idle: float = 0
    rss: float = 0
    anon: float = 0
    high_water: float = 0

    def sample(self, pid: int) -> None:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        fields = {words[0]: float(words[1]) / 1024 for words in lines if words[0] in ("VmRSS:", "RssAnon:", "VmHWM:")}
        self.idle = self.idle or fields["VmRSS:"]
        self.rss = max(self.rss, fields["VmRSS:"])
        self.anon = max(self.anon, fields["RssAnon:"])
        self.high_water = fields["VmHWM:"]


@dataclass(slots=True)
class Origin:
    url: str
    digests: list[str]

    def asked(self) -> int:
        with urllib.request.urlopen(f"{self.url}/asked", timeout=10) as response:
            return int(response.read())


@contextmanager
def generated_origin() -> Iterator[Origin]:
    (port,) = free_ports("127.0.0.1", 1)
    command = [sys.executable, "-m", "tests.support.generated_origin", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        ended_with_the_run(process)
        try:
            assert process.stdout is not None
            yield Origin(f"http://127.0.0.1:{port}", process.stdout.readline().split())
        finally:
            process.kill()


@contextmanager
def sampled(nodes: Sequence[Node]) -> Iterator[dict[str, Memory]]:
    memories = {node.name: Memory() for node in nodes}
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(SAMPLE_S):
            for node in nodes:
                memories[node.name].sample(node.process.pid)

    for node in nodes:
        memories[node.name].sample(node.process.pid)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield memories
    finally:
        ended.set()
        thread.join()


def drain(node: Node, digest: str, rate: int) -> subprocess.Popen[str]:
    path = f"/v2/{UPSTREAM}/{REPOSITORY}/blobs/{digest}"
    command = [sys.executable, "-m", "tests.support.drain", node.host, str(node.mirror_port), path, str(rate)]
    client = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    ended_with_the_run(client)
    return client


def read_by(client: subprocess.Popen[str]) -> int:
    terminate(client)  # type: ignore[arg-type]
    assert client.stdout is not None
    return int(client.stdout.read() or 0)


@dataclass(slots=True)
class Result:
    scenario: Scenario
    seconds: float
    read: int
    asked: int
    memories: list[Memory] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        worst = max(self.memories, key=lambda memory: memory.high_water)
        memory = (f"{mib:.0f}" for mib in (worst.idle, worst.rss, worst.anon, worst.high_water))
        read, asked = f"{self.read / 2**30:.2f}", f"{self.asked / 2**30:.2f}"
        ahead = f"{(self.asked - self.read) / 2**20:.0f}" if self.scenario.nodes == 1 else ""
        speed = f"{self.read / self.seconds / 1e6:.0f}"
        return (self.scenario.title, *memory, str(BOUND_MIB), read, speed, asked, ahead)


def measure(scenario: Scenario, origin: Origin, folder: Path) -> Result:
    with site(folder, origin.url, scenario.nodes) as nodes, sampled(nodes) as memories:
        start, before = time.monotonic(), origin.asked()
        clients = [
            drain(node, digest, scenario.rate) for node in nodes for digest in origin.digests[: scenario.clients]
        ]
        while any(client.poll() is None for client in clients) and time.monotonic() < start + scenario.seconds:
            time.sleep(SAMPLE_S)
        seconds, asked = time.monotonic() - start, origin.asked() - before
        read = sum(map(read_by, clients))
    return Result(scenario, seconds, read, asked=asked, memories=list(memories.values()))


def main() -> int:
    columns = ["", "idle", "peak RSS", "anon", "VmHWM", "bound", "GiB read", "MB/s", "GiB from registry", "MiB ahead"]
    table = Table(*columns, title="MiB of the node that used most")
    worst = 0.0
    with generated_origin() as origin:
        for name in sys.argv[1:] or ["alone", "site", "slow"]:
            with scratch("shoal-bench-") as folder:
                result = measure(SCENARIOS[name], origin, folder / "site")
            worst = max(worst, *(memory.high_water for memory in result.memories))
            table.add_row(*result.row())
    Console(width=140).print(table)
    return int(worst > BOUND_MIB)


if __name__ == "__main__":
    sys.exit(main())
