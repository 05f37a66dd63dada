"""`make churn`: members and clients constantly join and leave, and the resources of two daemons must not grow.

Two daemons stay. The others are stopped or killed in turn and return, sometimes with only their keys. Clients pull,
leave in mid-pull, or connect and send nothing, half a request, or garbage. Operators send requests and do not wait for
the answers. Configurations are reloaded. After each of these rounds comes a rest, with all members up and no client.
There the tasks, files, sockets and memory of the staying daemons are counted, and must be as in the first rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import trio
from rich.table import Table

from tests.chaos.faults import Site
from tests.chaos.run import REPOSITORY, console, made, pull, read_log, tag_of
from tests.support.lab_client import Client
from tests.support.site import UPSTREAM, wait_joined

STAY = 2
LARGE = 4
SMALL = (0, 2, 3)
"""Indices of the images that clients pull whole: many pulls of few bytes."""
METRICS = ("127.0.0.1", 5051)
PAUSE_S = 1.0
"""Mean pause between the acts of a client. Each daemon that stays has CLIENTS clients."""
CLIENTS = 2
AWAY_S = 4.0
MEMBER_PAUSE_S = 8.0
RELOAD_PAUSE_S = 15.0
REST_S = 75.0
"""Longer than the idle timeout between members, and longer than the mirror's last answers to clients take."""
ROUNDS = 6
MORE = {"tasks": 12, "files": 12, "sockets": 12, "rss_mib": 12}
"""Growth from the first rest to the last that does not count as a leak: a connection per lane to each other member, or
memory that the allocator keeps. A round has hundreds of acts on each daemon, so that a leak in any grows far more."""

