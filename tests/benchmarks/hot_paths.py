"""The paths that every pull takes, beside nginx (sendfile) and docker-registry, which serve the same bytes to the same
client in turns: `python -m tests.benchmarks.hot_paths`.

The client sends bytes that were made before and receives into one buffer, so that the servers are what is measured.
CPU is that of the server's processes, kernel included; all figures are medians of the rounds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support import registry as registries
from tests.support.image import MANIFEST, Blob, Image, blob_path, noise
from tests.support.processes import free_ports, running, scratch, wait_for
from tests.support.site import UPSTREAM, Node, site

HOST, REPOSITORY, TAG = "127.0.0.1", "demo/app", "v1"
BLOB_BYTES, RANGE_BYTES, MANIFEST_BYTES = 256 << 20, 16 << 20, 2048
SLOW_BYTES_PER_S, SLOW_TURN = 200_000_000, 256 << 10
BLOB_ROUNDS, SMALL_ROUNDS, COLD_ROUNDS = 5, 3, 3
READS, SMALL_S, CONNECTIONS = 6, 0.5, 16

NGINX = """\
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  sendfile on;
  tcp_nopush on;
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen {host}:{port}; root {folder}/root; default_type application/octet-stream; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    port: int
    base: str
    """What stands before `/blobs/` and `/manifests/`."""
    pid: int
    host: str = HOST

    def request(self, tail: str, method: str = "GET", headers: str = "") -> bytes:
        lines = f"{method} {self.base}/{tail} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nUser-Agent: bench\r\n"
        return f"{lines}Accept: {MANIFEST}, */*\r\n{headers}\r\n".encode()

    def cpu_s(self) -> float:
        """Of the process and its children. The sum of both times is exact to a tick, as the scheduler counts it."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in (self.pid, *children)]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


class Client:
    """One connection, kept alive."""

    def __init__(self, server: Server) -> None:
        self._sock = socket.create_connection((server.host, server.port))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 20, 0))
        self._buffer = bytearray(1 << 20)
        self._view = memoryview(self._buffer)

    def close(self) -> None:
        self._sock.close()

    def send(self, request: bytes) -> None:
        self._sock.send(request)

    def receive(self, length: int) -> None:
        """A whole small answer of a known length."""
        got = 0
        while got < length:
            size = self._sock.recv_into(self._view[got:])
            assert size, "the server closed"
            got += size
        assert got == length
        assert self._buffer.startswith(b"HTTP/1.1 200"), self._buffer[:200]

    def ask(self, request: bytes) -> tuple[int, int]:
        """Send; read the head. How long the body is, and how much of it is still to come."""
        self._sock.sendall(request)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            peeked = head + self._sock.recv(16384, socket.MSG_PEEK)
            assert len(peeked) > len(head), "the server closed"
            end = peeked.find(b"\r\n\r\n")
            head += self._sock.recv((end + 4 if end >= 0 else len(peeked)) - len(head))
        assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 206")), head
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        return len(head), int(fields[b"content-length"])

    def drop(self, length: int, pause: Callable[[int], None] | None = None) -> None:
        """Take `length` bytes and look at none."""
        turn = SLOW_TURN if pause else len(self._buffer)
        while length:
            size = self._sock.recv_into(self._buffer, min(length, turn))
            assert size, "the server closed"
            length -= size
            if pause:
                pause(size)

    def sha256(self, length: int) -> str:
        found = hashlib.sha256()
        while length:
            size = self._sock.recv_into(self._buffer, min(length, len(self._buffer)))
            assert size, "the server closed"
            found.update(self._view[:size])
            length -= size
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Sample:
    """`amount`: GB or requests."""

    amount: float
    seconds: float
    cpu_s: float


def measured(server: Server, work: Callable[[], float]) -> Sample:
    cpu, start = server.cpu_s(), time.perf_counter()
    amount = work()
    seconds = time.perf_counter() - start
    return Sample(amount, seconds, server.cpu_s() - cpu)


def read(server: Server, requests: Sequence[bytes], pause: Callable[[int], None] | None = None) -> float:
    """GB of the answers' bodies, one after the other on one connection."""
    total = 0
    with contextlib.closing(Client(server)) as client:
        for request in requests:
            _, length = client.ask(request)
            client.drop(length, pause)
            total += length
    return total / 1e9


