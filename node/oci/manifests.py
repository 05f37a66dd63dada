"""Image manifests and indexes: parsing, media types, descriptors.

Formats: OCI image specification 1.1, and Docker's manifests (schemas 1 and 2), which share the fields that are read
here. A manifest is sent by a registry or a member, so its entries are bounded, and checked before use. Whoever may push
to one repository writes manifests, so they are read as the registry that accepted them reads them, or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from node.oci.strict_json import check_members, decode_strictly
from protocol.errors import UNDECODABLE, BadInputError
from protocol.ids import MAX_OBJECT_SIZE, Digest, ObjectRef, is_possible

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
    "blobs": ("application/vnd.oci.artifact.manifest.v1+json",),
    "schema 1": (f"{_DOCKER}.v1+prettyjws", f"{_DOCKER}.v1+json"),
}
"""By a list that a manifest contains: the media types that it may have if it has no `mediaType`."""
_SHAPES = {media_type: shape for shape, media_types in _TYPES.items() for media_type in media_types}
_FIELDS = {
    *("schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests", "blobs", "subject"),
    *("annotations", "fsLayers", "history", "signatures", "name", "tag", "architecture"),
}
_DESCRIPTOR_FIELDS = {"mediaType", "digest", "size", "urls", "annotations", "data", "platform", "artifactType"}
_PLATFORM_FIELDS = {"architecture", "os", "os.version", "os.features", "variant", "features"}


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


def read_manifest(body: bytes) -> Manifest:
    """Raises BadInputError if the bytes are no manifest and no index, or if another decoder could read them otherwise
    (node/oci/strict_json.py). `descriptors` checks the entries further."""
    return _understood(body)[1]


def parse_manifest(body: bytes) -> Manifest:
    """Like `read_manifest`, but an empty Manifest if the bytes are none."""
    try:
        return read_manifest(body)
    except BadInputError as error:
        log.debug("nothing is read from a manifest: %s", error)
        return Manifest()


def media_type_of(body: bytes, claimed: str) -> str | None:
    """A manifest's own `mediaType`, else the media type that its fields imply; None if the bytes are no manifest.

    If its fields fit several media types, the result is `claimed` if that fits, else the first.
    """
    try:
        fields, _ = _understood(body)
    except BadInputError:
        return None
    own = fields.get("mediaType")
    if isinstance(own, str) and MEDIA_TYPE.fullmatch(own):
        return own
    fitting = _TYPES.get(_shape(fields), ())
    return claimed if claimed in fitting else next(iter(fitting), None)


def _understood(body: bytes) -> tuple[dict[str, Any], Manifest]:
    document = decode_strictly(body)
    if not isinstance(document, dict):
        raise BadInputError("not a JSON object")
    check_members(document, _FIELDS)
    fields = {name: value for name, value in document.items() if value is not None}
    shape = _shape(fields)
    listed = {name: fields[name] for name in ("config", "layers", "manifests") if name in fields}
    if not shape or ("manifests" in listed and len(listed) > 1):
        raise BadInputError("neither a manifest nor an index")
    own = fields.get("mediaType", "")
    if not isinstance(own, str) or (own in _SHAPES and _SHAPES[own] != shape):
        raise BadInputError("a mediaType that its fields contradict")
    if shape == "schema 1":  # its `history` and `fsLayers` name objects without a size
        return fields, Manifest()
    try:
        return fields, msgspec.convert({name: _checked(value) for name, value in listed.items()}, Manifest)
    except UNDECODABLE as error:
        raise BadInputError(f"not a manifest: {error}") from error


def _shape(fields: Mapping[str, Any]) -> str:
    """A key of _TYPES; "" for a document that is no manifest."""
    if fields.get("schemaVersion") == 1 and isinstance(fields.get("fsLayers"), list):
        return "schema 1"
    return next((name for name in ("manifests", "layers", "blobs") if isinstance(fields.get(name), list)), "")


def _checked(value: Any) -> Any:
    """Descriptors without their members that are null. Raises BadInputError."""
    if isinstance(value, list):
        return [_checked(entry) for entry in value]
    if not isinstance(value, dict):
        raise BadInputError("not a descriptor")
    check_members(value, _DESCRIPTOR_FIELDS)
    if isinstance(platform := value.get("platform"), dict):
        check_members(platform, _PLATFORM_FIELDS)
    size = value.get("size")
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise BadInputError("a descriptor without a size")
    return {name: part for name, part in value.items() if part is not None}


def descriptors(manifest: Manifest, kind: str, max_object: int = MAX_OBJECT_SIZE) -> Iterator[Resolved]:
    """The well-formed descriptors of one kind, at most MAX_MANIFEST_ENTRIES, of objects up to `max_object` bytes."""
    entries = manifest.manifests if kind == "manifests" else (*filter(None, (manifest.config,)), *manifest.layers)
    for entry in entries[:MAX_MANIFEST_ENTRIES]:
        try:
            media_type = entry.media_type if MEDIA_TYPE.fullmatch(entry.media_type) else UNTYPED
            digest = Digest.parse(entry.digest)
            if not is_possible(digest, entry.size, max_object):
                raise BadInputError(f"{digest} with {entry.size} bytes")
            yield Resolved(ObjectRef(digest, entry.size), media_type)
        except BadInputError as error:
            log.debug("descriptor left out: %s", error)
