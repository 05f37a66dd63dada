"""The registry client and the mirror against Debian's docker-registry: a real process, real HTTP."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import BinaryIO

import httpx
import pytest
import trio

from node.config.schema import UpstreamPart
from node.content.listings import Listings
from node.mirror.mirror import Mirror
from node.oci.manifests import Resolved
from node.oci.references import Locator
from node.registry.upstreams import Upstreams
from protocol.errors import NotFoundError
from protocol.ids import BLOCK_SIZE, ObjectRef
from tests.support.access import Everybody
from tests.support.fake_registry import serve
from tests.support.proxy import CountingProxy
from tests.support.registry import docker_registry, installed

LAYER = Random(3).randbytes(5 * BLOCK_SIZE + 4321)
CONFIG = b'{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}'
MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
BLOBS = Locator("docker.io", "library/app", "blobs")

needs_registry = pytest.mark.skipif(not installed(), reason="Debian package docker-registry is not installed")
needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="Debian package skopeo is not installed")


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(data: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPE,
        "config": descriptor(CONFIG, "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor(LAYER, "application/vnd.oci.image.layer.v1.tar")],
    }
).encode()


def push(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False) as client:
        for data in (LAYER, CONFIG):
            location = client.post("/v2/library/app/blobs/uploads/").headers["location"]
            put = client.put(httpx.URL(location).copy_merge_params({"digest": digest(data)}), content=data)
            assert put.status_code == 201
        put = client.put("/v2/library/app/manifests/v1", content=MANIFEST, headers={"Content-Type": MEDIA_TYPE})
        assert put.status_code == 201


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a docker-registry that has library/app:v1."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        push(running.url)
        yield running.url


def upstreams_of(url: str) -> Upstreams:
    return Upstreams([UpstreamPart(name="docker.io", url=url)], count=lambda name, size: None, rng=Random(1))


class PassingLibrary:
    """A library that sends every read straight to the registry."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        return (await self._upstreams.resolve(locator, reference))[0]

    async def read(self, locator: Locator, ref: ObjectRef, start: int, stop: int) -> AsyncGenerator[memoryview, None]:
        first, last = start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)
        async with aclosing(self._upstreams.blocks(locator, ref, first, last - first)) as blocks:
            position = first * BLOCK_SIZE
            async for block in blocks:
                yield memoryview(block)[max(0, start - position) : stop - position]
                position += len(block)

    async def sized(self, locator: Locator, resolved: Resolved) -> Resolved:
        return resolved

    def holds_sealed(self, locator: Locator, ref: ObjectRef) -> bool:
        return False

    def sealed(self, ref: ObjectRef, start: int, stop: int) -> BinaryIO | None:
        return None


@needs_registry
def test_names_sizes_and_blocks(registry: str) -> None:
    async def main() -> None:
        async with upstreams_of(registry) as upstreams:
            manifests = BLOBS.of_kind("manifests")
            resolved, body = await upstreams.resolve(manifests, "v1", whole=True)
            assert (str(resolved.ref.digest), resolved.media_type, body) == (digest(MANIFEST), MEDIA_TYPE, MANIFEST)
            assert await upstreams.resolve(manifests, "v1") == (resolved, None)
            layer = (await upstreams.resolve(BLOBS, digest(LAYER)))[0].ref
            assert layer.size == len(LAYER)
            for first, count in ((0, layer.block_count), (2, 2), (layer.block_count - 1, 1)):
                async with aclosing(upstreams.blocks(BLOBS, layer, first, count)) as blocks:
                    data = b"".join([bytes(block) async for block in blocks])
                assert data == LAYER[first * BLOCK_SIZE : (first + count) * BLOCK_SIZE]
            tags = await upstreams.passthrough(manifests, "tags/list", {})
            assert json.loads(tags.body)["tags"] == ["v1"]
            for locator, reference in ((manifests, "v2"), (BLOBS, f"sha256:{'0' * 64}")):
                with pytest.raises(NotFoundError):
                    await upstreams.resolve(locator, reference)

    trio.run(main)


@needs_registry
@needs_skopeo
@pytest.mark.parametrize("prefix", ["", "docker.io/"])
def test_skopeo_pulls_through_the_mirror(registry: str, tmp_path: Path, prefix: str) -> None:
    async def main() -> None:
        async with upstreams_of(registry) as upstreams, trio.open_nursery() as nursery:
            library = PassingLibrary(upstreams)
            listings = Listings(upstreams.passthrough, library, tmp_path / "listings.sqlite", 60.0)
            mirror = Mirror(library, upstreams.names, listings, Everybody())  # type: ignore[arg-type]
            url = await serve(nursery, mirror.handle)
            source = f"docker:{url.removeprefix('http:')}/{prefix}library/app:v1"
            command = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", source, f"dir:{tmp_path}/out"]
            with trio.fail_after(60):
                await trio.run_process(command, capture_stdout=True, capture_stderr=True)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == MANIFEST
    assert (tmp_path / "out" / digest(LAYER).partition(":")[2]).read_bytes() == LAYER


@needs_registry
def test_blocks_one_after_another_travel_on_one_connection(registry: str) -> None:
    url = httpx.URL(registry)

    async def main(through: CountingProxy) -> None:
        async with upstreams_of(through.url) as upstreams:
            layer = (await upstreams.resolve(BLOBS, digest(LAYER)))[0].ref
            for index in range(layer.block_count):
                async with aclosing(upstreams.blocks(BLOBS, layer, index, 1)) as blocks:
                    received = [bytes(block) async for block in blocks]
                assert received == [LAYER[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]]

    with CountingProxy(url.host, url.port or 80) as proxy:
        trio.run(main, proxy)
        assert proxy.count.requests == 1 + 6
        assert proxy.count.connections <= 2  # the name, asked with HEAD, may have another connection
