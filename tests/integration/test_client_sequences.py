"""The requests of clients that are not installed here, taken from their sources, sent to a real p2pd.

Each answer is checked as that client checks it: a wrong length, a missing header or a missing part fails its pull.
The installed clients are tested in test_containerd.py, test_cri.py and the files beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
import pytest

from node.blocks.room import HELD
from protocol.ids import BLOCK_SIZE
from tests.support import registry as registries
from tests.support.faulty_origin import Fault, FaultyOrigin, content
from tests.support.image import ARCHITECTURE
from tests.support.processes import tail
from tests.support.proxy import CountingProxy
from tests.support.registry import Registry
from tests.support.site import UPSTREAM, Node, site
from tests.support.token_server import TokenServer

HUB, REPOSITORY = "docker.io", "library/sequences"
CONFIG = json.dumps(
    {"architecture": ARCHITECTURE, "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
).encode()
LAYER = Random(7).randbytes(24 * BLOCK_SIZE + 12_345)
FOREIGN_LAYER = b"for another platform"
MAX_COPIES = 1.02
FETCH_BUFFER = 1 << 20
PODMANS_RANGES = 1024
"""Most ranges in a request of containers/storage, which merges neighbours to stay below this number."""

Headers = Sequence[tuple[str, str]]

pytestmark = pytest.mark.skipif(not registries.installed(), reason="Debian package docker-registry is not installed")


# The registry's content


@dataclass(frozen=True, slots=True)
class Words:
    """Media types. `tag` names an index of two platforms with these types."""

    tag: str
    index: str
    manifest: str
    config: str
    layer: str

    def manifest_of(self, layer: bytes) -> bytes:
        return document(self.manifest, config=described(self.config, CONFIG), layers=[described(self.layer, layer)])

    def whole(self) -> bytes:
        return document(
            self.index,
            manifests=[
                described(self.manifest, self.manifest_of(layer)) | {"platform": {"architecture": name, "os": "linux"}}
                for layer, name in ((FOREIGN_LAYER, "another"), (LAYER, ARCHITECTURE))
            ],
        )


VND = "application/vnd."
OCI = Words(
    "oci",
    index=f"{VND}oci.image.index.v1+json",
    manifest=f"{VND}oci.image.manifest.v1+json",
    config=f"{VND}oci.image.config.v1+json",
    layer=f"{VND}oci.image.layer.v1.tar+gzip",
)
DOCKER = Words(
    "docker",
    index=f"{VND}docker.distribution.manifest.list.v2+json",
    manifest=f"{VND}docker.distribution.manifest.v2+json",
    config=f"{VND}docker.container.image.v1+json",
    layer=f"{VND}docker.image.rootfs.diff.tar.gzip",
)
SCHEMA_1 = f"{VND}docker.distribution.manifest.v1+prettyjws"


def document(media_type: str, **parts: object) -> bytes:
    """A JSON document, indented as by Docker's own tools, so that a re-encoded answer differs from it."""
    return json.dumps({"schemaVersion": 2, "mediaType": media_type, **parts}, indent=3).encode()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def described(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "size": len(data), "digest": digest_of(data)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a registry that holds both images."""
    folder = tmp_path_factory.mktemp("sequences")
    with registries.docker_registry(folder) as running, httpx.Client(base_url=running.url, trust_env=False) as client:
        for data in (CONFIG, LAYER, FOREIGN_LAYER):
            upload = httpx.URL(client.post(f"/v2/{REPOSITORY}/blobs/uploads/").headers["location"])
            client.put(upload.copy_merge_params({"digest": digest_of(data)}), content=data).raise_for_status()
        for words in (OCI, DOCKER):
            both = [words.manifest_of(layer) for layer in (FOREIGN_LAYER, LAYER)]
            for reference, body in (*((digest_of(body), body) for body in both), (words.tag, words.whole())):
                headers = {"Content-Type": json.loads(body)["mediaType"]}
                client.put(f"/v2/{REPOSITORY}/manifests/{reference}", content=body, headers=headers).raise_for_status()
    return folder


@pytest.fixture
def registry(stored: Path) -> Iterator[Registry]:
    with registries.docker_registry(stored) as running:
        yield running


@pytest.fixture
def proxy(registry: Registry) -> Iterator[CountingProxy]:
    with CountingProxy(registry.host, registry.port) as counting:
        yield counting


@pytest.fixture
def node(folder: Path, proxy: CountingProxy) -> Iterator[Node]:
    with site(folder / "site", proxy.url, 1, upstream=HUB) as (running,):
        yield running


# Clients


@dataclass(frozen=True, slots=True)
class Client:
    where: str
    """The form of its targets: {name} is the registry's."""
    accept: tuple[str, ...]
    """Values of its Accept headers for manifests, one header each."""
    blobs: Headers
    """Its headers for blobs, in addition to the Range of a resumed read."""
    head: bool = True
    """Whether it resolves a tag by HEAD and then requests the digest."""

    def target(self, path: str) -> str:
        return self.where.format(name=HUB, path=f"{REPOSITORY}/{path}")

    @property
    def manifests(self) -> Headers:
        return [("Accept", kind) for kind in self.accept]

    def open(self, connection: http.client.HTTPConnection, data: bytes, span: str = "") -> http.client.HTTPResponse:
        headers = [*self.blobs, *([("Range", f"bytes={span}")] if span else [])]
        return ask(connection, "GET", self.target(f"blobs/{digest_of(data)}"), headers)


EVERY = (DOCKER.manifest, DOCKER.index, OCI.manifest, OCI.index)
CONTAINERD = Client(
    where="/v2/{path}?ns={name}",
    accept=(", ".join((*EVERY, "*/*")),),
    blobs=[("Accept", f"{OCI.layer}, */*"), ("Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5")],
)
PODMAN = Client(
    where="/v2/{name}/{path}",
    accept=(*EVERY, SCHEMA_1),
    blobs=[("Docker-Distribution-Api-Version", "registry/2.0"), ("Accept-Encoding", "gzip")],
    head=False,
)
CLIENTS = {
    "containerd 2.1, BuildKit 0.20": CONTAINERD,
    "Docker 20.10, classic store": Client(
        where="/v2/{path}",
        accept=(*EVERY, SCHEMA_1, "application/json"),
        blobs=[("Accept-Encoding", "identity")],
    ),
    "Podman 5, CRI-O 1.30": PODMAN,
}
each_client = pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)


