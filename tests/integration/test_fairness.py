"""Clients of one mirror do not slow each other: a real daemon, a real registry, and a slow token service.

The pulls of a second client are compared with its undisturbed pulls of the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import trio

from node.blocks.room import MOST_FIRST_EACH
from tests.support import image as images
from tests.support import registry as registries
from tests.support.image import Image
from tests.support.lab_client import Client
from tests.support.registry import push
from tests.support.site import UPSTREAM, Node, site
from tests.support.token_server import ANYBODY, TokenServer

LARGE = "public/large"
SMALL = [f"public/small-{number}" for number in range(12)]
TOKEN_S = 0.3
"""As long as real token services take over a wide area network."""
SLOW, LOOKUPS = 80, 150
PULLS = 4
FACTOR, GRACE_S = 1.3, 0.5
"""The daemon shares two processors with its registry and its clients: hundreds of connections cost it some CPU."""

pytestmark = pytest.mark.skipif(not registries.installed(), reason="docker-registry is not installed")


class SlowTokens(TokenServer):
    def token(self, user: str, *repositories: str, lifetime_s: float = 300) -> str:
        time.sleep(TOKEN_S)
        return super().token(user, *repositories, lifetime_s=lifetime_s)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a registry with a large image and small ones."""
    folder = tmp_path_factory.mktemp("fairness")
    with registries.docker_registry(folder / "registry") as registry:
        for number, repository in enumerate(SMALL):
            push(registry, image(folder / repository, number, 300_000), repository, "v1")
        push(registry, image(folder / LARGE, 99, 60_000_000), LARGE, "v1")
    return folder / "registry"


def image(folder: Path, seed: int, size: int) -> Image:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return images.build(folder, [[("noise", images.noise(seed, size))]])


@pytest.fixture
def node(stored: Path, tmp_path: Path, folder: Path) -> Iterator[Node]:
    with (
        SlowTokens(tmp_path, {}, {ANYBODY: [LARGE, *SMALL]}) as tokens,
        registries.docker_registry(stored, auth=tokens.registry_auth()) as registry,
        site(folder, registry.url, 1) as (started,),
    ):
        yield started


async def connected(node: Node, source: str) -> trio.SocketStream:
    return await trio.open_tcp_stream(node.host, node.mirror_port, local_address=source)


def client(node: Node, source: str, repository: str) -> Client:
    return Client(partial(connected, node, source), f"{UPSTREAM}/{repository}", "v1")


async def pulls_s(node: Node, source: str, repositories: list[str]) -> float:
    """The median time of small pulls, of images that the node does not hold yet."""
    seconds = []
    for repository in repositories:
        small = client(node, source, repository)
        await small.pull()
        seconds.append(small.seconds)
    return median(seconds)


async def slow_readers(node: Node, nursery: trio.Nursery) -> None:
    """Clients that take a byte of a large body at a time. Returns when they have all places that they may have."""
    large = client(node, "127.0.0.1", LARGE)
    index = await large.manifest("v1")
    manifest = await large.manifest(index["manifests"][0]["digest"])
    digest = max(manifest["layers"], key=lambda layer: layer["size"])["digest"]
    reached = trio.Semaphore(0)

    async def read() -> None:
        sock = trio.socket.socket()
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)  # the rest waits in the daemon
        await sock.connect((node.host, node.mirror_port))
        await sock.send(f"GET /v2/{UPSTREAM}/{LARGE}/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await sock.recv(1)
        reached.release()
        while await sock.recv(1):  # noqa: ASYNC110 # a slow client, and not a wait for an event
            await trio.sleep(0.5)

    for _ in range(SLOW):
        nursery.start_soon(read)
    for _ in range(MOST_FIRST_EACH):
        await reached.acquire()


async def lookups(node: Node, nursery: trio.Nursery) -> None:
    """Requests for repositories that do not exist, each on a connection of its own."""

    async def look(number: int, event: trio.Event) -> None:
        stream = await connected(node, "127.0.0.1")
        await stream.send_all(f"GET /v2/{UPSTREAM}/none/n{number}/manifests/v1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        event.set()
        await stream.receive_some(1)
        await stream.aclose()

    asked = [trio.Event() for _ in range(LOOKUPS)]
    for number, event in enumerate(asked):
        nursery.start_soon(look, number, event)
    for event in asked:
        await event.wait()


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.9"], ids=["same address", "other address"])
@pytest.mark.parametrize("disturb", [slow_readers, lookups])
def test_a_client_does_not_slow_the_small_pulls_of_another(
    node: Node, disturb: Callable[[Node, trio.Nursery], object], source: str
) -> None:
    """S-38"""

    async def main() -> tuple[float, float]:
        calm_s = await pulls_s(node, source, SMALL[:PULLS])
        async with trio.open_nursery() as nursery:
            await disturb(node, nursery)  # type: ignore[misc]
            disturbed_s = await pulls_s(node, source, SMALL[PULLS : 2 * PULLS])
            nursery.cancel_scope.cancel()
        return calm_s, disturbed_s

    calm_s, disturbed_s = trio.run(main)
    print(f"calm {calm_s:.2f} s, disturbed {disturbed_s:.2f} s")
    assert disturbed_s < FACTOR * calm_s + GRACE_S