Act = Callable[["Churn", int, Random], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Sample:
    tasks: int
    files: int
    sockets: int
    rss_mib: float


@dataclass(slots=True)
class Churn:
    site: Site
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rests: dict[int, list[Sample]] = field(default_factory=dict)
    most: dict[int, Sample] = field(default_factory=dict)
    plain: dict[int, str] = field(default_factory=dict)
    """The original configurations."""


def run(seed: int, seconds: float, nodes: int) -> list[str]:
    """Run, print the results, and return the failures."""
    scratch = Path(tempfile.mkdtemp(prefix="shoal-"))
    wrong = ["the run broke off"]
    try:
        with made(scratch, nodes, metrics=f"{METRICS[0]}:{METRICS[1]}") as site:
            churn = Churn(site)
            trio.run(_play, churn, seed, seconds)
            for node in site.nodes:
                read_log(node, churn.wrong)
            _compare(churn)
            console.print(_table(churn, seconds))
            wrong = churn.wrong
    finally:
        shutil.rmtree(scratch / "registry", ignore_errors=True)
        if not wrong:
            shutil.rmtree(scratch, ignore_errors=True)
    for sentence in [f"FAILED, logs: {scratch}", *wrong[:50]] if wrong else []:
        console.print(sentence, markup=False)
    return wrong


async def _play(churn: Churn, seed: int, seconds: float) -> None:
    rounds = max(2, min(ROUNDS, round(seconds / (2 * REST_S))))
    for number in range(rounds):
        with trio.move_on_after(seconds / rounds - min(REST_S, seconds / rounds / 2)):
            await _turmoil(churn, Random(f"{seed}/{number}"))
        await _rest(churn, min(REST_S, seconds / rounds / 2))
        for index in range(STAY):
            sample = await _sample(churn.site, index)
            churn.rests.setdefault(index, []).append(sample)
            console.print(f"rest {number + 1}: {churn.site.nodes[index].name}: {sample}", markup=False)


async def _turmoil(churn: Churn, rng: Random) -> None:
    """Runs until it is cancelled, which interrupts clients and members in the middle of their acts."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_members, churn, Random(rng.random()))
        for index in range(STAY):
            nursery.start_soon(_reloads, churn, index, Random(rng.random()))
            nursery.start_soon(_watch, churn, index)
            for _ in range(CLIENTS):
                nursery.start_soon(_client, churn, index, Random(rng.random()))


async def _rest(churn: Churn, seconds: float) -> None:
    """Wait until all members are up and see each other, then leave the site idle."""
    nodes = churn.site.nodes
    for index in list(churn.site.down):
        await _start(churn, index)
    await trio.to_thread.run_sync(wait_joined, nodes[:STAY], len(nodes))
    await trio.sleep(seconds)


# Members


async def _members(churn: Churn, rng: Random) -> None:
    site = churn.site
    while True:
        await trio.sleep(rng.expovariate(1 / MEMBER_PAUSE_S))
        index = rng.randrange(STAY, len(site.nodes))
        node, how = site.nodes[index], rng.choice(("stopped", "killed", "killed, with its cache lost"))
        site.down.add(index)
        if how == "stopped":
            if await trio.to_thread.run_sync(node.stop):
                churn.wrong.append(f"{node.name} ended with {node.process.returncode} when it was asked to stop")
        else:
            node.kill()
        if how.endswith("lost"):
            node.forget()
        churn.done[f"members {how}"] += 1
        await trio.sleep(rng.expovariate(1 / AWAY_S))
        await _start(churn, index)


async def _start(churn: Churn, index: int) -> None:
    node = churn.site.nodes[index]
    if node.process.poll() is not None:
        node.launch()
    await trio.to_thread.run_sync(node.wait_ready)
    churn.site.down.discard(index)


async def _reloads(churn: Churn, index: int, rng: Random) -> None:
    node = churn.site.nodes[index]
    plain = churn.plain.setdefault(index, node.config.read_text())
    other = plain.replace("[cluster]", 'connections = 5\nrate = "50MiB"\n[cluster]').replace("8MiB", "7MiB")
    while True:
        for text in (other, plain):
            await trio.sleep(rng.expovariate(1 / RELOAD_PAUSE_S))
            node.config.write_text(text)
            node.process.send_signal(signal.SIGHUP)
            churn.done["reloads"] += 1


# Clients


async def _client(churn: Churn, index: int, rng: Random) -> None:
    while True:
        await trio.sleep(rng.expovariate(1 / PAUSE_S))
        act = rng.choices(list(ACTS), list(ACTS.values()))[0]
        with contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            await act(churn, index, rng)
        churn.done[act.__name__.strip("_").replace("_", " ")] += 1


async def _whole_pulls(churn: Churn, index: int, rng: Random) -> None:
    problem = await pull(churn.site, index, tag_of(rng.choice(SMALL)))
    if problem:
        churn.wrong.append(f"a pull through {churn.site.nodes[index].name}: {problem[:300]}")


async def _pulls_broken_off(churn: Churn, index: int, rng: Random) -> None:
    with trio.move_on_after(rng.uniform(0, 0.4)):
        await pull(churn.site, index, tag_of(rng.choice(SMALL)))


@contextlib.asynccontextmanager
async def _connected(churn: Churn, index: int, port: int, rng: Random) -> AsyncIterator[trio.SocketStream]:
    """A connection that ends with FIN or with RST."""
    stream = await churn.site.lab.nodes[index].connect(churn.site.nodes[index].host, port)
    async with stream:
        yield stream
        if rng.random() < 0.5:
            stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _half_requests(churn: Churn, index: int, rng: Random) -> None:
    text = f"GET /v2/{UPSTREAM}/{REPOSITORY}/tags/list HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    async with _connected(churn, index, churn.site.nodes[index].mirror_port, rng) as stream:
        await stream.send_all(text[: rng.randrange(len(text) + 1)])
        await trio.sleep(rng.uniform(0, 2))


async def _names_that_are_not_there(churn: Churn, index: int, rng: Random) -> None:
    text = f"GET /v2/{UPSTREAM}/chaos/none-{rng.randrange(50)}/manifests/v1 HTTP/1.1\r\nHost: x\r\n\r\n"
    async with _connected(churn, index, churn.site.nodes[index].mirror_port, rng) as stream:
        await stream.send_all(text.encode())
        with trio.move_on_after(rng.uniform(0, 1)):
            await stream.receive_some(4096)


async def _strangers(churn: Churn, index: int, rng: Random) -> None:
    """Connect to a port for members, and send rubbish."""
    node = churn.site.nodes[index]
    async with _connected(churn, index, rng.choice((node.bulk_port, node.libp2p_port)), rng) as stream:
        await stream.send_all(rng.randbytes(rng.choice((1, 64, 4096))))
        await trio.sleep(rng.uniform(0, 2))


async def _slow_clients(churn: Churn, index: int, rng: Random) -> None:
    """Request a whole large object, and read little of it."""
    site, node = churn.site, churn.site.nodes[index]
    connect = partial(site.lab.nodes[index].connect, node.host, node.mirror_port, receive_buffer=4096)
    client = Client(connect, f"{UPSTREAM}/{REPOSITORY}", tag_of(LARGE))
    with trio.move_on_after(rng.uniform(1, 8)):
        index_of = await client.manifest(client.reference)
        manifest = await client.manifest(index_of["manifests"][0]["digest"])
        async with await connect() as stream:
            path = f"/v2/{client.repository}/blobs/{manifest['layers'][0]['digest']}"
            await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await stream.receive_some(64)
            await trio.sleep_forever()


async def _operators(churn: Churn, index: int, rng: Random) -> None:
    path = rng.choice(("GET /status", "GET /peers", "GET /cache", f"POST /pull?image={UPSTREAM}/{REPOSITORY}:v3"))
    async with await trio.open_unix_socket(churn.site.nodes[index].socket) as stream:
        await stream.send_all(f"{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        with trio.move_on_after(rng.uniform(0, 0.3)):
            await stream.receive_some(4096)


ACTS: dict[Act, int] = {_whole_pulls: 4, _pulls_broken_off: 4, _half_requests: 3, _slow_clients: 1}
ACTS |= dict.fromkeys((_names_that_are_not_there, _strangers, _operators), 2)
"""The acts of clients, with their weights."""


# Measuring


async def _watch(churn: Churn, index: int) -> None:
    while True:
        sample = await _sample(churn.site, index)
        most = churn.most.setdefault(index, sample)
        churn.most[index] = Sample(*(max(getattr(most, name), getattr(sample, name)) for name in MORE))
        await trio.sleep(10)


async def _sample(site: Site, index: int) -> Sample:
    node = site.nodes[index]
    if node.process.poll() is not None:
        raise AssertionError(f"{node.name} died with {node.process.returncode}")
    folder = Path(f"/proc/{node.process.pid}/fd")
    links = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(folder / name))
    sockets = sum(link.startswith("socket:") for link in links)
    return Sample(await _tasks(site, index), len(links), sockets, round(node.rss_bytes() / 2**20, 1))


async def _tasks(site: Site, index: int) -> int:
    """The number of tasks by the daemon's own metrics. The connection of this request ends at once."""
    answer = b""
    async with await site.lab.nodes[index].connect(*METRICS) as stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while part := await stream.receive_some(1 << 16):
            answer += part
    return int(float(answer.partition(b"\np2pd_tasks ")[2].split()[0]))


def _compare(churn: Churn) -> None:
    for index, (first, *later) in churn.rests.items():
        name = churn.site.nodes[index].name
        for resource, more in MORE.items():
            counts = [getattr(sample, resource) for sample in later]
            if counts[-1] > getattr(first, resource) + more:
                churn.wrong.append(f"{name}: {resource} grew from {getattr(first, resource)} over {counts}")


def _table(churn: Churn, seconds: float) -> Table:
    acts = ", ".join(f"{count} {name}" for name, count in sorted(churn.done.items()))
    table = Table(title=f"{seconds / 60:.0f} min of churn: {acts}", title_justify="left")
    table.add_column("resource")
    for column in ("at the rests", "most between them"):
        table.add_column(column, justify="right")
    for index, rests in churn.rests.items():
        for name in MORE:
            at_rests = "  ".join(str(getattr(sample, name)) for sample in rests)
            table.add_row(f"{churn.site.nodes[index].name} {name}", at_rests, str(getattr(churn.most[index], name)))
    return table
