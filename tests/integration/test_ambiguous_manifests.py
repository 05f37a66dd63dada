"""Manifests that decoders may read differently, pushed to a real docker-registry: Shoal reads no other field than it.

A registry accepts a manifest only if it has the blobs that it reads in it. So in an accepted manifest every descriptor
that Shoal reads must name a blob that the registry has: otherwise Shoal reads what the registry did not check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.oci.manifests import descriptors, parse_manifest
from tests.support import image as images
from tests.support import registry as registries
from tests.support.image import CONFIG, INDEX, LAYER, MANIFEST, Image

REPOSITORY = "public/app"
SECRET = {"mediaType": LAYER, "digest": "sha256:" + "ab" * 32, "size": 5}
"""A blob that the registry does not have in this repository."""
CASES = {
    "layers": ("layers", "Layers", "LAYERS", "layer\u017f", "\\u006cayers", "Lay\\u0065rs"),
    "config": ("config", "Config", "confi\\u0067"),
    "manifests": ("manifests", "Manifests", "manifest\u017f"),
    "digest": ("digest", "Digest", "DIGEST"),
    "size": ("size", "Size", "\u017fize"),
    "mediaType": ("mediaType", "MediaType", "mediatype"),
}

pytestmark = pytest.mark.skipif(not registries.installed(), reason="docker-registry is not installed")


class Pushed:
    """A repository with one image, and a client that pushes."""

    def __init__(self, image: Image, client: httpx.Client) -> None:
        self.image, self._client = image, client
        self.has = {blob.digest for blob in (*image.blobs, image.manifest)}

    def accepts(self, body: bytes, media_type: str) -> bool:
        answer = self._client.put(f"/v2/{REPOSITORY}/manifests/odd", content=body, headers={"Content-Type": media_type})
        return answer.status_code == 201


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    folder = tmp_path_factory.mktemp("ambiguous")
    image = images.build(folder / "layout", [[("small", b"for everybody")]])
    with (
        registries.docker_registry(folder / "registry") as registry,
        httpx.Client(base_url=registry.url, trust_env=False, timeout=60) as client,
    ):
        registries.push(registry, image, REPOSITORY, "v1")
        yield Pushed(image, client)


def text_of(members: list[tuple[str, str]]) -> str:
    """A JSON object with these members in this order; names may have escapes, values are JSON."""
    return "{" + ",".join(f'"{name}":{value}' for name, value in members) + "}"


@st.composite
def described(draw: st.DrawFn, good: dict[str, Any]) -> str:
    """A descriptor whose members may occur again, in any case, with the values of another blob."""
    members = [(name, json.dumps(value)) for name, value in good.items()]
    for name in draw(st.lists(st.sampled_from(("digest", "size", "mediaType")), max_size=2)):
        value = draw(st.sampled_from([json.dumps(SECRET[name]), "null", "-1", "1e0"]))
        members.insert(draw(st.integers(0, len(members))), (draw(st.sampled_from(CASES[name])), value))
    if draw(st.integers(0, 9)) == 0:
        members = [member for member in members if member[0] != "size"]
    return text_of(members)


@st.composite
def manifests(draw: st.DrawFn, image: Image) -> tuple[bytes, str]:
    is_index = draw(st.booleans())
    media_type = INDEX if is_index else MANIFEST
    members = [("schemaVersion", "2"), ("mediaType", json.dumps(media_type))]
    layers = [blob.descriptor() for blob in image.layers]
    if is_index:
        members.append(("manifests", f"[{draw(described(image.manifest.descriptor()))}]"))
    else:
        members.append(("config", draw(described({**image.config.descriptor(), "mediaType": CONFIG}))))
        members.append(("layers", "[" + ",".join(draw(described(layer)) for layer in layers) + "]"))
    for name in draw(st.lists(st.sampled_from(("layers", "config", "manifests")), max_size=2)):
        value = json.dumps(SECRET) if name == "config" else f"[{json.dumps(SECRET)}]"
        value = draw(st.sampled_from([value, "null", "[]", "{}"]))
        members.insert(draw(st.integers(0, len(members))), (draw(st.sampled_from(CASES[name])), value))
    return text_of(members).encode(), media_type


def test_the_image_itself_is_accepted_and_read(pushed: Pushed) -> None:
    body = Path(pushed.image.path(pushed.image.manifest)).read_bytes()
    assert pushed.accepts(body, MANIFEST)
    assert {str(blob.ref.digest) for blob in descriptors(parse_manifest(body), "blobs")} <= pushed.has


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_field_is_read_that_the_registry_did_not_check(pushed: Pushed, data: st.DataObject) -> None:
    """S-36"""
    body, media_type = data.draw(manifests(pushed.image))
    if not pushed.accepts(body, media_type):
        return
    manifest = parse_manifest(body)
    for kind in ("blobs", "manifests"):
        for resolved in descriptors(manifest, kind):
            assert str(resolved.ref.digest) in pushed.has, body
