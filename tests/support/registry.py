"""A real registry (Debian's docker-registry) on loopback, and a small read-only registry that replaces it."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tests.support.image import Blob, Image, blob_path
from tests.support.lab import Namespace
from tests.support.processes import free_ports, running, tail, wait_for

HOST = "127.0.0.1"

CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {root}}}
http:
  addr: {host}:{port}
{auth}"""


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry that answers at `host:port`."""

    kind: str
    host: str
    port: int
    pid: int = 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def installed() -> bool:
    return shutil.which("docker-registry") is not None


@contextlib.contextmanager
def docker_registry(folder: Path, namespace: Namespace | None = None, *, auth: str = "") -> Iterator[Registry]:
    """A docker-registry that keeps its data in `folder`. It ends with the context.

    `auth` is the part of its configuration about access. Without it every client may read and write.
    """
    (port,) = free_ports(HOST, 1)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yml"
    config.write_text(CONFIG.format(root=folder / "data", host=HOST, port=port, auth=auth))
    command = [*(namespace.prefix if namespace else ()), "docker-registry", "serve", config]
    with _answering(Registry("docker-registry", HOST, port), command, folder, namespace) as registry:
        yield registry


@contextlib.contextmanager
def embedded_origin(image: Image, repository: str, tag: str, folder: Path) -> Iterator[Registry]:
    """One image served by tests/support/origin.py in a process of its own."""
    (port,) = free_ports(HOST, 1)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.support.origin", str(port), str(image.folder), repository, tag]
    with _answering(Registry("embedded origin", HOST, port), command, folder) as registry:
        yield registry


@contextlib.contextmanager
def _answering(
    registry: Registry, command: Sequence[str | Path], folder: Path, namespace: Namespace | None = None
) -> Iterator[Registry]:
    log = folder / "log"
    with running(command, log) as process:

        def ready() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"{registry.kind} ended with {process.returncode}:\n{tail(log)}")
            try:
                with (
                    namespace.entered() if namespace else contextlib.nullcontext(),
                    urllib.request.urlopen(f"{registry.url}/v2/", timeout=1) as response,
                ):
                    return bool(response.status == 200)
            except urllib.error.HTTPError as error:
                return error.code == 401
            except OSError:
                return False

        wait_for(f"{registry.kind} answers", ready)
        yield replace(registry, pid=process.pid)


def push(registry: Registry, image: Image, repository: str, tag: str) -> None:
    """Push an image by monolithic uploads (OCI distribution specification, "Pushing a blob monolithically")."""
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=60)
    with contextlib.closing(connection):
        for blob in image.blobs:
            _push_blob(connection, image, repository, blob)
        for blob, reference in ((image.manifest, image.manifest.digest), (image.index, tag)):
            headers = {"Content-Type": blob.media_type}
            body = blob_path(image.folder, blob.digest).read_bytes()
            _send(connection, "PUT", f"/v2/{repository}/manifests/{reference}", body=body, headers=headers)


def push_manifest(registry: Registry, repository: str, tag: str, manifest: bytes, *blobs: bytes) -> None:
    """Push a manifest, and the blobs that it names."""
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=60)
    with contextlib.closing(connection):
        for blob in blobs:
            _upload(connection, repository, f"sha256:{sha256(blob).hexdigest()}", blob, len(blob))
        headers = {"Content-Type": json.loads(manifest)["mediaType"]}
        _send(connection, "PUT", f"/v2/{repository}/manifests/{tag}", body=manifest, headers=headers)


def _push_blob(connection: http.client.HTTPConnection, image: Image, repository: str, blob: Blob) -> None:
    with image.path(blob).open("rb") as file:
        _upload(connection, repository, blob.digest, file, blob.size)


def _upload(
    connection: http.client.HTTPConnection, repository: str, digest: str, body: bytes | BinaryIO, size: int
) -> None:
    upload = urlsplit(_send(connection, "POST", f"/v2/{repository}/blobs/uploads/", body=b""))
    query = f"{upload.query}&" if upload.query else ""
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
    _send(connection, "PUT", f"{upload.path}?{query}digest={digest}", body=body, headers=headers)


def _send(connection: http.client.HTTPConnection, method: str, path: str, **request: Any) -> str:
    """Send a request with `body` and `headers`. Returns the Location of the answer."""
    connection.request(method, path, **request)
    response = connection.getresponse()
    text = response.read()
    if response.status not in (201, 202):
        raise AssertionError(f"{method} {path}: {response.status} {text[:300]!r}")
    return response.getheader("Location", "")
