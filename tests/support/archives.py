"""Image archives for tests, built from a description. A test can change their files before they are packed."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field

from node.oci.layout import IMAGE_NAME
from tests.support.image import CONFIG, INDEX, LAYER, MANIFEST

Files = dict[str, bytes]


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def blob_path(name: str) -> str:
    return "blobs/" + name.replace(":", "/")


@dataclass
class Layout:
    """The files of an OCI layout, to pack in any form."""

    files: Files = field(default_factory=lambda: {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'})
    roots: list[dict[str, object]] = field(default_factory=list)

    def blob(self, data: bytes, media_type: str, algorithm: str = "sha256", **more: object) -> dict[str, object]:
        name = digest(data, algorithm)
        self.files[blob_path(name)] = data
        return {"mediaType": media_type, "digest": name, "size": len(data), **more}

    def document(self, media_type: str, **fields: object) -> dict[str, object]:
        return self.blob(json.dumps({"schemaVersion": 2, "mediaType": media_type, **fields}).encode(), media_type)

    def manifest(self, layers: Iterable[bytes], architecture: str, algorithm: str = "sha256") -> dict[str, object]:
        config = self.blob(json.dumps({"architecture": architecture, "os": "linux"}).encode(), CONFIG)
        blobs = [self.blob(data, LAYER, algorithm) for data in layers]
        made = self.document(MANIFEST, config=config, layers=blobs)
        return {**made, "platform": {"os": "linux", "architecture": architecture}}

    def index(self, manifests: list[dict[str, object]]) -> dict[str, object]:
        return self.document(INDEX, manifests=manifests)

    def name(self, root: dict[str, object], name: str) -> None:
        self.roots.append({**root, "annotations": {IMAGE_NAME: name}})
        self.files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": self.roots}).encode()

    def pack(self, form: int = tarfile.PAX_FORMAT, before: str = "", folders: bool = False) -> bytes:
        """A tar file by Python's writer, not by the writer under test."""
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w", format=form) as tar:
            if folders:
                for name in ("blobs", "blobs/sha256"):
                    info = tarfile.TarInfo(before + name)
                    info.type = tarfile.DIRTYPE
                    tar.addfile(info)
            for name, data in self.files.items():
                info = tarfile.TarInfo(before + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return target.getvalue()


def small(name: str = "origin.test/demo/app:v1") -> Layout:
    """Two platforms that share a layer."""
    layout = Layout()
    manifests = [layout.manifest([b"shared", machine.encode() * 500], machine) for machine in ("amd64", "arm64")]
    layout.name(layout.index(manifests), name)
    return layout
