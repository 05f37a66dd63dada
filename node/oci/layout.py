"""Image archives: an OCI image layout (image specification 1.1) in a tar file, read and written as values.

    oci-layout    index.json: the images and their names    blobs/<algorithm>/<hex>: manifests, configs, layers

An index may name manifests of platforms that are not in the archive, but a manifest in the archive needs its config and
all its layers there. Names: `io.containerd.image.name` (containerd, docker save), or the layout's own
`org.opencontainers.image.ref.name` if that is a full name with a registry. Archives may be hostile, so the walk refuses
each malformed entry by name, while the walk over a registry's image (node/content/image_walk.py) skips such entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from node.oci.manifests import MAX_MANIFEST, MEDIA_TYPE
from node.oci.references import ImageName, Kind, is_digest
from node.oci.tar import Entry, Read
from protocol.errors import UNDECODABLE, BadInputError
from protocol.ids import Digest, ObjectRef

LAYOUT, INDEX = "oci-layout", "index.json"
REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"
MAX_INDEX = 4 << 20
MAX_DESCRIPTORS = 1024
"""Descriptors in a document."""
MAX_MANIFESTS = 4096
"""Most manifests that are read from an archive. A manifest that several images share counts for each of them."""
MAX_DEPTH = 2
"""Most levels below the root: the deepest image is an index of indexes of manifests."""

_Document = TypeVar("_Document", bound=msgspec.Struct)


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    annotations: dict[str, str] | None = None


class _Layout(msgspec.Struct, frozen=True, rename="camel"):
    image_layout_version: str


class ManifestFile(msgspec.Struct, frozen=True, rename="camel"):
    """A manifest, an index, or index.json."""

    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] | None = None
    manifests: tuple[Descriptor, ...] | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """An object of an image. `offset` is the position of its bytes in the archive, if it is read from an archive."""

    ref: ObjectRef
    kind: Kind
    media_type: str
    offset: int = 0

    @property
    def entry(self) -> str:
        return blob_name(self.ref.digest)


@dataclass(frozen=True, slots=True)
class PackedImage:
    """An image's name, and each of its objects once, the root first."""

    name: ImageName
    objects: tuple[Packed, ...]

    @property
    def root(self) -> Packed:
        return self.objects[0]

    @property
    def size(self) -> int:
        return sum(packed.ref.size for packed in self.objects)


def blob_name(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


# Writing


def layout_files(root: Packed, name: ImageName) -> dict[str, bytes]:
    """The files `oci-layout` and `index.json`, with which an archive begins."""
    descriptor = {
        "mediaType": root.media_type,
        "digest": str(root.ref.digest),
        "size": root.ref.size,
        "annotations": {REF_NAME: str(name), IMAGE_NAME: str(name)},
    }
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [descriptor]}
    return {LAYOUT: msgspec.json.encode({"imageLayoutVersion": "1.0.0"}), INDEX: msgspec.json.encode(index)}


# Reading


def read_layout(entries: Mapping[str, Entry], read: Read, name: ImageName | None) -> list[PackedImage]:
    """The images of an archive; `name` replaces the name in an archive of a single image.

    Verifies the digests of manifests, but not of other blobs. Raises BadInputError, which names the entry.
    """
    reader = _Reader(entries, read)
    layout = reader.document(LAYOUT, _Layout, MAX_INDEX)
    if not layout.image_layout_version.startswith("1."):
        raise BadInputError(f"{LAYOUT}: version {layout.image_layout_version[:20]!r} is not supported")
    roots = reader.document(INDEX, ManifestFile, MAX_INDEX).manifests or ()
    if not 0 < len(roots) <= MAX_DESCRIPTORS:
        raise BadInputError(f"{INDEX}: it names {len(roots)} images; 1 to {MAX_DESCRIPTORS} are allowed")
    for algorithm in (name.split("/")[1] for name in entries if name.startswith("blobs/") and name.count("/") > 1):
        if algorithm not in ("sha256", "sha512"):
            raise BadInputError(f"blobs/{algorithm}: only sha256 and sha512 are supported")
    objects: dict[str, tuple[Packed, ...]] = {}
    images: dict[ImageName, PackedImage] = {}
    for root, called in _named(roots, name):
        if root.digest not in objects:
            objects[root.digest] = tuple(reader.walk(root))
        image = PackedImage(called, objects[root.digest])
        if images.setdefault(called, image).root.ref != image.root.ref:
            raise BadInputError(f"{INDEX}: {called} stands for two images")
    return list(images.values())


def _named(roots: Sequence[Descriptor], name: ImageName | None) -> Iterator[tuple[Descriptor, ImageName]]:
    if name is not None and len({root.digest for root in roots}) > 1:
        raise BadInputError(f"{INDEX}: it names {len(roots)} images, but only one name was given")
    for root in roots:
        called = name or _own_name(root)
        if is_digest(called.reference) and called.reference != root.digest:
            raise BadInputError(f"{INDEX}: {root.digest[:160]} is not {called}")
        yield root, called


