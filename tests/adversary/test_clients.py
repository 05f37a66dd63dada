"""A client of the mirror that takes what it can: many slow connections, and many names that do not exist."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from tests.support import image as images
from tests.support import registry as registries
from tests.support.processes import scratch
from tests.support.proxy import CountingProxy
from tests.support.siege import Published, Siege, assert_no_slower, besieged
from tests.support.site import UPSTREAM, Node
from tests.support.token_server import TokenServer

SLOW, LARGE = 80, 48_000_000
"""Connections, and bytes of the layer that they begin to read: more than the buffers of all sockets hold."""
MISSING = 150
TOKEN_DELAY_S = 0.15
"""Each way: a token takes about as long as from a service on the internet."""
OTHER_HOST = "127.0.0.77"
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Served:
    siege: Siege
    open_registry: registries.Registry
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def pulls(self, node: Node) -> list[float]:
        """Seconds of pulls of small images, each new and of a repository of its own: it needs a token, a manifest and
        two blobs."""
        return [self._pull(node, next(self._numbers)) for _ in range(ROUNDS)]

    def _pull(self, node: Node, number: int) -> float:
        layout = self.siege.folder / f"small-{number}"
        published = Published(images.build(layout, [[("file", images.noise(number, 20_000))]]), f"small/{number}", "v1")
        registries.push(self.open_registry, published.image, published.repository, published.tag)
        return self.siege.pull(node, published)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A site whose registry wants a token for each repository, also for public ones."""
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    repositories = [f"small/{number}" for number in range(100)] + ["large/app"]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch())
        tokens = stack.enter_context(TokenServer(folder, {}, {"": repositories}))
        port = int(tokens.realm.rpartition(":")[2].partition("/")[0])
        slow = stack.enter_context(CountingProxy("127.0.0.1", port, delay_s=TOKEN_DELAY_S))
        tokens.realm = f"{slow.url}/token"
        unguarded = stack.enter_context(registries.docker_registry(folder / "registry"))
        guarded = stack.enter_context(registries.docker_registry(folder / "registry", auth=tokens.registry_auth()))
        yield Served(stack.enter_context(besieged(folder, guarded, honest=2)), unguarded)


def request(node: Node, path: str, source: str, *, more: str = "") -> socket.socket:
    """A connection that has sent a request, and reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(30)
    sock.bind((source, 0))
    sock.connect((node.host, node.mirror_port))
    sock.sendall(f"GET /v2/{UPSTREAM}/{path} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode())
    return sock


@contextlib.contextmanager
def open_requests(node: Node, paths: Sequence[str], source: str, more: Sequence[str] = ()) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for number, path in enumerate(paths):
            stack.enter_context(request(node, path, source, more=more[number] if more else ""))
        yield


@pytest.mark.parametrize("source", ["127.0.0.1", OTHER_HOST])
def test_slow_clients_cost_others_little(served: Served, source: str) -> None:
    """S-38: 80 connections of one client, each of which begins to read another part of a cold layer, and stops. The
    other client has the same address, or another one."""
    siege = served.siege
    image = images.build(siege.folder / f"large-{source}", [[("noise", images.noise(hash(source) % 1000, LARGE))]])
    registries.push(served.open_registry, image, "large/app", "v1")
    node = siege.honest[0]
    calm = served.pulls(node)
    (layer,) = image.layers
    parts = [f"Range: bytes={number * layer.size // SLOW}-\r\n" for number in range(SLOW)]
    with siege.unharmed():
        with open_requests(node, [f"large/app/blobs/{layer.digest}"] * SLOW, source, parts):
            attacked = served.pulls(node)
        calm += served.pulls(node)
    print(f"{sorted(calm)} calm, {sorted(attacked)} with slow connections")
    assert_no_slower(calm, attacked)


@pytest.mark.parametrize("source", ["127.0.0.1", OTHER_HOST])
def test_names_that_do_not_exist_cost_others_little(served: Served, source: str) -> None:
    """S-39: 150 requests at once, each for a repository that the registry does not have, and which needs a token."""
    siege = served.siege
    node = siege.honest[0]
    calm = served.pulls(node)
    paths = [f"none/{source.replace('.', '-')}-{number}/manifests/v1" for number in range(MISSING)]
    with siege.unharmed():
        with open_requests(node, paths, source):
            attacked = served.pulls(node)
        calm += served.pulls(node)
    print(f"{sorted(calm)} calm, {sorted(attacked)} with missing names")
    assert_no_slower(calm, attacked)


def test_all_connections_of_one_client_leave_room_for_others(served: Served) -> None:
    """S-44: a client opens more connections than the mirror has, with half a request on each."""
    siege = served.siege
    node = siege.honest[0]
    calm = served.pulls(node)
    with siege.unharmed(), contextlib.ExitStack() as stack:
        for _ in range(1100):
            sock = socket.socket()
            sock.settimeout(5)
            sock.bind((OTHER_HOST, 0))
            with contextlib.suppress(OSError):
                stack.enter_context(sock).connect((node.host, node.mirror_port))
                sock.sendall(b"GET /v2/ HTTP/1.1\r\nHost")
        attacked = served.pulls(node)
    print(f"{sorted(calm)} calm, {sorted(attacked)} with 1100 connections")
    assert_no_slower(calm, attacked)
