"""Reads of a block while one of five keepers limps: `python -m tests.benchmarks.tail [--plot FILE]`.

Five p2pd hold an image, each behind a link of its own; a sixth place in the lab is a reader made of the node's own
parts, which holds nothing, so that each read goes to the peers. It reads by the policy that ships and by four plain
ones, over the same exchange. Each run has new connections and reads a few blocks in good weather before the
fault comes.

Needs root (namespaces), iproute2 and docker-registry; the plot needs matplotlib.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.table import Table

from cache.memory import MemoryStore
from cache.tiered import Tiers
from node import assembly
from node.blocks.values import BlockAddress
from node.config.quantities import HostPort
from node.exchange.contract import Lane
from node.exchange.tls import TlsExchange
from node.identity.certificates import Credentials, load_authority, peer_of
from node.identity.identity import Identity
from node.oci.references import Locator
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from protocol.members import Member
from simulations.policies import Policy, Reader, hedged, k_of_all, k_of_k, one_peer, shipped
from tests.support import processes
from tests.support import registry as registries
from tests.support.bench_site import MB, MBIT, REPOSITORY, Bench, bench_site, console, noise_image
from tests.support.disk_like import DiskLike
from tests.support.lab import NoLabError, Rates, check_lab
from tests.support.site import UPSTREAM

KEEPERS, READER = 5, 5
SLOW, VICTIM = 50, 2
"""How much slower the slow keeper's link becomes, and which keeper it is: no seed of the site."""
WINDOW = 8
WARM_UP = 12
PATIENCE_S = 1.5
"""A plain policy that a fault makes slow begins no block after this time."""
DRAIN_S = 0.3
"""For answers that are on their way when a run ends: they count as received."""
LOCATOR = Locator(UPSTREAM, REPOSITORY, "blobs")


class NoRegistry:
    """What the peers cannot give is a failure here."""

    def connections(self, upstream: str) -> int:
        return 1

    async def blocks(
        self, locator: Locator, ref: ObjectRef, first: int, count: int, *, certain: bool = False,
        background: bool = False,
    ) -> AsyncGenerator[bytearray, None]:  # fmt: skip
        raise UnavailableError("the peers did not give the block")
        yield bytearray()


class FixedView:
    """The site as it was before the fault: how the membership finds out is measured elsewhere."""

    version, changed_at = 0, -math.inf

    def __init__(self, members: Sequence[Member]) -> None:
        self.site = self.known = tuple(sorted(members, key=lambda member: member.peer_id))
        self._members = {member.peer_id: member for member in members}

    def find(self, peer: PeerId) -> Member | None:
        return self._members.get(peer)

    def report_failure(self, peer: PeerId) -> None:
        pass

    def quarantine(self, peer: PeerId, reason: str) -> None:
        raise AssertionError(f"{peer}: {reason}")

    def is_quarantined(self, peer: PeerId) -> bool:
        return False


