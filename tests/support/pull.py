"""Pull an image with skopeo or with the small verifying client below, and check the digest of every file it wrote.

`python -m tests.support.pull http://HOST:PORT/REPOSITORY REFERENCE FOLDER` writes the same files as
`skopeo copy ... dir:FOLDER`: manifest.json, and a file for each blob, named by its hex digest.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.image import ARCHITECTURE, INDEX, MANIFEST, Image
from tests.support.leftovers import ended_with_the_run
from tests.support.processes import tail, terminate

TIMEOUT_S = 120.0
CONNECTIONS = 6
"""Blobs fetched at once, the default of skopeo."""
CHUNK = 1 << 20


class PullFailedError(AssertionError):
    """The client reported an error, or the files that it wrote are not the image."""


class Pull:
    """A running client process."""

    def __init__(self, command: Sequence[str | Path], folder: Path, env: Mapping[str, str] | None = None) -> None:
        """`command` writes the image to `folder`, and its messages to `folder`.log."""
        self.folder = folder
        self.seconds = 0.0
        self._log = folder.with_suffix(".log")
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        ended_with_the_run(self._process)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def written(self) -> int:
        """Bytes in the folder now, skopeo's unfinished files included."""
        try:
            return sum(entry.stat().st_size for entry in os.scandir(self.folder))
        except FileNotFoundError:
            return 0

    def wait(self, timeout: float = TIMEOUT_S) -> float:
        """Returns the seconds since the start. Raises PullFailedError with the client's last messages."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            terminate(self._process)
            raise PullFailedError(f"not within {timeout:g} s:\n{tail(self._log)}") from error
        self.seconds = time.monotonic() - self._started
        if status:
            raise PullFailedError(f"exit status {status}:\n{tail(self._log)}")
        return self.seconds


def wait_all(pulls: list[Pull]) -> list[float]:
    """Wait for all pulls at the same time. Returns the seconds that each took."""
    with ThreadPoolExecutor(len(pulls)) as pool:
        return list(pool.map(Pull.wait, pulls))


def pull_with_skopeo(
    base: str, repository: str, reference: str, folder: Path, *, registries_conf: Path | None = None
) -> Pull:
    """`base` is `http://host:port` of a mirror or a registry; with `registries_conf` it is a registry's name."""
    separator = "@" if ":" in reference else ":"
    source = f"docker://{base.removeprefix('http://')}/{repository}{separator}{reference}"
    options = ["--insecure-policy", "--override-os=linux", f"--override-arch={ARCHITECTURE}"]
    if registries_conf:
        options.append(f"--registries-conf={registries_conf}")
    return Pull(["skopeo", *options, "copy", "--quiet", "--src-tls-verify=false", source, f"dir:{folder}"], folder)


def pull_built_in(base: str, repository: str, reference: str, folder: Path) -> Pull:
    return Pull([sys.executable, "-m", "tests.support.pull", f"{base}/{repository}", reference, folder], folder)


TOOLS: Mapping[str, Callable[[str, str, str, Path], Pull]] = {"skopeo": pull_with_skopeo, "built-in": pull_built_in}


def best_tool() -> str:
    return "skopeo" if shutil.which("skopeo") else "built-in"


def verify(folder: Path, image: Image) -> int:
    """Hash all files of a pulled folder, and compare them with the image. Returns the number of bytes verified."""
    manifest = (folder / "manifest.json").read_bytes()
    _expect(manifest, image.manifest.digest)
    total = len(manifest)
    for blob in image.blobs:
        path = folder / blob.digest.removeprefix("sha256:")
        if not path.exists():
            raise PullFailedError(f"{folder}: {blob.digest} is missing")
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != blob.digest.removeprefix("sha256:") or path.stat().st_size != blob.size:
            raise PullFailedError(f"{folder}: {blob.digest} has the bytes of sha256:{actual}")
        total += blob.size
    return total


def _expect(data: bytes, digest: str) -> None:
    actual = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if actual != digest:
        raise PullFailedError(f"the manifest: {actual} instead of {digest}")


def fetch(base: str, reference: str, folder: Path) -> None:
    """The built-in client: follows an index to this platform's manifest, then reads all blobs and verifies them."""
    folder.mkdir(parents=True, exist_ok=True)
    url = urlsplit(base)
    manifest = _manifest(url.netloc, url.path, reference)
    document = json.loads(manifest)
    if document["mediaType"] == INDEX:
        wanted = next(entry for entry in document["manifests"] if entry["platform"]["architecture"] == ARCHITECTURE)
        manifest = _manifest(url.netloc, url.path, wanted["digest"])
        document = json.loads(manifest)
    (folder / "manifest.json").write_bytes(manifest)
    blobs = [document["config"], *document["layers"]]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda blob: _blob(url.netloc, url.path, blob, folder), blobs))


def _manifest(host: str, repository: str, reference: str) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/v2{repository}/manifests/{reference}", headers={"Accept": f"{INDEX}, {MANIFEST}"})
    response = connection.getresponse()
    data = response.read()
    if response.status != 200:
        raise PullFailedError(f"manifest {reference}: {response.status} {data[:300]!r}")
    if ":" in reference:
        _expect(data, reference)
    return data


def _blob(host: str, repository: str, blob: dict[str, Any], folder: Path) -> None:
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/v2{repository}/blobs/{blob['digest']}")
    response = connection.getresponse()
    if response.status != 200:
        raise PullFailedError(f"blob {blob['digest']}: {response.status} {response.read(300)!r}")
    digest = hashlib.sha256()
    with (folder / blob["digest"].removeprefix("sha256:")).open("wb") as file:
        while chunk := response.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
    if f"sha256:{digest.hexdigest()}" != blob["digest"]:
        raise PullFailedError(f"{blob['digest']} has the bytes of sha256:{digest.hexdigest()}")


if __name__ == "__main__":
    try:
        fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except (PullFailedError, OSError, http.client.HTTPException) as error:
        sys.exit(f"{type(error).__name__}: {error}")
