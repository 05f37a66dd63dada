"""Manifests whose author names objects of others, or false sizes: a real docker-registry, real tokens, real daemons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import image as images
from tests.support import registry as registries
from tests.support.image import INDEX, MANIFEST, Blob, Image
from tests.support.planted import plant
from tests.support.proxy import CountingProxy
from tests.support.site import UPSTREAM, Node, site, start_all
from tests.support.token_server import TokenServer
from tests.support.watched_daemon import WATCHED, turns_of

PRIVATE, OPEN, TAG, ALICE = "team/app", "public/app", "v1", "alice"
LONG_TURN_S = 0.1

pytestmark = pytest.mark.skipif(not registries.installed(), reason="docker-registry is not installed")


@dataclass(frozen=True, slots=True)
class Guarded:
    """A registry with a private and a public image. `folder` has its data."""

    folder: Path
    tokens: TokenServer
    proxy: CountingProxy
    private: Image
    public: Image


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    layers = [[("noise", images.noise(1, 5_000_000))], [("secret", b"for the team only")]]
    private = images.build(tmp_path / "private", layers)
    public = images.build(tmp_path / "public", [[("small", b"for everybody")], [("large", images.noise(2, 1_200_000))]])
    stored = tmp_path / "registry"
    with registries.docker_registry(stored) as registry:
        registries.push(registry, private, PRIVATE, TAG)
        registries.push(registry, public, OPEN, TAG)
    with (
        TokenServer(tmp_path, {ALICE: "pw"}, {ALICE: [PRIVATE], "": [OPEN]}) as tokens,
        registries.docker_registry(stored, auth=tokens.registry_auth()) as registry,
        CountingProxy(registry.host, registry.port) as proxy,
    ):
        yield Guarded(stored, tokens, proxy, private=private, public=public)


def ask(node: Node, repository: str, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    headers = {"Accept": f"{INDEX}, {MANIFEST}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"{node.mirror}/v2/{repository}/{path}?ns={UPSTREAM}"
    return httpx.request(method, url, headers=headers, trust_env=False, timeout=60)


def described(blob: Blob, **changes: Any) -> dict[str, Any]:
    return {**blob.descriptor(), **changes}


def manifest_of(config: Blob, layers: list[dict[str, Any]], **more: Any) -> bytes:
    fields = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.descriptor(), "layers": layers}
    return json.dumps({**fields, **more}).encode()


def paths_of(image: Image) -> list[str]:
    manifests = [f"manifests/{blob.digest}" for blob in (image.index, image.manifest)]
    return manifests + [f"blobs/{blob.digest}" for blob in (image.config, *image.layers)]


def read_all(node: Node, repository: str, image: Image, **headers: str) -> None:
    assert ask(node, repository, f"manifests/{TAG}", **headers).status_code == 200
    for path in paths_of(image):
        answer = ask(node, repository, path, **headers)
        assert answer.status_code == 200, answer.text
        assert path.endswith(hashlib.sha256(answer.content).hexdigest())


def assert_closed(nodes: list[Node], image: Image, *statuses: int) -> None:
    """No request for an object of the image through the public repository shows anything of it."""
    places = [(node, path) for node in nodes for path in paths_of(image)]
    with ThreadPoolExecutor(len(places)) as pool:  # while the registry is cut, each answer takes a second
        for done in [pool.submit(assert_place_closed, *place, statuses) for place in places]:
            done.result()


def assert_place_closed(node: Node, path: str, statuses: tuple[int, ...]) -> None:
    etag = f'"{path.rpartition("/")[2]}"'
    for method, headers in (
        ("GET", {}),
        ("HEAD", {}),
        ("GET", {"Range": "bytes=0-9"}),
        ("GET", {"Range": "bytes=999999999-"}),
        ("GET", {"If_None_Match": etag}),
        ("GET", {"If_Match": '"other"'}),
    ):
        answer = ask(node, OPEN, path, method, **headers)
        assert answer.status_code in statuses, (node.name, path, method, headers, answer.status_code)
        assert "etag" not in answer.headers
        assert "content-range" not in answer.headers


def test_a_manifest_in_a_public_repository_opens_no_private_object(folder: Path, guarded: Guarded) -> None:
    """S-35"""
    private, public = guarded.private, guarded.public
    layers = [layer.descriptor() for layer in private.layers]
    plant(guarded.folder, OPEN, "blobs", manifest_of(private.config, layers))
    inner = [described(private.manifest), described(private.index)]
    plant(
        guarded.folder,
        OPEN,
        "index",
        json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": inner}).encode(),
    )
    alice = f"Bearer {guarded.tokens.token(ALICE, PRIVATE)}"
    with site(folder / "site", guarded.proxy.url, 3) as nodes:
        for node in nodes[:2]:
            read_all(node, PRIVATE, private, Authorization=alice)
        for node in nodes:
            for tag in ("blobs", "index"):
                assert ask(node, OPEN, f"manifests/{tag}").status_code == 200
            read_all(node, OPEN, public)
        assert_closed(nodes, private, 404)
        for node in nodes:
            read_all(node, PRIVATE, private, Authorization=alice)

        guarded.proxy.cut()
        assert_closed(nodes, private, 404, 503)
        for node in nodes:
            read_all(node, OPEN, public)
            read_all(node, PRIVATE, private, Authorization=alice)
            node.kill()
        start_all(nodes)
        for node in nodes:
            read_all(node, OPEN, public)
        assert_closed(nodes, private, 404, 503)


@pytest.mark.parametrize("last", ["layers", "Layers"])
def test_a_manifest_that_decoders_read_differently_is_given_to_no_client(
    folder: Path, guarded: Guarded, last: str
) -> None:
    """S-36"""
    private = [layer.descriptor() for layer in guarded.private.layers]
    public = [layer.descriptor() for layer in guarded.public.layers]
    listed = {"layers": private, "Layers": public} if last == "Layers" else {"Layers": private, "layers": public}
    config = guarded.public.config.descriptor()
    body = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, **listed}).encode()
    digest = plant(guarded.folder, OPEN, "both", body)
    alice = f"Bearer {guarded.tokens.token(ALICE, PRIVATE)}"
    with site(folder / "site", guarded.proxy.url, 2) as nodes:
        read_all(nodes[0], PRIVATE, guarded.private, Authorization=alice)
        for node in nodes:
            for reference in ("both", digest):
                assert ask(node, OPEN, f"manifests/{reference}").status_code == 503
        assert_closed(nodes, guarded.private, 404)


@pytest.mark.parametrize("size", [0, 1, 100, 700_000, 1 << 36, (1 << 40) - 1, 1 << 62])
def test_a_false_size_of_a_held_object_has_no_effect(folder: Path, guarded: Guarded, size: int) -> None:
    """S-37"""
    public = guarded.public
    layers = [described(layer, size=size) for layer in public.layers]
    plant(guarded.folder, OPEN, "sizes", manifest_of(public.config, layers))
    with site(folder / "site", guarded.proxy.url, 2, start=False) as nodes:
        for node in nodes:
            node.program = WATCHED
        start_all(nodes)
        before = [len(turns_of(node.data)) for node in nodes]
        assert ask(nodes[0], OPEN, "manifests/sizes").status_code == 200
        read_all(nodes[1], OPEN, public)
        assert ask(nodes[1], OPEN, "manifests/sizes").status_code == 200
        for node in nodes:
            for layer in public.layers:
                path = f"blobs/{layer.digest}"
                assert ask(node, OPEN, path, "HEAD").headers["content-length"] == str(layer.size)
                answer = ask(node, OPEN, path)
                assert answer.status_code == 200
                assert hashlib.sha256(answer.content).hexdigest() == layer.digest[7:]
                assert ask(node, OPEN, path, Range="bytes=-1").headers["content-range"].endswith(f"/{layer.size}")
        guarded.proxy.cut()
        for node in nodes:
            for layer in public.layers:
                assert ask(node, OPEN, f"blobs/{layer.digest}").content == public.path(layer).read_bytes()
            for arguments in (("why", "--blocks"), ("images",), ("cache",)):
                image = (f"{UPSTREAM}/{OPEN}:sizes",) if arguments[0] == "why" else ()
                assert node.ctl(arguments[0], *image, *arguments[1:]).returncode == 0
        for node, count in zip(nodes, before, strict=True):
            long = [turn for turn in turns_of(node.data, count) if turn.cpu_s > LONG_TURN_S]
            assert not long, "\n".join(map(str, long))