SHIPPED, K_OF_K = "shipped", "k of k"
POLICIES: dict[str, Policy] = {
    "one peer": one_peer, "one peer, hedged": hedged, K_OF_K: k_of_k, "k of k+m at once": k_of_all, SHIPPED: shipped,
}  # fmt: skip
LOADS = {"single": Lane.URGENT, "bulk": Lane.BULK}
"""Single: one urgent block at a time. Bulk: in order, WINDOW blocks at a time."""
Fault = Callable[[Bench], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def nothing(bench: Bench) -> Iterator[None]:
    yield


@contextlib.contextmanager
def slow_link(bench: Bench) -> Iterator[None]:
    bench.lab.set_node_rate(VICTIM, bench.lab.rates.node / SLOW)
    yield
    bench.lab.set_node_rate(VICTIM, bench.lab.rates.node)


@contextlib.contextmanager
def stopped(bench: Bench) -> Iterator[None]:
    bench.nodes[VICTIM].pause()
    yield
    bench.nodes[VICTIM].resume()


@contextlib.contextmanager
def killed(bench: Bench) -> Iterator[None]:
    """It stays so: the first run sees connections break, those after it see them refused."""
    bench.nodes[VICTIM].kill()
    yield


HEALTHY, SLOW_LINK, STOPPED = "healthy", "one at 1/50 of its rate", "one stopped"
SCENARIOS: dict[str, Fault] = {HEALTHY: nothing, SLOW_LINK: slow_link, STOPPED: stopped, "one killed": killed}


@dataclass(frozen=True, slots=True)
class Run:
    """`seconds` of each block; `extra` is bytes received beyond those needed, as a share of these."""

    seconds: list[float]
    took_s: float
    extra: float

    def at(self, share: float) -> float:
        """A quantile, in seconds: the smallest time that `share` of the blocks did not exceed."""
        return sorted(self.seconds)[max(0, math.ceil(share * len(self.seconds)) - 1)]


@contextlib.asynccontextmanager
async def reading(
    bench: Bench, credentials: Credentials, members: list[Member], lane: Lane
) -> AsyncIterator[tuple[Reader, TlsExchange]]:
    view = FixedView(members)

    async def refuse(peer: PeerId, request: object) -> None:
        raise UnavailableError("a reader only")

    exchange = TlsExchange(
        credentials.server_context(), credentials.client_context(), peer_of,
        listen=HostPort(bench.lab.address(READER), 0), locate=view.find, refused=view.is_quarantined,
        handler=refuse,  # type: ignore[arg-type] # never answers
    )  # fmt: skip
    tiers = Tiers(MemoryStore(0, trio.current_time), DiskLike(0, trio.current_time), None)
    async with trio.open_nursery() as work:
        blocks = assembly.blocks(credentials.identity, view, exchange, tiers, upstream=NoRegistry(), nursery=work)
        await work.start(exchange.run)
        yield Reader(blocks, lane, Random(1), blocks.site.health.late_after_s), exchange
        work.cancel_scope.cancel()


async def timed(policy: Policy, reader: Reader, addresses: Sequence[BlockAddress], window: int) -> list[float]:
    """In order: a block is begun when the one `window` places before it, and all before that, are there."""
    seconds: list[float] = []
    done = [trio.Event() for _ in addresses]
    deadline = trio.current_time() + (math.inf if policy is shipped else PATIENCE_S)

    async def one(number: int) -> None:
        began = trio.current_time()
        await policy(reader, addresses[number])
        seconds.append(trio.current_time() - began)
        done[number].set()

    async with trio.open_nursery() as nursery:
        for number in range(len(addresses)):
            if number >= window:
                await done[number - window].wait()
            if trio.current_time() > deadline:
                break
            nursery.start_soon(one, number)
    return seconds


async def run(
    bench: Bench, who: tuple[Credentials, list[Member]], load: str, policy: Policy, fault: Fault,
    addresses: Sequence[BlockAddress],
) -> Run:  # fmt: skip
    window = 1 if load == "single" else WINDOW
    async with reading(bench, *who, LOADS[load]) as (reader, exchange):
        await timed(policy, reader, addresses[:WARM_UP], window)
        with fault(bench):
            before, began = exchange.statistics().bytes_received, trio.current_time()
            seconds = await timed(policy, reader, addresses[WARM_UP:], window)
            took_s = trio.current_time() - began
            with trio.move_on_after(DRAIN_S):
                while exchange.statistics().requests_out:  # noqa: ASYNC110 # it is no event to the exchange
                    await trio.sleep(0.01)
            received = exchange.statistics().bytes_received - before
    return Run(seconds, took_s, received / (len(seconds) * BLOCK_SIZE) - 1)


Runs = dict[tuple[str, str, str], Run]
"""By scenario, load and policy."""


def measure(bench: Bench, key: Path, addresses: Sequence[BlockAddress]) -> Runs:
    keepers = [
        Member(PeerId(node.status()["peer_id"]), node.name, "lab", (f"{node.host}:{node.bulk_port}",))
        for node in bench.nodes
    ]
    identity = Identity.of(Ed25519PrivateKey.generate())
    credentials = Credentials.issued(load_authority(key), identity, "reader")
    members = [*keepers, Member(identity.peer_id, "reader", "lab", (), 0.0)]
    runs: Runs = {}
    # This thread's sockets belong to the reader's place in the lab.
    with bench.lab.nodes[READER].entered():
        for scenario, fault in SCENARIOS.items():
            for load in LOADS:
                for name, policy in POLICIES.items():
                    runs[scenario, load, name] = trio.run(
                        run, bench, (credentials, members), load, policy, fault, addresses
                    )
    return runs


def table_of(runs: Runs, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("scenario", "load", "policy", "blocks", "p50 ms", "p95", "p99", "max", "MB/s", "extra bytes"):
        table.add_column(column, justify="left" if column in ("scenario", "load", "policy") else "right")
    for (scenario, load, name), one in runs.items():
        times = [f"{one.at(share) * 1000:.0f}" for share in (0.5, 0.95, 0.99, 1.0)]
        rate = f"{len(one.seconds) * BLOCK_SIZE / one.took_s / MB:.1f}"
        count = str(len(one.seconds))
        table.add_row(
            scenario, load, name, count, *times, rate, f"{one.extra:.1%}", end_section=name == SHIPPED,
            style="bold" if name == SHIPPED else "",
        )  # fmt: skip
    return table


TIE = 1.1
"""Within a tenth: what two runs of the same policy differ by."""


def checks(runs: Runs) -> Iterator[tuple[str, str, bool]]:
    """What was promised, what came out, and whether that holds."""
    ours = {(scenario, load): one for (scenario, load, name), one in runs.items() if name == SHIPPED}
    cut = 1 - ours[SLOW_LINK, "single"].at(0.95) / runs[SLOW_LINK, "single", K_OF_K].at(0.95)
    yield "single, one slow: p95 at least 40 % below k of k", f"{cut:.0%} below", cut >= 0.4
    extra = ours[HEALTHY, "bulk"].extra
    yield "bulk, healthy: at most 5 % extra bytes", f"{extra:.1%}", extra <= 0.05
    p99 = ours[STOPPED, "bulk"].at(0.99) / ours[HEALTHY, "bulk"].at(0.99)
    yield "bulk, one stopped: p99 at most 1.5 times the healthy", f"{p99:.2f} times", p99 <= 1.5
    took = ours[STOPPED, "bulk"].took_s / ours[HEALTHY, "bulk"].took_s
    yield "bulk, one stopped: done in at most 1.2 times the healthy", f"{took:.2f} times", took <= 1.2
    for (scenario, load), one in ours.items():
        what = "p95" if load == "single" else "time for all"
        best, name = min((_cost(runs[scenario, load, name], load), name) for name in POLICIES)
        ratio = _cost(one, load) / best
        yield f"{load}, {scenario}: {what} best or tied", f"{ratio:.2f} times {name}", ratio <= TIE


def _cost(one: Run, load: str) -> float:
    """Seconds: what a client waits for. In bulk most of a block's time is its turn on the link."""
    return one.at(0.95) if load == "single" else one.took_s / len(one.seconds)


def plot(runs: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.5), layout="constrained")
    panels = figure.subplots(len(LOADS), len(SCENARIOS), sharey=True)
    for row, load in zip(panels, LOADS, strict=True):
        for axes, scenario in zip(row, SCENARIOS, strict=True):
            for name in POLICIES:
                times = sorted(one * 1000 for one in runs[scenario, load, name].seconds)
                shares = [(number + 1) / len(times) for number in range(len(times))]
                axes.step(times, shares, where="post", label=name, linewidth=2.5 if name == SHIPPED else 1.2)
            axes.set(xscale="log", title=f"{load}: {scenario}", xlabel="ms")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("share of blocks")
    panels[0][0].legend()
    figure.savefig(path)


async def fill(bench: Bench, tag: str) -> None:
    async with trio.open_nursery() as nursery:
        for index in range(KEEPERS):
            nursery.start_soon(bench.through_mirror(index, tag).pull)


@click.command()
@click.option("--rate", default=200.0, show_default=True, help="Of each node's link, Mbit/s.")
@click.option("--blocks", default=40, show_default=True, help="Read in each run.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Write the distributions there (.svg, .png).")
def main(rate: float, blocks: int, picture: Path | None) -> None:
    try:
        check_lab()
    except NoLabError as error:
        sys.exit(f"{error}")
    with processes.scratch() as scratch:
        image = noise_image(scratch / "image", (1, (blocks + WARM_UP) * BLOCK_SIZE))
        with registries.docker_registry(scratch / "registry") as registry:
            registries.push(registry, image, REPOSITORY, "v1")
        layer = image.layers[0]
        ref = ObjectRef(Digest.parse(layer.digest), layer.size)
        addresses = [BlockAddress(LOCATOR, ref, index) for index in range(blocks + WARM_UP)]
        rates = Rates(rate * MBIT, rate * MBIT)
        with bench_site(
            scratch / "site", scratch / "registry", READER + 1, rates, running=KEEPERS, memory="256MiB"
        ) as bench:
            trio.run(fill, bench, "v1")
            runs = measure(bench, scratch / "site" / "cluster.key", addresses)
    console.print(table_of(runs, f"{KEEPERS} keepers, {rate:g} Mbit/s a node, {blocks} blocks a run"))
    for promise, result, kept in checks(runs):
        console.print(f"{'yes' if kept else 'NO ':3}  {promise}: {result}")
    if picture is not None:
        plot(runs, picture)


if __name__ == "__main__":
    main()