def slowly() -> Callable[[int], None]:
    start, taken = time.perf_counter(), 0

    def pause(size: int) -> None:
        nonlocal taken
        taken += size
        time.sleep(max(0.0, start + taken / SLOW_BYTES_PER_S - time.perf_counter()))

    return pause


def ask_often(server: Server, request: bytes, connections: int, body: bool) -> float:
    """Requests answered in SMALL_S, as many at once as connections."""
    clients = [Client(server) for _ in range(connections)]
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.callback(client.close)
        head, length = clients[0].ask(request)
        clients[0].drop(length if body else 0)
        count, end = 1, time.perf_counter() + SMALL_S
        while time.perf_counter() < end:
            for client in clients:
                client.send(request)
            for client in clients:
                client.receive(head + (length if body else 0))
            count += connections
    return count


def check(server: Server, blob: Blob, manifest: Blob) -> None:
    """That what is measured are the same bytes; and everything is warm after it."""
    with contextlib.closing(Client(server)) as client:
        for tail, wanted in (
            (f"blobs/{blob.digest}", blob),
            (f"manifests/{manifest.digest}", manifest),
            (f"manifests/{TAG}", manifest),
        ):
            _, length = client.ask(server.request(tail))
            assert f"sha256:{client.sha256(length)}" == wanted.digest, f"{server.name}: {tail}"


@contextlib.contextmanager
def nginx(folder: Path, image: Image) -> Iterator[Server]:
    base = folder / "root" / "v2" / REPOSITORY
    for kind in ("blobs", "manifests"):
        (base / kind).mkdir(parents=True)
    (base / "blobs" / image.layers[0].digest).hardlink_to(image.path(image.layers[0]))
    for name in (image.manifest.digest, TAG):
        (base / "manifests" / name).hardlink_to(image.path(image.manifest))
    (port,) = free_ports(HOST, 1)
    user = "user root root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, host=HOST, port=port, user=user))
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with running([program, "-p", folder, "-c", folder / "nginx.conf"], folder / "log") as process:
        server = Server("nginx", port, f"/v2/{REPOSITORY}", process.pid)
        wait_for("nginx answers", lambda: socket.socket().connect_ex((HOST, port)) == 0)
        yield server


def build(folder: Path) -> Image:
    """One manifest; the first layer is read warm, each of the others once cold."""
    (folder / "blobs" / "sha256").mkdir(parents=True)
    data = noise(1, BLOB_BYTES - 1)
    layers = tuple(_stored(folder, bytes([i]) + data, "application/octet-stream") for i in range(COLD_ROUNDS + 1))
    config = _stored(folder, b"{}", "application/json")
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.descriptor(), "annotations": {"pad": ""}}
    document["annotations"] = {"pad": "x" * (MANIFEST_BYTES - len(json.dumps(document)))}
    manifest = _stored(folder, json.dumps(document).encode(), MANIFEST)
    return Image(folder, manifest, manifest, config, layers)


def _stored(folder: Path, data: bytes, media_type: str) -> Blob:
    blob = Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), media_type)
    blob_path(folder, blob.digest).write_bytes(data)
    return blob


class Report:
    def __init__(self) -> None:
        self._table = Table(
            "what", "server", "speed", "CPU", "speed ÷ nginx", "÷ registry", "CPU ÷ nginx", "÷ registry",
            title="medians; CPU per GB or per request",
        )  # fmt: skip

    def add(self, what: str, samples: dict[str, list[Sample]], *, small: bool = False) -> None:
        speed = {name: statistics.median(s.amount / s.seconds for s in one) for name, one in samples.items()}
        cpu = {name: statistics.median(s.cpu_s / s.amount for s in one) for name, one in samples.items()}
        for name in samples:
            ratios = [""] * 4
            if name == "p2pd":
                ratios = [
                    f"{values[name] / values[other]:.2f}" if other in values else ""
                    for values in (speed, cpu)
                    for other in ("nginx", "docker-registry")
                ]
            shown = f"{speed[name]:.0f}/s" if small else f"{speed[name] * 1000:.0f} MB/s"
            spent = f"{cpu[name] * 1e6:.0f} µs" if small else f"{cpu[name]:.3f} s/GB"
            self._table.add_row(what, name, shown, spent, *ratios, end_section=name == [*samples][-1])

    def show(self) -> None:
        Console(width=140).print(self._table)


