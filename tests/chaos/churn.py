"""A site whose members and clients come and go without a pause: what stays must not grow. `make churn`.

Two daemons stay. Of the others one after the other is stopped or killed, and comes back, now and then with nothing but
its key. Clients pull, leave in mid-pull, connect and say nothing, say half of a request or rubbish; operators ask and
do not wait; configurations are read again. In between there are rests, with all members up and no client: there the
staying daemons are measured, and what they have of tasks, files, sockets and memory must be what it was at the first.
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

from tests.chaos.faults import Site, forget
from tests.chaos.run import REPOSITORY, console, made, pull, read_log, tag_of
from tests.support.lab_client import Client
from tests.support.processes import wait_for
from tests.support.site import UPSTREAM

STAY = 2
LARGE = 4
SMALL = (0, 2, 3)
"""The images that are pulled, of those that there are: much is to happen, and few bytes to travel."""
METRICS = ("127.0.0.1", 5051)
PAUSE_S = 1.0
"""Between what one client does, on the average; each daemon that stays has CLIENTS of them."""
CLIENTS = 2
AWAY_S = 4.0
MEMBER_PAUSE_S = 8.0
RELOAD_PAUSE_S = 15.0
REST_S = 75.0
"""Longer than a connection between members may be idle, and than the mirror's last words to clients take."""
ROUNDS = 6
BACK_S = 60.0
MORE = {"tasks": 12, "files": 12, "sockets": 12, "rss_mib": 12}
"""What a rest may have more of than the first had: a connection for a lane to each of the others, or the allocator's
mood. Each round does hundreds of things to each daemon: what leaks with any of them is far above."""

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
    """Configurations as they were written first."""


def run(seed: int, seconds: float, nodes: int) -> list[str]:
    """What was wrong. Prints what happened."""
    scratch = Path(tempfile.mkdtemp(prefix="shoal-"))
    wrong = ["it did not come to an end"]
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
    """Until cancelled: whoever is in the middle of something vanishes then."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_members, churn, Random(rng.random()))
        for index in range(STAY):
            nursery.start_soon(_reloads, churn, index, Random(rng.random()))
            nursery.start_soon(_watch, churn, index)
            for _ in range(CLIENTS):
                nursery.start_soon(_client, churn, index, Random(rng.random()))


async def _rest(churn: Churn, seconds: float) -> None:
    """All members are up, and see each other; then nothing happens."""
    nodes = churn.site.nodes
    for index in list(churn.site.down):
        await _start(churn, index)
    for node in nodes[:STAY]:
        await trio.to_thread.run_sync(
            lambda node=node: wait_for(
                f"{node.name} sees all",
                lambda: node.status()["peers_alive"] == len(nodes) - 1,
                seconds=BACK_S,
                every=0.5,
            )
        )
    await trio.sleep(seconds)


# Members


async def _members(churn: Churn, rng: Random) -> None:
    site = churn.site
    while True:
        await trio.sleep(rng.expovariate(1 / MEMBER_PAUSE_S))
        index = rng.randrange(STAY, len(site.nodes))
        node, how = site.nodes[index], rng.choice(("stopped", "killed", "killed, and all is lost"))
        site.down.add(index)
        if how == "stopped":
            if await trio.to_thread.run_sync(node.stop):
                churn.wrong.append(f"{node.name} ended with {node.process.returncode} when it was asked to stop")
        else:
            node.kill()
        if how.endswith("lost"):
            forget(node.data)
        churn.done[f"members {how}"] += 1
        await trio.sleep(rng.expovariate(1 / AWAY_S))
        await _start(churn, index)


async def _start(churn: Churn, index: int) -> None:
    node = churn.site.nodes[index]
    if node.process.poll() is not None:
        node.launch()
    await trio.to_thread.run_sync(node.wait_ready, BACK_S)
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


# Clients, and others who come


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
    """A connection that ends with FIN, or with a reset."""
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
    """On the members' ports, with rubbish."""
    node = churn.site.nodes[index]
    async with _connected(churn, index, rng.choice((node.bulk_port, node.libp2p_port)), rng) as stream:
        await stream.send_all(rng.randbytes(rng.choice((1, 64, 4096))))
        await trio.sleep(rng.uniform(0, 2))


async def _slow_clients(churn: Churn, index: int, rng: Random) -> None:
    """Who asks for all of a large object and takes little of it."""
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


ACTS: dict[Act, int] = {
    _whole_pulls: 4, _pulls_broken_off: 4, _half_requests: 3, _names_that_are_not_there: 2, _strangers: 2,
    _slow_clients: 1, _operators: 2,
}  # fmt: skip


# What there is of it


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
    """By the daemon's own metrics; the connection that asks is ended at once."""
    answer = b""
    async with await site.lab.nodes[index].connect(*METRICS) as stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while part := await stream.receive_some(1 << 16):
            answer += part
    return int(float(answer.partition(b"\np2pd_tasks ")[2].split()[0]))


def _compare(churn: Churn) -> None:
    for index, (first, *later) in churn.rests.items():
        name = churn.site.nodes[index].name
        for what, more in MORE.items():
            found = [getattr(sample, what) for sample in later]
            if found[-1] > getattr(first, what) + more:
                churn.wrong.append(f"{name}: {what} grew from {getattr(first, what)} over {found}")


def _table(churn: Churn, seconds: float) -> Table:
    what = ", ".join(f"{count} {name}" for name, count in sorted(churn.done.items()))
    table = Table(title=f"{seconds / 60:.0f} min of churn: {what}", title_justify="left")
    table.add_column("what stays")
    for column in ("at the rests", "at most meanwhile"):
        table.add_column(column, justify="right")
    for index, rests in churn.rests.items():
        for name in MORE:
            at_rests = "  ".join(str(getattr(sample, name)) for sample in rests)
            table.add_row(f"{churn.site.nodes[index].name} {name}", at_rests, str(getattr(churn.most[index], name)))
    return table
