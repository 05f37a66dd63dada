"""Image manifests: parsing, media types, descriptors."""

from __future__ import annotations

import logging
import re
from collections.abc import (
    Iterator,
)
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.errors import (
    UNDECODABLE,
    BadInputError,
)
from protocol.ids import Digest, ObjectRef

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a tag or a digest stands for. `age_s` is the time since the registry last confirmed it."""

    ref: ObjectRef
    media_type: str
    age_s: float = 0.0


MAX_MANIFEST_ENTRIES = 1024


UNTYPED = "application/octet-stream"


_TYPES = {
    "manifests": (
        "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
    ),
    "layers": ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"),
    "schema 1": (
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "application/vnd.docker.distribution.manifest.v1+json",
    ),
}  # fmt: skip
"""By what a manifest that does not name its own type has in it."""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True):
    """The part of a manifest or an index that names other objects."""

    config: _Descriptor | None = None
    layers: tuple[_Descriptor, ...] = ()
    manifests: tuple[_Descriptor, ...] = ()


def parse_manifest(body: bytes) -> Manifest:
    """Empty for what is no manifest of the two families; what it names is checked by whoever uses it."""
    try:
        return msgspec.json.decode(body, type=Manifest)
    except UNDECODABLE:
        return Manifest()


def media_type_of(body: bytes, told: str) -> str | None:
    """A manifest's, by its own word, else by its shape, which the `told` one has to fit; None where neither tells."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except UNDECODABLE:
        return None
    own = fields.get("mediaType")
    if isinstance(own, str) and MEDIA_TYPE.fullmatch(own):
        return own
    shape = "schema 1" if fields.get("schemaVersion") == 1 else next((key for key in _TYPES if key in fields), "")
    fitting = _TYPES.get(shape, ())
    return told if told in fitting else next(iter(fitting), None)


def descriptors(manifest: Manifest, kind: str) -> Iterator[Resolved]:
    """The well-formed descriptors of one kind, bounded."""
    found = manifest.manifests if kind == "manifests" else (*filter(None, (manifest.config,)), *manifest.layers)
    for one in found[:MAX_MANIFEST_ENTRIES]:
        try:
            media_type = one.media_type if MEDIA_TYPE.fullmatch(one.media_type) else UNTYPED
            yield Resolved(ObjectRef(Digest.parse(one.digest), one.size), media_type)
        except BadInputError as error:
            log.debug("descriptor left out: %s", error)


MAX_MANIFEST = 4 << 20
"""What containerd accepts."""


MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}", re.ASCII)
