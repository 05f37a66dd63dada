"""The pull side of the OCI distribution specification 1.1 against a real p2pd in front of a real docker-registry.

The requests and expectations are those of the specification's own conformance suite (categories Pull and Content
Discovery of 1.1, and the additions of its later rewrite for reading: ranges, sha512, special contents). The suite's
pushes go to the registry behind the mirror. docker-registry has neither the referrers API nor pages of tags, so these
answers are the mirror's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from urllib.parse import urlencode

import httpx
import pytest

from tests.support import registry as registries
from tests.support.processes import tail
from tests.support.site import UPSTREAM, Node, site

NAME = "conformance/app"
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
ACCEPT = {"Accept": f"{INDEX}, {MANIFEST}"}
CODES = {
    *("BLOB_UNKNOWN", "DIGEST_INVALID", "MANIFEST_INVALID", "MANIFEST_UNKNOWN", "NAME_INVALID", "NAME_UNKNOWN"),
    *("SIZE_INVALID", "UNAUTHORIZED", "DENIED", "UNSUPPORTED", "TOOMANYREQUESTS"),
    "RANGE_INVALID",  # docker-registry's: the specification has no code for 416
}
BLOB = Random(5).randbytes(2048)
CONFIG = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}'
LAYER = Random(6).randbytes(1_300_000)
TAGS = ["test0", "test1", "test2", "test3"]


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def described(data: bytes, media_type: str, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def manifest(config: bytes, layers: Sequence[bytes], config_type: str = EMPTY, **more: object) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": described(config, config_type),
        "layers": [described(layer, "application/octet-stream") for layer in layers],
        **more,
    }
    return json.dumps(document).encode()


def index(manifests: Sequence[Mapping[str, object]], **more: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests, **more}, indent=2).encode()


IMAGE = manifest(CONFIG, [LAYER], "application/vnd.oci.image.config.v1+json")
LARGE = manifest(b"{}", [BLOB], annotations={f"large-{number}": "A" * 10000 for number in range(390)})
ARTIFACTS = [
    manifest(b"{}", [BLOB], artifactType=f"application/vnd.example.{kind}", subject=described(IMAGE, MANIFEST))
    for kind in ("signature", "sbom")
]
REFERRERS = index(
    [
        described(artifact, MANIFEST, artifactType=f"application/vnd.example.{kind}", annotations={"kind": kind})
        for artifact, kind in zip(ARTIFACTS, ("signature", "sbom"), strict=True)
    ]
)
PLATFORMS = index([described(IMAGE, MANIFEST, platform={"os": "linux", "architecture": "amd64"})], customField="kept")
DOCKER = "application/vnd.docker.distribution.manifest"
DOCKER_IMAGE = manifest(
    CONFIG, [LAYER], "application/vnd.docker.container.image.v1+json", mediaType=f"{DOCKER}.v2+json"
)
DOCKER_LIST = index(
    [described(DOCKER_IMAGE, f"{DOCKER}.v2+json", platform={"os": "linux", "architecture": "amd64"})],
    mediaType=f"{DOCKER}.list.v2+json",
)
MANIFESTS = {
    "untyped": index([{"digest": digest(LARGE), "size": len(LARGE)}]),
    **dict.fromkeys(TAGS, IMAGE),
    "large": LARGE,
    **{f"artifact{number}": body for number, body in enumerate(ARTIFACTS)},
    digest(IMAGE).replace(":", "-"): REFERRERS,
    "index": PLATFORMS,
    "nested": index([described(PLATFORMS, INDEX)]),
    "empty-index": index([]),
    "docker": DOCKER_IMAGE,
    "docker-list": DOCKER_LIST,
}
BLOBS = [(data, "sha256") for data in (CONFIG, LAYER, BLOB, b"{}", b"")] + [(BLOB, "sha512"), (LAYER, "sha512")]


def seed(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for data, algorithm in BLOBS:
            upload = httpx.URL(client.post(f"/v2/{NAME}/blobs/uploads/").headers["location"])
            put = client.put(upload.copy_merge_params({"digest": digest(data, algorithm)}), content=data)
            assert put.status_code == 201, put.text
        for tag, body in sorted(MANIFESTS.items(), key=lambda item: b'"manifests"' in item[1]):
            headers = {"Content-Type": json.loads(body)["mediaType"]}
            put = client.put(f"/v2/{NAME}/manifests/{tag}", content=body, headers=headers)
            assert put.status_code == 201, put.text


@dataclass(frozen=True)
class Case:
    """A request below /v2/, and the expected answer: one of `status`, these headers, this body."""

    method: str
    path: str
    status: tuple[int, ...] = (200,)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    sent: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""

    def wrong(self, client: httpx.Client) -> str:
        """The difference between the answer and the expectation, "" if there is none."""
        got = client.request(self.method, f"/v2/{self.path}", headers=self.sent, content=self.content)
        headers = {name: got.headers.get(name) for name in self.headers}
        if got.status_code not in self.status or headers != dict(self.headers):
            return f"{got.status_code} {headers} {got.content[:200]!r}"
        if self.body is not None and got.content != (b"" if self.method == "HEAD" else self.body):
            return f"{len(got.content)} bytes: {got.content[:200]!r}"
        if got.status_code >= 400 and self.method != "HEAD" and got.json()["errors"][0]["code"] not in CODES:
            return f"{got.status_code} {got.text}"
        return ""


def reads(path: str, data: bytes, name: str, media_type: str) -> Iterator[Case]:
    headers = {"docker-content-digest": name, "content-length": str(len(data)), "content-type": media_type}
    for method in ("HEAD", "GET"):
        yield Case(method, path, headers=headers, body=data, sent=ACCEPT)


def content() -> Iterator[Case]:
    """Cases for everything that was pushed, by tag and by digest, whole and in part."""
    yield Case("GET", "")
    for data, algorithm in BLOBS:
        name = digest(data, algorithm)
        yield from reads(f"{NAME}/blobs/{name}", data, name, "application/octet-stream")
    for tag, body in MANIFESTS.items():
        for reference in (digest(body), tag):
            yield from reads(f"{NAME}/manifests/{reference}", body, digest(body), json.loads(body)["mediaType"])
    for algorithm in ("sha256", "sha512"):
        for span, expected in (
            ("500-1499", (500, 1499)),
            ("500-", (500, 2047)),
            ("-500", (1548, 2047)),
            ("2000-5000", (2000, 2047)),
            ("500-0", None),
            ("5000-10000", None),
        ):
            yield ranged(f"{NAME}/blobs/{digest(BLOB, algorithm)}", span, expected)


def ranged(path: str, span: str, expected: tuple[int, int] | None) -> Case:
    sent = {"Range": f"bytes={span}"}
    if expected is None:
        return Case("GET", path, (416,), {"content-range": "bytes */2048"}, sent=sent)
    first, last = expected
    headers = {"content-range": f"bytes {first}-{last}/2048", "content-length": str(last - first + 1)}
    return Case("GET", path, (206,), headers, body=BLOB[first : last + 1], sent=sent)


def missing() -> Iterator[Case]:
    """Cases for objects that were never pushed, and for names that no registry can have."""
    for method in ("HEAD", "GET"):
        yield Case(method, f"{NAME}/blobs/{digest(b'hello world')}", (404,))
        yield Case(method, f"{NAME}/manifests/.INVALID_MANIFEST_NAME", (404,), sent=ACCEPT)
        yield Case(method, f"{NAME}/manifests/{digest(b'hello world')}", (404,), sent=ACCEPT)
        yield Case(method, f"{NAME}/manifests/missing-tag", (404,), sent=ACCEPT)
        yield Case(method, f"{NAME}/manifests/sha256:baddigeststring", (404, 400), sent=ACCEPT)
        yield Case(method, f"{NAME}-other/tags/list", (404,))
    wrong = {"Content-Type": MANIFEST}
    yield Case("PUT", f"{NAME}/manifests/sha256:totallywrong", (400, 404), sent=wrong, content=b"blablabla")
    yield Case("DELETE", f"{NAME}/manifests/{digest(IMAGE)}", (405,), {"allow": "GET, HEAD"})
    yield Case("POST", f"{NAME}/blobs/uploads/", (405,), {"allow": "GET, HEAD"})


def discovered(client: httpx.Client) -> None:
    """Cases for tags by pages, and for referrers."""
    path = f"/v2/{NAME}/tags/list"
    whole = client.get(path).raise_for_status().json()
    assert whole == {"name": NAME, "tags": sorted(MANIFESTS)}
    half = len(MANIFESTS) // 2
    first = client.get(path, params={"n": half}).raise_for_status()
    assert first.json()["tags"] == whole["tags"][:half]
    rest = client.get(path, params={"last": first.json()["tags"][-1]}).raise_for_status()
    assert rest.json()["tags"] == whole["tags"][half:]
    pages, url = [], f"{path}?n=2"
    while url:
        page = client.get(url).raise_for_status()
        pages.append(page.json()["tags"])
        url = page.links.get("next", {}).get("url", "")
    assert pages == [whole["tags"][start : start + 2] for start in range(0, len(MANIFESTS), 2)]
    assert (client.get(path, params={"n": 0}).json()["tags"], client.head(path).status_code) == ([], 200)
    for subject, artifact_type, expected in (
        (IMAGE, "", [0, 1]),
        (IMAGE, "application/vnd.example.sbom", [1]),
        (IMAGE, "application/vnd.example.other", []),
        (b"hello world", "", []),
    ):
        query = {"artifactType": artifact_type} if artifact_type else {}
        got = client.get(f"/v2/{NAME}/referrers/{digest(subject)}?{urlencode(query)}").raise_for_status()
        assert got.headers["content-type"] == INDEX
        assert got.headers.get("oci-filters-applied") == ("artifactType" if artifact_type else None)
        document = got.json()
        assert (document["schemaVersion"], document["mediaType"]) == (2, INDEX)
        assert document["manifests"] == [json.loads(REFERRERS)["manifests"][number] for number in expected]
        head = client.head(got.url)
        assert {**head.headers, "date": ""} == {**got.headers, "date": ""}


@pytest.fixture
def seeded(folder: Path) -> Iterator[tuple[registries.Registry, contextlib.ExitStack]]:
    """A registry with the content. It ends when the stack is closed."""
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(registries.docker_registry(folder / "registry"))
        seed(running.url)
        yield running, stack


def wrong(node: Node, cases: Iterator[Case]) -> dict[str, str]:
    with httpx.Client(base_url=node.mirror, params={"ns": UPSTREAM}, trust_env=False, timeout=60) as client:
        problems = {f"{case.method} {case.path} {dict(case.sent)}": case.wrong(client) for case in cases}
    return {name: problem for name, problem in problems.items() if problem}


def check_discovery(node: Node) -> None:
    with httpx.Client(base_url=node.mirror, trust_env=False, timeout=60) as client:
        client.event_hooks = {"request": [add_namespace]}
        discovered(client)


def add_namespace(request: httpx.Request) -> None:
    request.url = request.url.copy_merge_params({"ns": UPSTREAM})


def test_the_pull_side_of_the_specification(folder: Path, seeded) -> None:
    """With the registry; without it, after everything was requested once; and from a daemon restarted without it."""
    registry, stack = seeded
    with site(folder / "site", registry.url, 1, start=False) as (node,):
        node.config.write_text(node.config.read_text().replace("[mirror]", '[mirror]\ntag_ttl = "1s"'))
        node.start()
        assert wrong(node, content()) == {}
        assert wrong(node, missing()) == {}
        check_discovery(node)
        stack.close()
        assert wrong(node, content()) == {}
        assert wrong(node, missing()) == {}
        check_discovery(node)
        node.stop()
        node.start()
        assert wrong(node, content()) == {}
        check_discovery(node)
        assert "Traceback" not in tail(node.log, 10000)
