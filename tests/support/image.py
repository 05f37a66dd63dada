"""Real images built from file trees of this machine, as OCI layouts. The same files give the same bytes.

Format: OCI image specification 1.1 (image layout, index, manifest, config). Layers are tar+gzip, sorted by path, with
fixed owner, time and gzip header.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import random
import re
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
GZIP_LEVEL = 1
"""The layers need not be small, and level 1 compresses 100 MB in seconds."""

NOISE_CHUNK = 1 << 27
"""The random module makes at most 256 MiB in one call."""

Entry = tuple[str, Path | bytes]
"""A path inside the layer, and its content: a file of this machine, or bytes."""


@dataclass(frozen=True, slots=True)
class Blob:
    digest: str
    size: int
    media_type: str

    def descriptor(self) -> dict[str, object]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True, slots=True)
class Image:
    """An OCI layout in `folder`. The tag names `index`, which lists `manifest`, which lists config and layers."""

    folder: Path
    index: Blob
    manifest: Blob
    config: Blob
    layers: tuple[Blob, ...]

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (self.config, *self.layers)

    @property
    def size(self) -> int:
        """Bytes that a client of this platform reads, manifests included."""
        return sum(blob.size for blob in (self.index, self.manifest, *self.blobs))

    def path(self, blob: Blob) -> Path:
        return blob_path(self.folder, blob.digest)


def blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


class _Hashing(io.RawIOBase):
    """A writable file that hashes the bytes written through it."""

    def __init__(self, target: IO[bytes] | gzip.GzipFile) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._target = target

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.sha256.update(data)
        self.size += len(data)
        self._target.write(data)
        return len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self.sha256.hexdigest()}"


def build(folder: Path, layers: Sequence[Iterable[Entry]], *, architecture: str = ARCHITECTURE) -> Image:
    """Write an image to the new `folder`. Each of `layers` lists the files of a layer."""
    (folder / "blobs" / "sha256").mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda numbered: _write_layer(folder, *numbered), enumerate(layers)))
    blobs = tuple(blob for blob, _ in made)
    config = _write_json(
        folder,
        CONFIG,
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in made]},
        },
    )
    manifest = _write_json(
        folder,
        MANIFEST,
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(),
            "layers": [blob.descriptor() for blob in blobs],
        },
    )
    listed = {**manifest.descriptor(), "platform": {"architecture": architecture, "os": "linux"}}
    index = _write_index(folder, [listed])
    shutil.copyfile(blob_path(folder, index.digest), folder / "index.json")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return Image(folder, index, manifest, config=config, layers=blobs)


def with_platforms_of(image: Image, *others: Image) -> Image:
    """The image with an index that also lists the platforms of the others, after its own."""
    indexes = [json.loads(listing.path(listing.index).read_bytes()) for listing in (image, *others)]
    return replace(image, index=_write_index(image.folder, [row for index in indexes for row in index["manifests"]]))


def _write_index(folder: Path, listed: Sequence[dict[str, object]]) -> Blob:
    return _write_json(folder, INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": listed})


def _write_json(folder: Path, media_type: str, document: dict[str, object]) -> Blob:
    data = json.dumps(document, sort_keys=True).encode()
    blob = Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), media_type)
    blob_path(folder, blob.digest).write_bytes(data)
    return blob


def _write_layer(folder: Path, number: int, entries: Iterable[Entry]) -> tuple[Blob, str]:
    """Returns the layer's descriptor, and the digest of its tar."""
    unnamed = folder / f"layer-{number}"
    with unnamed.open("wb") as file:
        packed = _Hashing(file)
        with gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=packed, mtime=0) as zipped:
            plain = _Hashing(zipped)
            with tarfile.open(fileobj=plain, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 20) as tar:
                _add(tar, sorted(entries, key=lambda entry: entry[0]))
    unnamed.rename(blob_path(folder, packed.digest))
    return Blob(packed.digest, packed.size, LAYER), plain.digest


def _add(tar: tarfile.TarFile, entries: Iterable[Entry]) -> None:
    folders: set[str] = set()
    for name, source in entries:
        for parent in reversed(Path(name).parents[:-1]):
            if str(parent) not in folders:
                folders.add(str(parent))
                info = tarfile.TarInfo(str(parent))
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
        _add_file(tar, name, source)


def _add_file(tar: tarfile.TarFile, name: str, source: Path | bytes) -> None:
    info = tarfile.TarInfo(name)
    if isinstance(source, bytes):
        info.size, info.mode = len(source), 0o644
        tar.addfile(info, io.BytesIO(source))
        return
    if source.is_symlink():
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(source)
        tar.addfile(info)
        return
    try:
        with source.open("rb") as file:
            status = os.fstat(file.fileno())
            info.size, info.mode = status.st_size, stat.S_IMODE(status.st_mode)
            tar.addfile(info, file)
    except FileNotFoundError:
        return  # a file of the running machine may disappear while the tree is read


def tree(root: Path, inside: str, keep: Callable[[Path], bool] = lambda _: True) -> Iterator[Entry]:
    """Every file and symbolic link under `root`, with the path `inside/...`."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if keep(path) and (path.is_symlink() or path.is_file()):
                yield f"{inside}/{path.relative_to(root)}", path


def noise(seed: int, size: int) -> bytes:
    """Incompressible bytes, the same for the same seed."""
    rng = random.Random(seed)
    return b"".join(rng.randbytes(min(NOISE_CHUNK, size - start)) for start in range(0, size, NOISE_CHUNK))


def _dpkg(*arguments: str) -> str:
    return subprocess.run(["dpkg-query", *arguments], check=True, capture_output=True, text=True).stdout


def debian_root() -> Iterator[Entry]:
    """The minimal Debian system of this machine: the required packages and all their dependencies."""
    depends: dict[str, set[str]] = {}
    wanted: list[str] = []
    for line in _dpkg("-W", "-f", "${Package}\t${Priority}\t${Pre-Depends}, ${Depends}\n").splitlines():
        name, priority, needs = line.split("\t")
        depends[name] = set(re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]+)", needs))
        if priority == "required":
            wanted.append(name)
    chosen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in depends and name not in chosen:
            chosen.add(name)
            wanted.extend(depends[name])
    yield from _root_of(_dpkg("-L", *sorted(chosen)).splitlines())


def shell_root() -> Iterator[Entry]:
    """A minimal root file system that runs a shell: this machine's sh, cat and uname, and the libraries they load."""
    programs = ["/bin/sh", "/bin/cat", "/bin/uname"]
    listing = subprocess.run(["ldd", *programs], check=True, capture_output=True, text=True).stdout
    for path in {*programs, *re.findall(r"(/\S+\.so\S*) \(", listing)}:
        yield _merged_usr(path), Path(path).resolve()
    yield from _links()
    yield "etc/os-release", Path("/etc/os-release").resolve()


def _root_of(paths: Iterable[str]) -> Iterator[Entry]:
    seen = {"bin", "lib", "sbin", "lib64"}
    yield from _links()
    for path in paths:
        name = _merged_usr(path)
        source = Path(path)
        if path.startswith("/") and name not in seen and (source.is_symlink() or source.is_file()):
            seen.add(name)
            yield name, source


def _links() -> Iterator[Entry]:
    """Debian's merged /usr: /bin, /lib and /sbin are links into it."""
    for name in ("bin", "sbin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            yield name, Path("/", name)


def _merged_usr(path: str) -> str:
    first = path.split("/", 2)[1] if path.count("/") > 1 else ""
    merged = first in ("bin", "sbin", "lib", "lib64") and Path("/", first).is_symlink()
    return f"usr{path}" if merged else path.lstrip("/")
