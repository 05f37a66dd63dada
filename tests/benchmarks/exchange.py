"""Throughput of the bulk channel between two processes over loopback: `python -m tests.benchmarks.exchange`.

Each line is measured once in every round, so that other load affects all lines equally. The medians are shown. CPU is
that of each process, kernel included. "Written" bodies are written as by the disk tier, into pages that the page cache
does not hold yet. Steps are those of the asking process's tasks for each body. The raw lines read from a plain TCP
socket into one buffer: this is the upper limit.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from statistics import median

import click
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich import box
from rich.console import Console
from rich.table import Table

from cache.files import WRITE, identity_of, opened, write_at
from node.config.quantities import HostPort
from node.exchange.connection import Endpoint
from node.exchange.contract import Answer, Lane, Sender
from node.exchange.tls import TlsExchange
from node.identity.certificates import Credentials, own_authority, peer_of
from node.identity.identity import Identity
from node.runtime.allocator import tune_allocator
from protocol.erasure import Buffer
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from protocol.members import Member
from protocol.messages import GetShards, Ping, Pong, Request, ShardFound
from protocol.records import make_record
from tests.support.leftovers import ended_with_the_run

K = 4
STRIPE = 4
REF = ObjectRef(Digest("sha256", "ab" * 32), STRIPE * BLOCK_SIZE)
BLOCK = os.urandom(BLOCK_SIZE)
SIGNER = PeerId("12D3KooWSigner")
RECORDS = [
    make_record(REF, index, sha256(BLOCK).digest(), SIGNER, sign=lambda payload: bytes(64)) for index in range(STRIPE)
]
SLOTS = 256
RAW, TLS, PLAIN = "raw", "TLS", "plain"
WARM_S = 0.1


@dataclass(frozen=True, slots=True)
class Line:
    """`title` names the work on bodies of `size` bytes (0 for small requests). `parts`: bodies in the stream that
    answers a request. `depth`: concurrent requests."""

    title: str
    channel: str
    size: int
    depth: int
    parts: int = 1

    @property
    def message(self) -> GetShards:
        k = BLOCK_SIZE // self.size
        return GetShards(
            digest=str(REF.digest),
            first=0,
            wanted=(1 << self.parts) - 1,
            size=REF.size,
            k=k,
            m=int(k > 1),
            want=0,
            hops=0,
            source="docker.io/library/alpine#blobs",
        )

    @property
    def work(self) -> tuple[bool, bool]:
        """Whether bodies are hashed, and written."""
        return "hashed" in self.title, "written" in self.title


BLOCK_TITLES = ("block, received", "block, received, hashed", "block, received, hashed, written")
SHARD_TITLE = "shard, received, hashed, written"
LINES = (
    *(Line(*row, size=BLOCK_SIZE, depth=8) for row in product(BLOCK_TITLES, (RAW, TLS, PLAIN))),
    *(Line("4 blocks, received", channel, size=BLOCK_SIZE, depth=2, parts=STRIPE) for channel in (TLS, PLAIN)),
    *(Line("4 shards, received", channel, size=BLOCK_SIZE // K, depth=4, parts=STRIPE) for channel in (TLS, PLAIN)),
    *(Line(SHARD_TITLE, channel, size=BLOCK_SIZE // K, depth=32) for channel in (TLS, PLAIN)),
    Line("small, one at a time", TLS, size=0, depth=1),
    Line("small, 32 at once", TLS, size=0, depth=32),
)


@dataclass(slots=True)
class Runs:
    """Results of one line, by round: answers (parts of streams, each for itself) per second; CPU seconds per answer of
    each process; and steps of tasks per answer in the asking process."""

    rate: list[float] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)
    answering: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class Steps(trio.abc.Instrument):
    """Counts the steps of all tasks."""

    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


class Sink:
    """Hashes and writes bodies. The file has at most SLOTS bodies, and is emptied when it is full."""

    def __init__(self, path: Path) -> None:
        self._path, self._slot = path, 0

    def take(self, line: Line, body: Buffer) -> None:
        hashed, written = line.work
        if hashed:
            sha256(body).digest()
        if written:
            with opened(self._path, WRITE) as fd:
                if self._slot == SLOTS:
                    self._slot = 0
                    os.ftruncate(fd, 0)
                identity_of(os.fstat(fd))
                write_at(fd, body, self._slot * len(body))
                identity_of(os.fstat(fd))
            self._slot += 1


# The answering process


async def answer(peer: PeerId, request: Request) -> Answer:
    return Answer(Pong())


async def serve_parts(peer: PeerId, request: GetShards, sender: Sender) -> None:
    body = memoryview(BLOCK)[: BLOCK_SIZE // request.k]
    for record in RECORDS[: request.wanted.bit_length()]:
        await sender.room()
        sender.send(ShardFound(request.k, request.m, request.want, record), body)


def exchange_of(folder: Path, members: dict[PeerId, Member], plain: bool) -> tuple[PeerId, TlsExchange]:
    identity = Identity.of(Ed25519PrivateKey.generate())
    credentials = Credentials.issued(own_authority(folder), identity, "")
    endpoint = Endpoint(
        credentials.server_context(),
        credentials.client_context(),
        peer_of,
        listen=HostPort("127.0.0.1", 0),
        locate=members.get,
        refused=lambda peer: False,
        handler=answer,
        server=serve_parts,
        plain=plain,
    )
    return identity.peer_id, TlsExchange(endpoint)


def pour(listener: socket.socket) -> None:
    """Send blocks without end to each client that connects, one client after the other."""
    while True:
        with listener.accept()[0] as sock:
            try:
                while True:
                    sock.sendall(BLOCK)
            except OSError:
                pass


async def serve(folder: Path) -> None:
    peer, exchange = exchange_of(folder, {}, True)
    raw = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=pour, args=(raw,), daemon=True).start()
    click.echo(f"{peer} {exchange.address} {raw.getsockname()[1]}")
    await exchange.run()


# The asking process


@dataclass(frozen=True, slots=True)
class Server:
    """The answering process."""

    pid: int
    peer: PeerId
    address: str
    raw_port: int


class Asker:
    """Runs lines against the answering process."""

    def __init__(self, server: Server, exchanges: dict[str, TlsExchange], sink: Sink) -> None:
        self._pid, self._peer, self._exchanges, self._sink = server.pid, server.peer, exchanges, sink
        self._raw = socket.create_connection(("127.0.0.1", server.raw_port))
        self._steps = Steps()
        trio.lowlevel.add_instrument(self._steps)

    async def run(self, line: Line, runs: Runs, seconds: float) -> None:
        await self._count(line, WARM_S)
        started, asking, answering = time.perf_counter(), time.process_time(), self._answering_cpu_s()
        steps = self._steps.count
        count = await self._count(line, seconds)
        runs.rate.append(count / (time.perf_counter() - started))
        runs.asking.append((time.process_time() - asking) / count)
        runs.answering.append((self._answering_cpu_s() - answering) / count)
        runs.steps.append((self._steps.count - steps) / count)

    def _answering_cpu_s(self) -> float:
        return time.clock_gettime(~self._pid << 3 | 2)  # clock_getcpuclockid(3)

    async def _count(self, line: Line, seconds: float) -> int:
        """Returns how many answers came."""
        if line.channel == RAW:
            return self._drain(line, seconds)
        exchange = self._exchanges[line.channel]
        count, end = 0, time.perf_counter() + seconds

        def take(message: ShardFound, body: Buffer) -> None:
            nonlocal count
            self._sink.take(line, body)
            count += 1

        async def ask() -> None:
            nonlocal count
            while time.perf_counter() < end:
                if line.size:
                    await exchange.stream(self._peer, line.message, lane=Lane.BULK, silence_s=20, part=take)
                else:
                    await exchange.request(self._peer, Ping(), lane=Lane.BULK, silence_s=20)
                    count += 1

        async with trio.open_nursery() as nursery:
            for _ in range(line.depth):
                nursery.start_soon(ask)
        return count

    def _drain(self, line: Line, seconds: float) -> int:
        count, end = 0, time.perf_counter() + seconds
        body = bytearray(line.size)
        while time.perf_counter() < end:
            position = 0
            while position < line.size:
                position += self._raw.recv_into(memoryview(body)[position:])
            self._sink.take(line, body)
            count += 1
        return count


async def measure(folder: Path, server: Server, *, lines: list[Line], rounds: int, seconds: float) -> list[Runs]:
    members = {server.peer: Member(server.peer, "server", "site", (server.address,))}
    exchanges = {channel: exchange_of(folder, members, channel == PLAIN)[1] for channel in (TLS, PLAIN)}
    asker = Asker(server, exchanges, Sink(folder / "written"))
    results = [Runs() for _ in lines]
    async with trio.open_nursery() as nursery:
        for exchange in exchanges.values():
            await nursery.start(exchange.run)
        for _ in range(rounds):
            for line, runs in zip(lines, results, strict=True):
                await asker.run(line, runs, seconds)
        nursery.cancel_scope.cancel()
    return results


def run_both(folder: Path, lines: list[Line], rounds: int, seconds: float) -> list[Runs]:
    command = [sys.executable, "-m", "tests.benchmarks.exchange", "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ended_with_the_run(process)
        try:
            assert process.stdout is not None
            peer, address, raw_port = process.stdout.readline().split()
            server = Server(process.pid, PeerId(peer), address, int(raw_port))
            return trio.run(partial(measure, folder, server, lines=lines, rounds=rounds, seconds=seconds))
        finally:
            process.kill()


def table_of(lines: list[Line], results: list[Runs], title: str) -> Table:
    """The ratio is relative to the raw socket with the same work on the bodies, in the same round."""
    heads = ("", "", "rate", "of raw", "asking", "answering", "steps")
    table = Table(*heads, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    raw = {line.work: runs for line, runs in zip(lines, results, strict=True) if line.channel == RAW}
    for line, runs in zip(lines, results, strict=True):
        rate = f"{median(runs.rate) * line.size / 1e6:.0f} MB/s" if line.size else f"{median(runs.rate):.0f} /s"
        base = raw.get(line.work) if line.size else None
        ratio = ""
        if base is not None:
            pairs = zip(runs.rate, base.rate, strict=True)
            ratio = f"{median(mine * line.size / theirs / BLOCK_SIZE for mine, theirs in pairs):.2f}"
        scale, unit = (1e9 / line.size, "s/GB") if line.size else (1e6, "µs")
        asking, answering = (f"{median(cpu) * scale:.2f} {unit}" for cpu in (runs.asking, runs.answering))
        steps = f"{median(runs.steps):.2f}" if line.channel != RAW else ""
        table.add_row(*(line.title, line.channel, rate, ratio, asking, answering, steps))
    return table


@click.command()
@click.option("--serve", "folder", type=click.Path(path_type=Path), help="Answer, as the other process.")
@click.option("--seconds", default=0.7, show_default=True, help="For each line in each round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", default="", help="Only lines whose title has this.")
def main(folder: Path | None, seconds: float, rounds: int, only: str) -> None:
    tune_allocator()
    if folder is not None:
        trio.run(serve, folder)
        return
    lines = [line for line in LINES if only in f"{line.title} {line.channel}"]
    with tempfile.TemporaryDirectory() as scratch:
        own_authority(Path(scratch))
        results = run_both(Path(scratch), lines, rounds, seconds)
    Console().print(
        table_of(lines, results, f"Bulk channel over loopback: medians of {rounds}, and the CPU of both sides")
    )


if __name__ == "__main__":
    main()
