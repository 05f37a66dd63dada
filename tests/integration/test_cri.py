"""containerd pulls as in Kubernetes: through CRI, with the registry configuration of its config_path."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from tests.support import image as images
from tests.support import registry as registries
from tests.support.containerd import Containerd, containerd
from tests.support.cri import ImageService, image_service
from tests.support.image import Image
from tests.support.processes import wait_for
from tests.support.proxy import CountingProxy
from tests.support.registry import Registry
from tests.support.site import UPSTREAM, site
from tests.support.token_server import TokenServer

REPOSITORY, TAG = "cri/app", "v1"
NAME = f"{UPSTREAM}/{REPOSITORY}"
FOREIGN = "s390x" if images.ARCHITECTURE != "s390x" else "amd64"
NOWHERE = "http://127.0.0.1:9"
"""The discard port does not answer: an image pulled with this registry came through the mirror."""
UPLINK = 10_000_000
"""Bytes per second, so that a pull lasts long enough to be interrupted."""
PRIVATE_BYTES = 5_000_000
MAX_COPIES = 1.05
ALICE, BOB = "alice", "bob"
PASSWORDS = {ALICE: "correct-horse-battery", BOB: "bobs-own-password"}

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="containerd needs root"),
    pytest.mark.skipif(shutil.which("containerd") is None, reason="Debian package containerd is not installed"),
    pytest.mark.skipif(not registries.installed(), reason="Debian package docker-registry is not installed"),
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Image:
    layer = [("opt/foreign", images.noise(2, 100_000))]
    return images.build(tmp_path_factory.mktemp("foreign") / "layout", [layer], architecture=FOREIGN)


@pytest.fixture(scope="module")
def both(image: Image, foreign: Image) -> Image:
    return images.with_platforms_of(image, foreign)


@pytest.fixture(scope="module")
def stored(registry: Registry, both: Image, foreign: Image) -> Registry:
    registries.push(registry, foreign, REPOSITORY, "foreign")
    registries.push(registry, both, REPOSITORY, TAG)
    return registry


@contextmanager
def cri(folder: Path, mirror: str, server: str = NOWHERE) -> Iterator[tuple[Containerd, ImageService]]:
    with containerd(folder) as engine, image_service(engine.socket) as service:
        engine.use_mirror(UPSTREAM, server, mirror)
        yield engine, service


def digests_of(engine: Containerd) -> set[str]:
    """The digests in the content store, after every blob was hashed."""
    paths = list((engine.content_store / "blobs" / "sha256").iterdir())
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in paths)
    return {f"sha256:{path.name}" for path in paths}


def ingested(engine: Containerd) -> int:
    """Bytes of all blobs that are being downloaded."""
    total = 0
    for path in (engine.content_store / "ingest").glob("*/data"):
        with suppress(FileNotFoundError):  # the blob has just become complete
            total += path.stat().st_size
    return total


def all_of(image: Image) -> set[str]:
    return {blob.digest for blob in (image.index, image.manifest, *image.blobs)}


def test_kubelets_pull_by_tag_and_by_digest_reads_one_copy_for_two_nodes(
    folder: Path, both: Image, foreign: Image, stored: Registry
) -> None:
    by = (f"{NAME}:{TAG}", f"{NAME}@{both.index.digest}")
    with ExitStack() as stack:
        proxy = stack.enter_context(CountingProxy(stored.host, stored.port))
        nodes = stack.enter_context(site(folder / "site", proxy.url, 2))
        engines = [stack.enter_context(cri(folder / node.name, node.mirror)) for node in nodes]
        with ThreadPoolExecutor(2) as pool:
            ids = list(pool.map(lambda engine, reference: engine[1].pull(reference), engines, by))
        assert ids == [both.config.digest] * 2
        assert proxy.count.received <= MAX_COPIES * both.size, proxy.count.asked.most_common(5)
        assert not any(foreign.layers[0].digest in asked for asked in proxy.count.asked)
        for (engine, service), reference in zip(engines, by, strict=True):
            assert digests_of(engine) == all_of(both)
            (listed,) = service.images()
            assert service.status(reference) == listed
            assert (listed.id, listed.digests) == (both.config.digest, (by[1],))
            assert listed.tags == ((by[0],) if reference == by[0] else ())
            service.remove(reference)
            assert (service.status(reference), service.images()) == (None, [])


def test_a_pull_continues_from_the_registry_when_p2pd_is_killed_and_needs_no_p2pd(
    folder: Path, both: Image, stored: Registry
) -> None:
    with ExitStack() as stack:
        uplink = stack.enter_context(CountingProxy(stored.host, stored.port, rate=UPLINK))
        registry = stack.enter_context(CountingProxy(stored.host, stored.port))
        (node,) = stack.enter_context(site(folder / "site", uplink.url, 1))
        engine, service = stack.enter_context(cri(folder / "engine", node.mirror, registry.url))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        quarter = both.size // 4
        pull = pool.submit(service.pull, f"{NAME}:{TAG}")
        held = wait_for("a part of the image is pulled", lambda: max(0, ingested(engine) - quarter)) + quarter
        node.kill()
        assert pull.result() == both.config.digest
        assert digests_of(engine) == all_of(both)
        assert 0 < registry.count.received < 1.01 * both.size - held, "held bytes are not read again"
        service.remove(f"{NAME}:{TAG}")
        assert service.pull(f"{NAME}:{TAG}") == both.config.digest


def test_only_pods_with_the_right_secret_get_a_private_image(folder: Path, tmp_path: Path) -> None:
    """This also holds when the node has the image cached. kubelet passes each pod's imagePullSecret with the pull."""
    secret = images.build(folder / "layout", [[("opt/secret", images.noise(3, PRIVATE_BYTES))]])
    with ExitStack() as stack:
        tokens = stack.enter_context(TokenServer(tmp_path, PASSWORDS, {ALICE: [REPOSITORY]}))
        with registries.docker_registry(folder / "registry") as open_to_all:
            registries.push(open_to_all, secret, REPOSITORY, TAG)
        guarded = stack.enter_context(registries.docker_registry(folder / "registry", auth=tokens.registry_auth()))
        proxy = stack.enter_context(CountingProxy(guarded.host, guarded.port))
        nodes = stack.enter_context(site(folder / "site", proxy.url, 2))
        services = [stack.enter_context(cri(folder / f"engine-{node.name}", node.mirror))[1] for node in nodes]
        for service in services:
            assert all(is_refused(service, auth) for auth in useless(tokens))
            for auth in (
                {"username": ALICE, "password": PASSWORDS[ALICE]},
                {"auth": base64.b64encode(f"{ALICE}:{PASSWORDS[ALICE]}".encode()).decode()},
                {"identity_token": tokens.identities[ALICE]},
            ):
                assert service.pull(f"{NAME}:{TAG}", auth) == secret.config.digest
                service.remove(f"{NAME}:{TAG}")
        for service in services:
            assert all(is_refused(service, auth) for auth in useless(tokens))
        assert proxy.count.received <= MAX_COPIES * secret.size, proxy.count.asked.most_common(5)


def useless(tokens: TokenServer) -> list[dict[str, str]]:
    """No credentials, a wrong password, and right credentials of a user without permission."""
    return [
        {},
        {"username": ALICE, "password": "guess-of-mallory"},
        {"username": BOB, "password": PASSWORDS[BOB]},
        {"identity_token": tokens.identities[BOB]},
    ]


def is_refused(service: ImageService, auth: dict[str, str]) -> bool:
    with pytest.raises(grpc.RpcError, match=r"status code .*: 401|failed to authorize"):
        service.pull(f"{NAME}:{TAG}", auth)
    return service.images() == []
