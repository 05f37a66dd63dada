"""A client that would read a private image through a repository that it may write, and manifests with false sizes."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import image as images
from tests.support import registry as registries
from tests.support.image import INDEX, MANIFEST, Blob, Image, blob_path
from tests.support.processes import scratch
from tests.support.siege import Siege, besieged
from tests.support.site import UPSTREAM, Node
from tests.support.token_server import TokenServer

PRIVATE, OPEN, TEAM = "team/app", "public/app", "team/other"
ALICE, BOB = "alice", "bob"
PASSWORDS = {ALICE: "correct-horse-battery", BOB: "bobs-own-password"}
REFUSED = {401, 403, 404}
WAYS = (
    ("GET", {}),
    ("HEAD", {}),
    ("GET", {"Range": "bytes=0-9"}),
    ("GET", {"If-None-Match": '"{}"'}),
    ("HEAD", {"If-None-Match": "*"}),
)
"""Ways to ask for an object, each with headers, in which {} is its digest."""
AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Guarded:
    siege: Siege
    tokens: TokenServer
    open_registry: registries.Registry
    private: Image
    public: Image

    def bearer(self, user: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens.token(user, PRIVATE, OPEN, TEAM)}"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    """Two registries over one store: one asks for tokens, and the other one takes what the attacker pushes."""
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    with (
        scratch() as folder,
        TokenServer(folder, PASSWORDS, {ALICE: [PRIVATE], BOB: [TEAM], "": [OPEN]}) as tokens,
        registries.docker_registry(folder / "registry") as unguarded,
        registries.docker_registry(folder / "registry", auth=tokens.registry_auth()) as registry,
        besieged(folder, registry, honest=3, changes={"[mirror]": '[mirror]\ntag_ttl = "1s"'}) as siege,
    ):
        private = images.build(folder / "private", [[("secret", images.noise(1, 700_000))], [("key", b"private key")]])
        public = images.build(folder / "public", [[("for-all", b"hello")]])
        registries.push(unguarded, private, PRIVATE, "v1")
        for repository in (OPEN, TEAM):
            registries.push(unguarded, public, repository, "v1")
        yield Guarded(siege, tokens, unguarded, private, public)


def call(
    node: Node, method: str, repository: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, bytes, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)) as connection:
        accept = {"Accept": f"{INDEX}, {MANIFEST}"}
        connection.request(method, f"/v2/{UPSTREAM}/{repository}/{path}", headers=accept | (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def put(registry: registries.Registry, repository: str, tag: str, body: bytes, media_type: str) -> int:
    with closing(http.client.HTTPConnection(registry.host, registry.port, timeout=60)) as connection:
        connection.request("PUT", f"/v2/{repository}/manifests/{tag}", body=body, headers={"Content-Type": media_type})
        answer = connection.getresponse()
        answer.read()
        return answer.status


def text(fields: list[tuple[str, Any]]) -> bytes:
    """A JSON object with these members in this order, also with duplicates."""
    return (
        "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value)}" for key, value in fields) + "}"
    ).encode()


def tricks(private: Image, public: Image) -> Iterator[tuple[str, bytes, str]]:
    """Manifests that name the private image's objects where only some decoders read them: name, bytes, media type."""
    secret, shown = ([blob.descriptor() for blob in image.layers] for image in (private, public))
    config, index, manifest = public.config.descriptor(), private.index, private.manifest.descriptor()
    head: list[tuple[str, Any]] = [("schemaVersion", 2), ("mediaType", MANIFEST)]
    for other in ("Layers", "LAYERS", "layer\u017f", "layers"):
        for first, second in ((secret, shown), (shown, secret)):
            for names in (("layers", other), (other, "layers")):
                fields = [*head, ("config", config), (names[0], first), (names[1], second)]
                yield f"{names} {first is secret}", text(fields), MANIFEST
    for other in ("Config", "config"):
        fields = [*head, ("config", private.config.descriptor()), (other, config), ("layers", shown)]
        yield f"config {other}", text(fields), MANIFEST
    both = [{**descriptor, "Digest": shown[0]["digest"], "Size": shown[0]["size"]} for descriptor in secret]
    yield "Digest in a layer", text([*head, ("config", config), ("layers", both)]), MANIFEST
    foreign = [
        {
            **descriptor,
            "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "urls": ["https://example.com/layer"],
        }
        for descriptor in secret
    ]
    yield "foreign layers", text([*head, ("config", config), ("layers", [*shown, *foreign])]), MANIFEST
    yield "subject", text([*head, ("config", config), ("layers", shown), ("subject", manifest)]), MANIFEST
    listed = {**public.manifest.descriptor(), "platform": {"architecture": "amd64", "os": "linux"}}
    for names in (("manifests", "Manifests"), ("Manifests", "manifests"), ("manifests", "manifests")):
        for rows in (([manifest], [listed]), ([listed], [manifest])):
            fields = [("schemaVersion", 2), ("mediaType", INDEX), (names[0], rows[0]), (names[1], rows[1])]
            yield f"index {names} {rows[0] == [manifest]}", text(fields), INDEX
    fields = [*head, ("config", config), ("layers", shown), ("manifests", [manifest, index.descriptor()])]
    yield "a manifest that is an index too", text(fields), MANIFEST
    fields = [
        *head,
        ("config", config),
        ("layers", shown),
        ("blobs", secret),
        ("fsLayers", [{"blobSum": secret[0]["digest"]}]),
    ]
    yield "fields of other schemas", text(fields), MANIFEST


