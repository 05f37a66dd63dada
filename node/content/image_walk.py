"""What belongs to an image: its manifests, read through the node, and what they name, for the platforms wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing

from node.content.contract import Library
from node.oci.layout import Packed, PackedImage
from node.oci.manifests import MAX_MANIFEST, MAX_MANIFEST_ENTRIES, Manifest, Resolved, descriptors, parse_manifest
from node.oci.platforms import Platform
from node.oci.references import ImageName, Locator
from protocol.errors import BadInputError, NotFoundError
from protocol.ids import ObjectRef

MAX_DEPTH = 2
"""An index of indexes is as deep as it gets."""


async def survey(library: Library, name: ImageName, platforms: Sequence[Platform]) -> PackedImage:
    """All objects of an image, its manifests being read for it; of all platforms where none is named.

    Raises as `Library`, and NotFoundError where the image is not for one of the platforms.
    """
    found = await library.resolve(name.manifests, name.reference)
    walk = _Walk(library, name, platforms)
    await walk.manifest(found, 0)
    return PackedImage(name, tuple(walk.objects.values()))


class _Walk:
    def __init__(self, library: Library, name: ImageName, platforms: Sequence[Platform]) -> None:
        self._library, self._name, self._platforms = library, name, platforms
        self.objects: dict[ObjectRef, Packed] = {}

    async def manifest(self, found: Resolved, depth: int) -> None:
        self.objects[found.ref] = Packed(found.ref, "manifests", found.media_type)
        document = parse_manifest(await self._body(found))
        for one in descriptors(document, "blobs"):
            self.objects.setdefault(one.ref, Packed(one.ref, "blobs", one.media_type))
        for inner in self._wanted(document):
            if inner.ref not in self.objects and depth < MAX_DEPTH:
                await self.manifest(inner, depth + 1)

    async def _body(self, found: Resolved) -> bytes:
        if found.ref.size > MAX_MANIFEST:
            raise BadInputError(f"{found.ref.digest}: a manifest of {found.ref.size} bytes")
        locator = self._name.manifests
        async with aclosing(self._library.read(locator, found.ref, 0, found.ref.size)) as chunks:
            return b"".join([bytes(chunk) async for chunk in chunks])

    def _wanted(self, document: Manifest) -> Iterator[Resolved]:
        entries = document.manifests[:MAX_MANIFEST_ENTRIES]
        listed = list(descriptors(document, "manifests"))
        if not self._platforms or len(entries) == 1:
            yield from listed
            return
        chosen = set()
        for wanted in self._platforms:
            fitting = {entry.digest for entry in entries if wanted.fits(entry.platform)}
            if entries and not fitting:
                raise NotFoundError(f"{self._name} is not for {wanted}; it is for {_platforms_of(document)}")
            chosen |= fitting
        yield from (one for one in listed if str(one.ref.digest) in chosen)


def _platforms_of(document: Manifest) -> str:
    keys = ("os", "architecture", "variant")
    known = {"/".join(str(one.platform.get(key, "")) for key in keys).rstrip("/") for one in document.manifests}
    return ", ".join(sorted(known))[:400]


def locator_of(name: ImageName, packed: Packed) -> Locator:
    return name.manifests.of_kind(packed.kind)
