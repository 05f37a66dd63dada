"""Reads blocks while one of five keepers is slow or dead: `python -m tests.benchmarks.tail [--plot FILE]`.

Five p2pd hold an image, each behind its own link. The sixth namespace of the lab has a reader made of the node's own
parts. It holds nothing, so that each read asks the peers. It reads by the shipped policy and by four plain policies,
over the same exchange. Each run has new connections, and reads a few blocks before the fault begins.

Needs root (namespaces), iproute2 and docker-registry; the plot needs matplotlib.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import click
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.table import Table

from cache.memory import MemoryStore
from cache.tiered import Tiers
from node import assembly
from node.blocks.values import Stretch
from node.config.quantities import HostPort
from node.exchange.connection import Endpoint
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
from tests.support.site_in_memory import FixedView

KEEPERS, READER = 5, 5
SLOW, VICTIM = 50, 2
"""The factor by which a keeper's link slows down, and the keeper's number: it is no seed of the site."""
WINDOW = 8
WARM_UP = 12
PATIENCE_S = 1.5
"""A plain policy begins no block after this time, because a fault may make it very slow."""
DRAIN_S = 0.3
"""At the end of a run, time for answers that are still in transit: they count as received."""
LOCATOR = Locator(UPSTREAM, REPOSITORY, "blobs")


class NoRegistry:
    """A registry without blocks: a read that the peers cannot answer fails."""

    def connections(self, upstream: str) -> int:
        return 1

    async def blocks(self, *run: object, **options: object) -> AsyncGenerator[bytearray, None]:
        raise UnavailableError("no peer sent the block")
        yield bytearray()


class ViewBefore(FixedView):
    """The site as it was before the fault. Other tests measure how fast the membership detects a fault."""

    def quarantine(self, peer: PeerId, reason: str) -> None:
        raise AssertionError(f"{peer}: {reason}")


SHIPPED, K_OF_K = "shipped", "k of k"
POLICIES: dict[str, Policy] = {
    "one peer": one_peer,
    "one peer, hedged": hedged,
    K_OF_K: k_of_k,
    "k of k+m at once": k_of_all,
    SHIPPED: shipped,
}
LOADS = {"single": Lane.URGENT, "bulk": Lane.BULK}
"""Single: one urgent block at a time. Bulk: WINDOW blocks at a time, in order."""
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
    """The keeper stays dead: in the first run connections break, in later runs they are refused."""
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
    view = ViewBefore(members)

    async def refuse(peer: PeerId, request: object) -> None:
        raise UnavailableError("a reader only")

    endpoint = Endpoint(
        credentials.server_context(),
        credentials.client_context(),
        peer_of,
        listen=HostPort(bench.lab.address(READER), 0),
        locate=view.find,
        refused=view.is_quarantined,
        handler=refuse,  # type: ignore[arg-type] # never answers
    )
    exchange = TlsExchange(endpoint)
    tiers = Tiers(MemoryStore(0, trio.current_time), DiskLike(0, trio.current_time), None)
    async with trio.open_nursery() as work:
        blocks = assembly.blocks(credentials.identity, view, exchange, tiers, upstream=NoRegistry(), nursery=work)
        await work.start(exchange.run)
        yield Reader(blocks, lane, Random(1), blocks.site.health.late_after_s), exchange
        work.cancel_scope.cancel()


async def timed(policy: Policy, reader: Reader, blocks: Sequence[Stretch], window: int) -> list[float]:
    """Seconds of each read. A block begins once the block `window` places before it and all earlier ones arrived."""
    seconds: list[float] = []
    done = [trio.Event() for _ in blocks]
    deadline = trio.current_time() + (math.inf if policy is shipped else PATIENCE_S)

    async def one(number: int) -> None:
        began = trio.current_time()
        await policy(reader, blocks[number])
        seconds.append(trio.current_time() - began)
        done[number].set()

    async with trio.open_nursery() as nursery:
        for number in range(len(blocks)):
            if number >= window:
                await done[number - window].wait()
            if trio.current_time() > deadline:
                break
            nursery.start_soon(one, number)
    return seconds


Case = tuple[str, str, str]
"""A scenario, a load and a policy."""


async def run(bench: Bench, reader_of: tuple[Credentials, list[Member]], case: Case, blocks: Sequence[Stretch]) -> Run:
    scenario, load, name = case
    policy, window = POLICIES[name], 1 if load == "single" else WINDOW
    async with reading(bench, *reader_of, LOADS[load]) as (reader, exchange):
        await timed(policy, reader, blocks[:WARM_UP], window)
        with SCENARIOS[scenario](bench):
            before, began = exchange.statistics().bytes_received, trio.current_time()
            seconds = await timed(policy, reader, blocks[WARM_UP:], window)
            took_s = trio.current_time() - began
            with trio.move_on_after(DRAIN_S):
                while exchange.statistics().requests_out:  # noqa: ASYNC110 # it is no event to the exchange
                    await trio.sleep(0.01)
            received = exchange.statistics().bytes_received - before
    return Run(seconds, took_s, received / (len(seconds) * BLOCK_SIZE) - 1)


Runs = dict[Case, Run]


def measure(bench: Bench, key: Path, blocks: Sequence[Stretch]) -> Runs:
    keepers = [
        Member(PeerId(node.status()["peer_id"]), node.name, "lab", (f"{node.host}:{node.bulk_port}",))
        for node in bench.nodes
    ]
    identity = Identity.of(Ed25519PrivateKey.generate())
    credentials = Credentials.issued(load_authority(key), identity, "reader")
    members = [*keepers, Member(identity.peer_id, "reader", "lab", (), weight=0.0)]
    runs: Runs = {}
    # This thread's sockets belong to the reader's namespace.
    with bench.lab.nodes[READER].entered():
        for case in product(SCENARIOS, LOADS, POLICIES):
            runs[case] = trio.run(partial(run, bench, (credentials, members), case, blocks=blocks))
    return runs


def table_of(runs: Runs, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("scenario", "load", "policy", "blocks", "p50 ms", "p95", "p99", "max", "MB/s", "extra bytes"):
        table.add_column(column, justify="left" if column in ("scenario", "load", "policy") else "right")
    for case, result in runs.items():
        times = [f"{result.at(share) * 1000:.0f}" for share in (0.5, 0.95, 0.99, 1.0)]
        rate = f"{len(result.seconds) * BLOCK_SIZE / result.took_s / MB:.1f}"
        row = (*case, str(len(result.seconds)), *times, rate, f"{result.extra:.1%}")
        is_shipped = case[2] == SHIPPED
        table.add_row(*row, end_section=is_shipped, style="bold" if is_shipped else "")
    return table


TIE = 1.1
"""Two runs of the same policy differ by up to a tenth."""


def checks(runs: Runs) -> Iterator[tuple[str, str, bool]]:
    """Yields each promise, the result, and whether the promise holds."""
    ours = {(scenario, load): result for (scenario, load, name), result in runs.items() if name == SHIPPED}
    cut = 1 - ours[SLOW_LINK, "single"].at(0.95) / runs[SLOW_LINK, "single", K_OF_K].at(0.95)
    yield "single, one slow: p95 at least 40 % below k of k", f"{cut:.0%} below", cut >= 0.4
    extra = ours[HEALTHY, "bulk"].extra
    yield "bulk, healthy: at most 5 % extra bytes", f"{extra:.1%}", extra <= 0.05
    p99 = ours[STOPPED, "bulk"].at(0.99) / ours[HEALTHY, "bulk"].at(0.99)
    yield "bulk, one stopped: p99 at most 1.5 times the healthy", f"{p99:.2f} times", p99 <= 1.5
    took = ours[STOPPED, "bulk"].took_s / ours[HEALTHY, "bulk"].took_s
    yield "bulk, one stopped: done in at most 1.2 times the healthy", f"{took:.2f} times", took <= 1.2
    for (scenario, load), result in ours.items():
        measure = "p95" if load == "single" else "time for all"
        best, name = min((_cost(runs[scenario, load, name], load), name) for name in POLICIES)
        ratio = _cost(result, load) / best
        yield f"{load}, {scenario}: {measure} best or tied", f"{ratio:.2f} times {name}", ratio <= TIE


def _cost(result: Run, load: str) -> float:
    """The seconds that a client waits. In bulk a block spends most of its time in the queue for the link."""
    return result.at(0.95) if load == "single" else result.took_s / len(result.seconds)


def plot(runs: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.5), layout="constrained")
    panels = figure.subplots(len(LOADS), len(SCENARIOS), sharey=True)
    for row, load in zip(panels, LOADS, strict=True):
        for axes, scenario in zip(row, SCENARIOS, strict=True):
            for name in POLICIES:
                times = sorted(seconds * 1000 for seconds in runs[scenario, load, name].seconds)
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
@click.option("--rate", default=200.0, show_default=True, help="Rate of each node's link, Mbit/s.")
@click.option("--blocks", default=40, show_default=True, help="Blocks that each run reads.")
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
        stretches = [Stretch(LOCATOR, ref, (index,)) for index in range(blocks + WARM_UP)]
        rates = Rates(rate * MBIT, rate * MBIT)
        with bench_site(
            scratch / "site", scratch / "registry", READER + 1, rates, running=KEEPERS, memory="256MiB"
        ) as bench:
            trio.run(fill, bench, "v1")
            runs = measure(bench, scratch / "site" / "cluster.key", stretches)
    console.print(table_of(runs, f"{KEEPERS} keepers, {rate:g} Mbit/s a node, {blocks} blocks a run"))
    for promise, result, kept in checks(runs):
        console.print(f"{'yes' if kept else 'NO ':3}  {promise}: {result}")
    if picture is not None:
        plot(runs, picture)


if __name__ == "__main__":
    main()
