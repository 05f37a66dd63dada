"""Manifests of an attacker in the files of a docker-registry, which checks manifests only when they are pushed.

They stand for those that some registry accepts: one that does not look for the blobs, or reads the JSON in another way.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def plant(folder: Path, repository: str, tag: str, body: bytes) -> str:
    """Write a manifest with a tag to the data of the registry in `folder`. Returns its digest."""
    hexadecimal = hashlib.sha256(body).hexdigest()
    root = folder / "data" / "docker" / "registry" / "v2"
    manifests = root / "repositories" / repository / "_manifests"
    _write(root / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal / "data", body)
    link = f"sha256:{hexadecimal}".encode()
    _write(manifests / "revisions" / "sha256" / hexadecimal / "link", link)
    _write(manifests / "tags" / tag / "current" / "link", link)
    _write(manifests / "tags" / tag / "index" / "sha256" / hexadecimal / "link", link)
    return link.decode()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