def _own_name(root: Descriptor) -> ImageName:
    """The root's annotated name, if it contains a registry: without it the name would wrongly mean docker.io."""
    annotations = root.annotations or {}
    for text in (annotations.get(IMAGE_NAME, ""), annotations.get(REF_NAME, "")):
        first, slash, _ = text.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            try:
                return ImageName.parse(text)
            except BadInputError as error:
                raise BadInputError(f"{INDEX}: {error}") from error
    called = annotations.get(REF_NAME) or "nothing"
    raise BadInputError(
        f"{INDEX}: {root.digest[:160]} is called {called[:160]!r}, which is not a full name: give one with"
        " --name REGISTRY/REPOSITORY:TAG"
    )


@dataclass(slots=True)
class _Reader:
    entries: Mapping[str, Entry]
    read: Read
    seen: dict[Digest, Packed] = field(default_factory=dict)
    manifests: int = 0

    def document(self, name: str, kind: type[_Document], most: int) -> _Document:
        entry = self.entries.get(name)
        if entry is None:
            raise BadInputError(f"{name}: not in the archive: this is not an OCI image layout")
        return _decode(name, self._small(entry, most), kind)

    def _small(self, entry: Entry, most: int) -> bytes:
        if entry.size > most:
            raise BadInputError(f"{entry.name}: it has {entry.size} bytes, at most {most} are allowed")
        return self.read(entry.offset, entry.size)

    def walk(self, root: Descriptor) -> Iterator[Packed]:
        self.seen = {}
        packed = self._packed(root, "manifests", INDEX)
        if packed is None:
            raise BadInputError(f"{INDEX}: {root.digest[:160]} is not in the archive")
        yield packed
        yield from self._below(packed, 0)

    def _below(self, packed: Packed, depth: int) -> Iterator[Packed]:
        """The objects below a manifest, without those that the walk has already returned."""
        name = packed.entry
        document = self._manifest(packed)
        inner, blobs = document.manifests or (), [*filter(None, (document.config,)), *(document.layers or ())]
        if len(inner) + len(blobs) > MAX_DESCRIPTORS:
            raise BadInputError(f"{name}: it names more than {MAX_DESCRIPTORS} objects")
        for descriptor in blobs:
            before = len(self.seen)
            blob = self._packed(descriptor, "blobs", name)
            if blob is None:
                raise BadInputError(f"{name}: it names {descriptor.digest[:160]}, which is not in the archive")
            if len(self.seen) > before:
                yield blob
        present = 0
        for descriptor in inner:
            before = len(self.seen)
            manifest = self._packed(descriptor, "manifests", name)
            present += manifest is not None
            if manifest is not None and len(self.seen) > before:
                if depth >= MAX_DEPTH:
                    raise BadInputError(f"{name}: an index below {MAX_DEPTH} others")
                yield manifest
                yield from self._below(manifest, depth + 1)
        if not blobs and not present:
            raise BadInputError(f"{name}: it names nothing that is in the archive")

    def _manifest(self, packed: Packed) -> ManifestFile:
        self.manifests += 1
        if self.manifests > MAX_MANIFESTS:
            raise BadInputError(f"{INDEX}: it leads to more than {MAX_MANIFESTS} manifests")
        data = self._small(self.entries[packed.entry], MAX_MANIFEST)
        if hashlib.new(packed.ref.digest.algorithm, data).hexdigest() != packed.ref.digest.hex:
            raise BadInputError(f"{packed.entry}: its bytes do not match its digest")
        return _decode(packed.entry, data, ManifestFile)

    def _packed(self, descriptor: Descriptor, kind: Kind, source: str) -> Packed | None:
        """The object if it is in the archive, else None. Raises BadInputError if it contradicts its descriptor."""
        try:
            ref = ObjectRef(Digest.parse(descriptor.digest), descriptor.size)
        except BadInputError as error:
            raise BadInputError(f"{source}: {error}") from error
        entry = self.entries.get(blob_name(ref.digest))
        if entry is None:
            return None
        if entry.size != ref.size:
            raise BadInputError(f"{entry.name}: it has {entry.size} bytes, but {ref.size} according to {source}")
        media_type = descriptor.media_type
        if not MEDIA_TYPE.fullmatch(media_type):
            raise BadInputError(f"{source}: {descriptor.digest}: {media_type[:160]!r} is not a media type")
        return self.seen.setdefault(ref.digest, Packed(ref, kind, media_type, entry.offset))


def _decode(name: str, data: bytes, kind: type[_Document]) -> _Document:
    try:
        return msgspec.json.decode(data, type=kind)
    except UNDECODABLE as error:
        raise BadInputError(f"{name}: not the expected JSON: {error}") from error
