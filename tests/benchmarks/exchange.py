"""What the bulk channel carries between two processes over loopback: `python tests/benchmarks/exchange.py`.

The asking process receives, and hashes what is long; CPU is that of each process, kernel included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import click
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from node.certificates import Credentials, own_authority, peer_of
from node.channel import tune_allocator
from node.config import HostPort
from node.exchange import Answer, Lane
from node.exchange_tls import TlsExchange
from node.identity import Identity
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from protocol.members import Member
from protocol.messages import BlockFound, GetBlock, GetShard, Ping, Pong, Request, ShardFound
from protocol.records import make_record

K = 4
REF = ObjectRef(Digest("sha256", "ab" * 32), BLOCK_SIZE)
BLOCK = os.urandom(BLOCK_SIZE)
RECORD = make_record(REF, 0, sha256(BLOCK).digest(), PeerId("12D3KooWSigner"), lambda payload: bytes(64))
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    count: int
    size: int
    took_s: float
    cpu_s: float
    server_cpu_s: float

    def row(self) -> tuple[str, str, str, str, str]:
        scale, unit = (GIB / self.size, "s/GiB") if self.size else (1e6, "µs each")
        asking, answering = (f"{cpu / self.count * scale:.2f} {unit}" for cpu in (self.cpu_s, self.server_cpu_s))
        throughput = f"{self.count * self.size / self.took_s / 1e6:.0f} MB/s" if self.size else ""
        return self.name, f"{self.count / self.took_s:.0f}", throughput, asking, answering


async def answer(peer: PeerId, request: Request) -> Answer:
    if isinstance(request, GetBlock):
        return Answer(BlockFound(RECORD), BLOCK)
    if isinstance(request, GetShard):
        return Answer(ShardFound(K, 1, request.want, RECORD), memoryview(BLOCK)[: BLOCK_SIZE // K])
    return Answer(Pong(()))


def exchange_of(folder: Path, members: dict[PeerId, Member]) -> tuple[PeerId, TlsExchange]:
    identity = Identity.of(Ed25519PrivateKey.generate())
    credentials = Credentials.issued(own_authority(folder), identity, "")
    return identity.peer_id, TlsExchange(
        credentials.server_context(), credentials.client_context(), peer_of,
        listen=HostPort("127.0.0.1", 0), locate=members.get, refused=lambda peer: False, handler=answer,
    )  # fmt: skip


async def serve(folder: Path) -> None:
    peer, exchange = exchange_of(folder, {})
    click.echo(f"{peer} {exchange.address}")
    await exchange.run()


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(exchange: TlsExchange, server: int, peer: PeerId, seconds: float) -> list[Result]:
    digest = str(REF.digest)
    shard = GetShard(digest, 0, BLOCK_SIZE, K, 1, 0, 0, "docker.io/library/alpine#blobs")
    block = GetBlock(digest, 0, BLOCK_SIZE)
    results = []
    for name, message, size, depth in (
        ("1 MiB blocks, depth 4", block, BLOCK_SIZE, 4),
        ("256 KiB shards, depth 16", shard, BLOCK_SIZE // K, 16),
        ("small, depth 1", Ping(()), 0, 1),
        ("small, depth 32", Ping(()), 0, 32),
    ):
        await ask_for(exchange, peer, message, depth, 0.2)  # connected, and windows open
        start, cpu, server_cpu = time.perf_counter(), time.process_time(), cpu_of(server)
        count = await ask_for(exchange, peer, message, depth, seconds)
        took = time.perf_counter() - start
        results.append(Result(name, count, size, took, time.process_time() - cpu, cpu_of(server) - server_cpu))
    return results


async def ask_for(exchange: TlsExchange, peer: PeerId, message: Request, depth: int, seconds: float) -> int:
    count, end = 0, time.perf_counter() + seconds

    async def one() -> None:
        nonlocal count
        while time.perf_counter() < end:
            reply = await exchange.request(peer, message, lane=Lane.BULK, silence_s=5)
            if reply.body is not None:
                sha256(reply.body)
            count += 1

    async with trio.open_nursery() as nursery:
        for _ in range(depth):
            nursery.start_soon(one)
    return count


async def ask(folder: Path, server: int, told: str, seconds: float) -> list[Result]:
    """`told`: the first line that the answering process wrote, its peer id and address."""
    peer, address = told.split()
    _, exchange = exchange_of(folder, {PeerId(peer): Member(PeerId(peer), "server", "site", (address,))})
    async with trio.open_nursery() as nursery:
        await nursery.start(exchange.run)
        results = await measure(exchange, server, PeerId(peer), seconds)
        nursery.cancel_scope.cancel()
    return results


def run_both(folder: Path, options: list[str], seconds: float) -> list[Result]:
    command = [sys.executable, __file__, "--serve", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            return trio.run(ask, folder, server.pid, server.stdout.readline(), seconds)
        finally:
            server.kill()


@click.command()
@click.option("--serve", "folder", type=click.Path(path_type=Path), help="Answer, as the other process.")
@click.option("--seconds", default=3.0, show_default=True, help="For each measurement.")
@click.option("--untuned", is_flag=True, help="Leave the allocator as it is.")
def main(folder: Path | None, seconds: float, untuned: bool) -> None:
    if not untuned:
        tune_allocator()
    if folder is not None:
        trio.run(serve, folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        own_authority(Path(scratch))
        results = run_both(Path(scratch), ["--untuned"] * untuned, seconds)
    table = Table("", "a second", "received", "CPU asking", "CPU answering", title="Bulk channel, TLS 1.3, loopback")
    for result in results:
        table.add_row(*result.row())
    Console().print(table)


if __name__ == "__main__":
    main()