def read_all(node: Node, image: Image, repository: str, headers: dict[str, str]) -> None:
    for kind, blobs in (("manifests", (image.index, image.manifest)), ("blobs", image.blobs)):
        for blob in blobs:
            status, body, _ = call(node, "GET", repository, f"{kind}/{blob.digest}", headers)
            assert status == 200
            assert f"sha256:{hashlib.sha256(body).hexdigest()}" == blob.digest


def leaks(node: Node, image: Image, repository: str, headers: dict[str, str], *, refused: set[int]) -> list[str]:
    """The requests that give away a part of the image, or that it is held."""

    def leak(request: tuple[Blob, str, tuple[str, dict[str, str]]]) -> str:
        blob, kind, (method, more) = request
        more = {name: value.format(blob.digest) for name, value in more.items()}
        status, body, answer = call(node, method, repository, f"{kind}/{blob.digest}", headers | more)
        length = answer.get("Content-Length")
        if status in refused and (method != "HEAD" or length != str(blob.size)) and len(body) <= 1000:
            return ""
        return f"{node.name}: {method} {repository}/{kind}/{blob.digest} {more}: {status} {length}"

    blobs = (image.index, image.manifest, *image.blobs)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(filter(None, pool.map(leak, itertools.product(blobs, ("manifests", "blobs"), WAYS))))


def test_a_public_repository_gives_away_no_private_image(guarded: Guarded) -> None:
    """S-35: tricks that the registry takes, for the anonymous client and for one with rights to another repository."""
    siege, alice, bob = guarded.siege, guarded.bearer(ALICE), guarded.bearer(BOB)
    read_all(siege.honest[0], guarded.private, PRIVATE, alice)
    read_all(siege.honest[1], guarded.private, PRIVATE, alice)
    taken: dict[str, list[str]] = {OPEN: [], TEAM: []}
    for repository in taken:
        for number, (name, body, media_type) in enumerate(tricks(guarded.private, guarded.public)):
            if put(guarded.open_registry, repository, f"trick-{number}", body, media_type) == 201:
                taken[repository].append(f"trick-{number}")
                print(f"{repository}: the registry takes {name}")
    assert len(taken[OPEN]) > 5
    with siege.unharmed():
        for repository, headers in ((OPEN, {}), (TEAM, bob)):
            for node in siege.honest:
                for tag in taken[repository]:
                    status, body, _ = call(node, "GET", repository, f"manifests/{tag}", headers)
                    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
                    assert status in {200, *REFUSED, 503}
                    call(node, "GET", repository, f"manifests/{digest}", headers)
                assert leaks(node, guarded.private, repository, headers, refused=REFUSED) == []
            for other in (OPEN, TEAM, PRIVATE):
                if other != repository:
                    assert leaks(siege.honest[2], guarded.private, other, {}, refused=REFUSED) == []
        for node in siege.honest:
            read_all(node, guarded.private, PRIVATE, alice)
            read_all(node, guarded.public, OPEN, {})
        siege.proxy.cut()
        try:
            for node in siege.honest:
                assert leaks(node, guarded.private, OPEN, {}, refused=REFUSED | {503}) == []
                read_all(node, guarded.private, PRIVATE, alice)
                read_all(node, guarded.public, OPEN, {})
        finally:
            siege.proxy.restore()


