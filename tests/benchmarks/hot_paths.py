"""The hot paths of a pull, compared with nginx (sendfile) and docker-registry: `python -m tests.benchmarks.hot_paths`.

The three servers serve the same bytes to the same client (tests/support/raw_http.py) in turns. CPU is the time of the
server's processes, kernel included. All figures are medians of the rounds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support import registry as registries
from tests.support.image import MANIFEST, Blob, Image, blob_path, noise
from tests.support.processes import free_ports, running, scratch, wait_for
from tests.support.raw_http import HOST, Client, Server
from tests.support.site import UPSTREAM, Node, site

REPOSITORY, TAG = "demo/app", "v1"
BLOB_BYTES, RANGE_BYTES, MANIFEST_BYTES = 256 << 20, 16 << 20, 2048
SLOW_BYTES_PER_S = 200_000_000
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
class Sample:
    """A measurement of a server. `amount` is in GB or requests."""

    amount: float
    seconds: float
    cpu_s: float


def measured(server: Server, work: Callable[[], float]) -> Sample:
    cpu, start = server.cpu_s(), time.perf_counter()
    amount = work()
    seconds = time.perf_counter() - start
    return Sample(amount, seconds, server.cpu_s() - cpu)


def read(server: Server, requests: Sequence[bytes], pause: Callable[[int], None] | None = None) -> float:
    """Read the bodies in turn on one connection. Returns GB."""
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
    """Returns the number of requests answered in SMALL_S. Each connection has one request in progress."""
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
    """Check that the server serves the right bytes, which also warms it."""
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
        server = Server("nginx", port, base=f"/v2/{REPOSITORY}", pid=process.pid)
        wait_for("nginx answers", lambda: socket.socket().connect_ex((HOST, port)) == 0)
        yield server


def build(folder: Path) -> Image:
    """An image whose first layer is read warm, and each other layer once cold."""
    (folder / "blobs" / "sha256").mkdir(parents=True)
    data = noise(1, BLOB_BYTES - 1)
    layers = tuple(_stored(folder, bytes([i]) + data, "application/octet-stream") for i in range(COLD_ROUNDS + 1))
    config = _stored(folder, b"{}", "application/json")
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.descriptor(), "annotations": {"pad": ""}}
    document["annotations"] = {"pad": "x" * (MANIFEST_BYTES - len(json.dumps(document)))}
    manifest = _stored(folder, json.dumps(document).encode(), MANIFEST)
    return Image(folder, index=manifest, manifest=manifest, config=config, layers=layers)


def _stored(folder: Path, data: bytes, media_type: str) -> Blob:
    blob = Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), media_type)
    blob_path(folder, blob.digest).write_bytes(data)
    return blob


class Report:
    def __init__(self) -> None:
        columns = ["case", "server", "speed", "CPU", "speed ÷ nginx", "÷ registry", "CPU ÷ nginx", "÷ registry"]
        self._table = Table(*columns, title="medians; CPU per GB or per request")

    def add(self, case: str, samples: dict[str, list[Sample]], *, small: bool = False) -> None:
        """`small`: the amounts are requests instead of GB."""
        speed = {name: statistics.median(s.amount / s.seconds for s in own) for name, own in samples.items()}
        cpu = {name: statistics.median(s.cpu_s / s.amount for s in own) for name, own in samples.items()}
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
            cells = [case, name, shown, spent, *ratios]
            self._table.add_row(*cells, end_section=name == [*samples][-1])

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
    for case, path, method, connections in (
        ("2 KiB by digest", f"manifests/{manifest.digest}", "GET", 1),
        ("2 KiB by tag", f"manifests/{TAG}", "GET", 1),
        (f"by digest, {CONNECTIONS} at once", f"manifests/{manifest.digest}", "GET", CONNECTIONS),
        (f"by tag, {CONNECTIONS} at once", f"manifests/{TAG}", "GET", CONNECTIONS),
        ("HEAD of the tag", f"manifests/{TAG}", "HEAD", 1),
    ):

        def often(s: Server, path: str = path, method: str = method, connections: int = connections) -> float:
            return ask_often(s, s.request(path, method), connections, method == "GET")

        report.add(case, in_turns(servers, SMALL_ROUNDS, often), small=True)


def recycle_pages(folder: Path, size: int) -> None:
    """Use `size` bytes of memory pages, and free them for the node's files: on a virtual machine the first use of a
    page costs ten times as much as a copy into the page."""
    with (folder / "pages").open("wb") as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    (folder / "pages").unlink()


def cold(node: Server, registry: Server, image: Image, report: Report) -> None:
    """Read each layer through the node, which then holds it, and straight from the registry."""
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
    return Server("p2pd", node.mirror_port, base=f"/v2/{UPSTREAM}/{REPOSITORY}", pid=node.process.pid)


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
            registry = Server(origin.kind, origin.port, base=f"/v2/{REPOSITORY}", pid=origin.pid)
            warm([server_of(node), beside, registry], image, report)
            recycle_pages(folder, 2 * BLOB_BYTES * COLD_ROUNDS)
            cold(server_of(node), registry, image, report)
    report.show()


if __name__ == "__main__":
    main()
