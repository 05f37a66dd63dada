"""Image manifests and indexes: parsing, media types, descriptors.

Formats: OCI image specification 1.1, and Docker's manifests (schemas 1 and 2), which share the fields that are read
here. A manifest is sent by a registry or a member, so its entries are bounded, and checked before use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.errors import UNDECODABLE, BadInputError
from protocol.ids import Digest, ObjectRef

log = logging.getLogger(__name__)

MAX_MANIFEST = 4 << 20
"""Bytes. containerd accepts no larger manifests."""
MAX_MANIFEST_ENTRIES = 1024
MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}", re.ASCII)
UNTYPED = "application/octet-stream"
_OCI, _DOCKER = "application/vnd.oci.image", "application/vnd.docker.distribution.manifest"
_TYPES = {
    "manifests": (f"{_OCI}.index.v1+json", f"{_DOCKER}.list.v2+json"),
    "layers": (f"{_OCI}.manifest.v1+json", f"{_DOCKER}.v2+json"),
    "schema 1": (f"{_DOCKER}.v1+prettyjws", f"{_DOCKER}.v1+json"),
}
"""By a field that a manifest contains: the media types that it may have if it has no `mediaType`."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The descriptor for a tag or a digest. `age_s` is the time since the registry last confirmed it."""

    ref: ObjectRef
    media_type: str
    age_s: float = 0.0


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True):
    """The fields of a manifest or an index that name other objects."""

    config: _Descriptor | None = None
    layers: tuple[_Descriptor, ...] = ()
    manifests: tuple[_Descriptor, ...] = ()


def parse_manifest(body: bytes) -> Manifest:
    """An empty Manifest if the bytes are no manifest in either format. `descriptors` checks the entries."""
    try:
        return msgspec.json.decode(body, type=Manifest)
    except UNDECODABLE:
        return Manifest()


def media_type_of(body: bytes, claimed: str) -> str | None:
    """A manifest's own `mediaType`, else the media type that its fields imply; None if they imply none.

    If its fields fit several media types, the result is `claimed` if that fits, else the first.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except UNDECODABLE:
        return None
    own = fields.get("mediaType")
    if isinstance(own, str) and MEDIA_TYPE.fullmatch(own):
        return own
    shape = "schema 1" if fields.get("schemaVersion") == 1 else next((key for key in _TYPES if key in fields), "")
    fitting = _TYPES.get(shape, ())
    return claimed if claimed in fitting else next(iter(fitting), None)


def descriptors(manifest: Manifest, kind: str) -> Iterator[Resolved]:
    """The well-formed descriptors of one kind, at most MAX_MANIFEST_ENTRIES."""
    entries = manifest.manifests if kind == "manifests" else (*filter(None, (manifest.config,)), *manifest.layers)
    for entry in entries[:MAX_MANIFEST_ENTRIES]:
        try:
            media_type = entry.media_type if MEDIA_TYPE.fullmatch(entry.media_type) else UNTYPED
            yield Resolved(ObjectRef(Digest.parse(entry.digest), entry.size), media_type)
        except BadInputError as error:
            log.debug("descriptor left out: %s", error)