def in_turns(servers: Sequence[Server], rounds: int, work: Callable[[Server], float]) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {server.name: [] for server in servers}
    for _ in range(rounds):
        for server in servers:
            samples[server.name].append(measured(server, lambda server=server: work(server)))  # type: ignore[misc]
    return samples


def warm(servers: Sequence[Server], image: Image, report: Report) -> None:
    blob, manifest = image.layers[0], image.manifest
    for server in servers:
        check(server, blob, manifest)
    tail = f"blobs/{blob.digest}"
    spans = [f"Range: bytes={at}-{at + RANGE_BYTES - 1}\r\n" for at in range(0, BLOB_BYTES, RANGE_BYTES)]
    report.add("256 MiB, warm, whole", in_turns(servers, BLOB_ROUNDS, lambda s: read(s, [s.request(tail)] * READS)))
    report.add(
        "as 16 ranges",
        in_turns(servers, BLOB_ROUNDS, lambda s: read(s, [s.request(tail, headers=h) for h in spans] * READS)),
    )
    report.add(
        "whole, at 200 MB/s",
        in_turns(servers, SMALL_ROUNDS, lambda s: read(s, [s.request(tail)], slowly())),
    )
    for what, path, method, connections in (
        ("2 KiB by digest", f"manifests/{manifest.digest}", "GET", 1),
        ("2 KiB by tag", f"manifests/{TAG}", "GET", 1),
        (f"by digest, {CONNECTIONS} at once", f"manifests/{manifest.digest}", "GET", CONNECTIONS),
        (f"by tag, {CONNECTIONS} at once", f"manifests/{TAG}", "GET", CONNECTIONS),
        ("HEAD of the tag", f"manifests/{TAG}", "HEAD", 1),
    ):

        def often(s: Server, path: str = path, method: str = method, connections: int = connections) -> float:
            return ask_often(s, s.request(path, method), connections, method == "GET")

        report.add(what, in_turns(servers, SMALL_ROUNDS, often), small=True)


def recycle_pages(folder: Path, size: int) -> None:
    """What the node stores then goes to pages that this machine has had before: a virtual machine's first use of a page
    costs its host ten times as much as the copy into it, whoever stores."""
    with (folder / "pages").open("wb") as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    (folder / "pages").unlink()


def cold(node: Server, node_folder: Path, registry: Server, image: Image, report: Report) -> None:
    """Each layer once through the node, which then holds it, and once straight."""
    recycle_pages(node_folder, 2 * BLOB_BYTES * COLD_ROUNDS)
    pulled: dict[str, list[Sample]] = {node.name: [], registry.name: []}
    again: dict[str, list[Sample]] = {node.name: []}
    for layer in image.layers[1:]:
        tail = f"blobs/{layer.digest}"
        read(registry, [registry.request(tail)])  # into the page cache
        pulled[registry.name].append(measured(registry, lambda: read(registry, [registry.request(tail)])))  # noqa: B023
        pulled[node.name].append(measured(node, lambda: read(node, [node.request(tail)])))  # noqa: B023
        again[node.name].append(measured(node, lambda: read(node, [node.request(tail)])))  # noqa: B023
    report.add("256 MiB, cold", pulled)
    report.add("again, at once", again)


def server_of(node: Node) -> Server:
    return Server("p2pd", node.mirror_port, f"/v2/{UPSTREAM}/{REPOSITORY}", node.process.pid)


def main() -> None:
    report = Report()
    with scratch("shoal-hot-") as folder:
        image = build(folder / "image")
        with (
            registries.docker_registry(folder / "registry") as origin,
            nginx(folder / "nginx", image) as beside,
            site(folder / "s", origin.url, 1) as (node,),
        ):
            registries.push(origin, image, REPOSITORY, TAG)
            registry = Server(origin.kind, origin.port, f"/v2/{REPOSITORY}", origin.pid)
            warm([server_of(node), beside, registry], image, report)
            cold(server_of(node), folder, registry, image, report)
    report.show()


if __name__ == "__main__":
    main()