@contextlib.contextmanager
def connected(node: Node) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)) as connection:
        yield connection


def ask(
    connection: http.client.HTTPConnection, method: str, target: str, headers: Headers = ()
) -> http.client.HTTPResponse:
    """Send these headers and Host, and no others."""
    connection.putrequest(method, target, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


def check(
    method: str, connection: http.client.HTTPConnection, target: str, headers: Headers, *, kind: str, data: bytes
) -> None:
    """Request an object, and compare the answer with `data`."""
    answer = ask(connection, method, target, headers)
    assert answer.status == 200
    received = {name: answer.getheader(name) for name in ("Content-Type", "Content-Length", "Docker-Content-Digest")}
    assert received == {
        "Content-Type": kind,
        "Content-Length": str(len(data)),
        "Docker-Content-Digest": digest_of(data),
    }
    assert answer.getheader("Content-Encoding") is answer.getheader("Transfer-Encoding") is None
    assert answer.read() == (b"" if method == "HEAD" else data)


@each_client
def test_a_pull_from_the_tag_to_the_layers(node: Node, proxy: CountingProxy, client: Client) -> None:
    for words in (OCI, DOCKER):
        whole, manifest = words.whole(), words.manifest_of(LAYER)
        asked = [("GET", words.tag, whole)]
        if client.head:
            asked = [("HEAD", words.tag, whole), ("GET", digest_of(whole), whole)]
        with connected(node) as connection:
            assert ask(connection, "GET", "/v2/").read() == b"{}"
            for method, reference, data in (*asked, ("GET", digest_of(manifest), manifest)):
                kind = words.manifest if data == manifest else words.index
                check(
                    method, connection, client.target(f"manifests/{reference}"), client.manifests, kind=kind, data=data
                )
            for data in (CONFIG, LAYER):
                target = client.target(f"blobs/{digest_of(data)}")
                check("GET", connection, target, client.blobs, kind="application/octet-stream", data=data)
    assert proxy.count.received <= MAX_COPIES * len(LAYER), proxy.count.asked.most_common(5)


@each_client
def test_an_interrupted_blob_continues_where_it_stopped(node: Node, client: Client) -> None:
    """Docker and Podman compare all three numbers of Content-Range, containerd the first."""
    size, got = len(LAYER), b""
    for stop in (100_000, 7 * BLOCK_SIZE, size):
        with connected(node) as connection:
            answer = client.open(connection, LAYER, f"{len(got)}-" if got else "")
            assert answer.status == (206 if got else 200)
            assert answer.getheader("Content-Range") == (f"bytes {len(got)}-{size - 1}/{size}" if got else None)
            assert answer.getheader("Content-Length") == str(size - len(got))
            got += answer.read(stop - len(got))
    assert got == LAYER


@pytest.mark.parametrize("parallel", [3, 8])
def test_containerd_2_1_reads_a_layer_by_several_ranges_at_once(
    node: Node, proxy: CountingProxy, parallel: int
) -> None:
    """With concurrent_layer_fetch_buffer a worker requests all bytes from its part on, and hangs up after it."""
    size = len(LAYER)

    def part(start: int) -> bytes:
        with connected(node) as connection:
            answer = CONTAINERD.open(connection, LAYER, f"{start}-")
            assert answer.status == 206, "otherwise containerd reads on one connection"
            assert answer.getheader("Content-Range") == f"bytes {start}-{size - 1}/{size}"
            assert answer.getheader("Content-Length") == str(size - start)
            return answer.read(FETCH_BUFFER)

    with ThreadPoolExecutor(parallel) as pool:
        assert b"".join(pool.map(part, range(0, size, FETCH_BUFFER))) == LAYER
    again = proxy.count.received - size
    assert again <= parallel * 2 * BLOCK_SIZE, "a block is read again if its last reader hung up during the read"
    assert quiet(node)


def test_after_containerd_2_1_gives_up_at_most_the_read_ahead_is_read(folder: Path) -> None:
    size, parallel = 1 << 30, 4
    with FaultyOrigin(size, hashed=False) as origin, site(folder / "site", origin.url, 1) as (node,):
        target = f"/v2/app/blobs/{origin.digest}?ns={UPSTREAM}"

        def part(start: int) -> bytes:
            with connected(node) as connection:
                answer = ask(connection, "GET", target, [("Range", f"bytes={start}-")])
                assert (answer.status, answer.getheader("Content-Range")) == (206, f"bytes {start}-{size - 1}/{size}")
                return answer.read(FETCH_BUFFER)

        with ThreadPoolExecutor(parallel) as pool:
            assert b"".join(pool.map(part, range(0, 8 * FETCH_BUFFER, FETCH_BUFFER))) == content(0, 8 * FETCH_BUFFER)
        with connected(node) as connection:
            last = ask(connection, "GET", target, [("Range", f"bytes={size - 1}-")])
            assert last.read() == content(size - 1, size)  # waits for its turn behind the reads in progress
        assert origin.asked_bytes <= 8 * FETCH_BUFFER + HELD * BLOCK_SIZE
        assert quiet(node)


def test_containerd_hands_over_to_the_registry_in_the_middle_of_a_layer(
    node: Node, proxy: CountingProxy, registry: Registry
) -> None:
    """After an early end containerd requests the rest, first here. After a 503 it asks the next host."""
    proxy.rate = 4e6
    with connected(node) as connection:
        answer = CONTAINERD.open(connection, LAYER)
        got = answer.read(2 * BLOCK_SIZE)
        proxy.cut()
        with pytest.raises(http.client.IncompleteRead) as ended:  # FIN; a reset would be a ConnectionResetError
            answer.read()
        got += ended.value.partial
    assert len(got) < len(LAYER)
    with connected(node) as connection:
        refused = CONTAINERD.open(connection, LAYER, f"{len(got)}-")
        assert (refused.status, json.load(refused)["errors"][0]["code"]) == (503, "UNAVAILABLE")
    with contextlib.closing(http.client.HTTPConnection(registry.host, registry.port, timeout=60)) as connection:
        rest = CONTAINERD.open(connection, LAYER, f"{len(got)}-")
        assert (rest.status, got + rest.read()) == (206, LAYER)


def test_containerd_asks_the_next_host_for_missing_objects(node: Node) -> None:
    with connected(node) as connection:
        for target, code in (
            (CONTAINERD.target(f"blobs/{digest_of(b'nobody has this')}"), "BLOB_UNKNOWN"),
            (CONTAINERD.target("manifests/no-such-tag"), "MANIFEST_UNKNOWN"),
            (f"/v2/{REPOSITORY}/manifests/oci?ns=unknown.test", "NAME_UNKNOWN"),
        ):
            answer = ask(connection, "GET", target, CONTAINERD.manifests)
            assert (answer.status, json.load(answer)["errors"][0]["code"]) == (404, code)


@pytest.mark.parametrize(
    ("faults", "status"),
    [([Fault(0, "429", 1), Fault(0, "408"), Fault(5 * BLOCK_SIZE, "429")], 200), ([Fault(0, "429", 3600)], 503)],
    ids=["some", "much"],
)
def test_only_a_short_pause_of_a_registry_is_waited_for(folder: Path, faults: list[Fault], status: int) -> None:
    """If the registry asks for a long pause, the mirror answers 503 at once, so that containerd asks the next host.

    After a 408 or 429 containerd would ask the same host five times.
    """
    size = 24 * BLOCK_SIZE
    with (
        FaultyOrigin(size, *faults) as origin,
        site(folder / "site", origin.url, 1) as (node,),
        connected(node) as connection,
    ):
        answer = ask(connection, "GET", f"/v2/app/blobs/{origin.digest}?ns={UPSTREAM}", CONTAINERD.blobs)
        body = answer.read()
        assert answer.status == status
        if status == 200:
            assert body == content(0, size)
        else:
            (error,) = json.loads(body)["errors"]
            assert error["code"] == "UNAVAILABLE"
            assert "no data within" not in error["message"], "the mirror did not wait for the registry"


def test_kubelets_secret_gives_access_as_at_the_registry(folder: Path, stored: Path, tmp_path: Path) -> None:
    """containerd with an imagePullSecret: a 401, a token from the challenge's realm, and the token in every request."""
    with contextlib.ExitStack() as stack:
        tokens = stack.enter_context(TokenServer(tmp_path, {"pod": "secret"}, {"pod": [REPOSITORY]}))
        guarded = stack.enter_context(registries.docker_registry(stored, auth=tokens.registry_auth()))
        (node,) = stack.enter_context(site(folder / "site", guarded.url, 1, upstream=HUB))
        connection = stack.enter_context(connected(node))
        tag = CONTAINERD.target(f"manifests/{OCI.tag}")
        asked = ask(connection, "HEAD", tag, CONTAINERD.manifests)
        asked.read()
        challenge = asked.getheader("WWW-Authenticate", "")
        assert (asked.status, challenge.startswith("Bearer ")) == (401, True)
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        query = {"service": fields["service"], "scope": fields["scope"]}
        token = httpx.get(fields["realm"], params=query, auth=("pod", "secret"), trust_env=False).json()["token"]
        bearer = ("Authorization", f"Bearer {token}")
        whole, manifest, octets = OCI.whole(), OCI.manifest_of(LAYER), "application/octet-stream"
        check("HEAD", connection, tag, [*CONTAINERD.manifests, bearer], kind=OCI.index, data=whole)
        for path, data, kind in (
            ("manifests", whole, OCI.index),
            ("manifests", manifest, OCI.manifest),
            ("blobs", CONFIG, octets),
            ("blobs", LAYER, octets),
        ):
            target = CONTAINERD.target(f"{path}/{digest_of(data)}")
            check("GET", connection, target, [*CONTAINERD.manifests, bearer], kind=kind, data=data)
            refused = ask(connection, "GET", target, CONTAINERD.manifests)
            assert (refused.status, refused.getheader("WWW-Authenticate")) == (401, challenge)
            refused.read()


def test_podman_reads_parts_of_a_zstd_chunked_layer(node: Node, proxy: CountingProxy) -> None:
    """It reads the footer, the table of contents with the tar-split data, and missing parts, all by absolute ranges.

    It fails if there is one part too few or too many, and expects the parts in the order of its ranges.
    """
    size = len(LAYER)
    footer, table = [(size - 72, size)], [(size - 50_000, size - 9000), (size - 9000, size - 72)]
    few = [(start, start + 700) for start in range(5 * BLOCK_SIZE, 7 * BLOCK_SIZE, 5000)]
    for spans in (footer, table, few):
        assert parts_of(node, spans) == [LAYER[start:stop] for start, stop in spans]
    blocks = {position // BLOCK_SIZE for span in footer + table + few for position in (span[0], span[1] - 1)}
    assert proxy.count.received <= len(blocks) * BLOCK_SIZE + 10_000
    assert parts_of(node, [*few[:3], (size - 1000, None)])[-1] == LAYER[-1000:]
    many = [(start, start + 900) for start in range(0, size, size // PODMANS_RANGES)][:PODMANS_RANGES]
    assert parts_of(node, many) == [LAYER[start:stop] for start, stop in many]
    with connected(node) as connection:
        answer = PODMAN.open(connection, LAYER, ranges([*many, (size - 100, size)]))
        assert (answer.status, answer.read()) == (200, LAYER), "Podman then reads its parts from the whole layer"
    assert quiet(node)


def parts_of(node: Node, spans: Sequence[tuple[int, int | None]]) -> list[bytes]:
    with connected(node) as connection:
        answer = PODMAN.open(connection, LAYER, ranges(spans))
        assert answer.status == 206
        body = answer.read()
        assert answer.getheader("Content-Length") == str(len(body))
    if len(spans) == 1:
        assert answer.getheader("Content-Range") == content_range(*spans[0])
        return [body]
    kind = re.fullmatch(r"multipart/byteranges; boundary=([A-Za-z0-9-]{1,70})", answer.getheader("Content-Type", ""))
    assert kind is not None
    parts = list(multipart(body, kind[1].encode()))
    assert [field for field, _ in parts] == [content_range(*span) for span in spans]
    return [data for _, data in parts]


def ranges(spans: Sequence[tuple[int, int | None]]) -> str:
    return ",".join(f"{start}-{'' if stop is None else stop - 1}" for start, stop in spans)


def content_range(start: int, stop: int | None) -> str:
    return f"bytes {start}-{(stop or len(LAYER)) - 1}/{len(LAYER)}"


def multipart(body: bytes, boundary: bytes) -> Iterator[tuple[str, bytes]]:
    """The Content-Range and the data of each part (RFC 2046, 5.1.1; RFC 9110, 14.6)."""
    before, *parts, after = (b"\r\n" + body.removeprefix(b"\r\n")).split(b"\r\n--" + boundary)
    assert (before, after.strip()) == (b"", b"--")
    for part in parts:
        head, _, data = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        assert fields["Content-Type"] == "application/octet-stream"
        yield fields["Content-Range"], data


def quiet(node: Node) -> bool:
    """The node logged no warning and no error."""
    assert not re.findall("level=(?:warning|error).*|Traceback.*", tail(node.log, 10_000))
    return True