SIZES: list[Any] = [1 << 40, 100, 0, -1, 1.5, 1 << 53, 1 << 63, "100", None, True, [], 10**30]


@pytest.mark.parametrize("held", [True, False])
def test_a_digest_has_one_size_whatever_manifests_say(guarded: Guarded, held: bool) -> None:
    """S-37: a blob that is held or not, named with other sizes by manifests that the registry takes."""
    siege = guarded.siege
    image = images.build(siege.folder / f"sized-{held}", [[("noise", images.noise(7 + held, 900_000))]])
    repository = OPEN
    registries.push(guarded.open_registry, image, repository, f"sized-{held}")
    if held:
        read_all(siege.honest[0], image, repository, {})
    (layer,) = image.layers
    with siege.unharmed():
        for number, size in enumerate(SIZES):
            fields: list[tuple[str, Any]] = [
                ("schemaVersion", 2), ("mediaType", MANIFEST), ("config", image.config.descriptor()),
                ("layers", [{**layer.descriptor(), "size": size}]),
            ]  # fmt: skip
            body, tag = text(fields), f"size-{held}-{number}"
            if put(guarded.open_registry, repository, tag, body, MANIFEST) != 201:
                continue
            for node in siege.honest:
                call(node, "GET", repository, f"manifests/{tag}")
                call(node, "GET", repository, f"manifests/sha256:{hashlib.sha256(body).hexdigest()}")
                assert_true_or_error(node, repository, layer)
        for node in siege.honest:
            read_all(node, image, repository, {})


def assert_true_or_error(node: Node, repository: str, blob: Blob) -> None:
    status, _, headers = call(node, "HEAD", repository, f"blobs/{blob.digest}")
    assert status != 200 or headers["Content-Length"] == str(blob.size)
    status, body, headers = call(node, "GET", repository, f"blobs/{blob.digest}")
    assert status >= 400 or f"sha256:{hashlib.sha256(body).hexdigest()}" == blob.digest
    last = {"Range": f"bytes={blob.size - 10}-"}
    status, body, headers = call(node, "GET", repository, f"blobs/{blob.digest}", last)
    if status == 206:
        assert len(body) == 10
        assert headers["Content-Range"].endswith(f"/{blob.size}")


def test_a_body_that_is_no_manifest_is_given_to_no_client(guarded: Guarded) -> None:
    """S-63: a registry's store is altered: under manifests/ it now sends a page of a proxy, or a list."""
    layout = guarded.siege.folder / "odd"
    image = images.build(layout, [[("odd", b"odd")]])
    registries.push(guarded.open_registry, image, OPEN, "odd")
    assert blob_path(layout, image.index.digest).exists()
    with guarded.siege.unharmed():
        for number, body in enumerate((b"<html>login</html>", b"[]", b'"text"', b"{}", b"null", b"[" * 100_000)):
            status = put(guarded.open_registry, OPEN, f"odd-{number}", body, MANIFEST)
            answered, answer, _ = call(guarded.siege.honest[0], "GET", OPEN, f"manifests/odd-{number}")
            assert status != 201 or answered != 200, answer
