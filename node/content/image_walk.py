"""The walk over an image: its manifests, read one after the other, and the objects that they name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing

from node.content.contract import Library
from node.oci.layout import MAX_DEPTH, Packed, PackedImage
from node.oci.manifests import MAX_MANIFEST, MAX_MANIFEST_ENTRIES, Manifest, Resolved, descriptors, parse_manifest
from node.oci.platforms import Platform
from node.oci.references import ImageName, Locator
from protocol.errors import BadInputError, NotFoundError
from protocol.ids import ObjectRef


def chosen(index: Manifest, platforms: Sequence[Platform]) -> Iterable[Resolved]:
    """The manifests of an index for these platforms; all of them if no platform is named or the index has only one."""
    entries = index.manifests[:MAX_MANIFEST_ENTRIES]
    fitting = {entry.digest for entry in entries if any(platform.fits(entry.platform) for platform in platforms)}
    everything = not platforms or len(entries) == 1
    return (inner for inner in descriptors(index, "manifests") if everything or str(inner.ref.digest) in fitting)


async def walk(
    root: Resolved,
    read: Callable[[Resolved], Awaitable[bytes | None]],
    wanted: Callable[[Manifest], Iterable[Resolved]] = lambda index: chosen(index, ()),
) -> tuple[Packed, ...]:
    """The objects of an image, each once, the root first. Manifests for which `read` returns None are left out."""
    objects: dict[ObjectRef, Packed] = {}

    async def visit(resolved: Resolved, depth: int) -> None:
        if (body := await read(resolved)) is None:
            return
        objects[resolved.ref] = Packed(resolved.ref, "manifests", resolved.media_type)
        manifest = parse_manifest(body)
        for blob in descriptors(manifest, "blobs"):
            objects.setdefault(blob.ref, Packed(blob.ref, "blobs", blob.media_type))
        for inner in wanted(manifest):
            if inner.ref not in objects and depth < MAX_DEPTH:
                await visit(inner, depth + 1)

    await visit(root, 0)
    return tuple(objects.values())


async def read_manifest(library: Library, locator: Locator, manifest: Resolved) -> bytes:
    if manifest.ref.size > MAX_MANIFEST:
        raise BadInputError(f"{manifest.ref.digest}: a manifest of {manifest.ref.size} bytes")
    async with aclosing(library.read(locator, manifest.ref, 0, manifest.ref.size)) as chunks:
        return b"".join([bytes(chunk) async for chunk in chunks])


async def survey(library: Library, name: ImageName, platforms: Sequence[Platform]) -> PackedImage:
    """All objects of an image for these platforms, or for all if none is named. Reads the image's manifests. Raises as
    `Library`, and NotFoundError if the image is not for one of the platforms."""

    def wanted(index: Manifest) -> Iterable[Resolved]:
        entries = index.manifests[:MAX_MANIFEST_ENTRIES]
        for platform in platforms if len(entries) > 1 else ():
            if not any(platform.fits(entry.platform) for entry in entries):
                raise NotFoundError(f"{name} is not for {platform}; it is for {_platforms_of(index)}")
        return chosen(index, platforms)

    root = await library.resolve(name.manifests, name.reference)
    objects = await walk(root, lambda manifest: read_manifest(library, name.manifests, manifest), wanted)
    return PackedImage(name, objects)


def _platforms_of(index: Manifest) -> str:
    keys = ("os", "architecture", "variant")
    names = {"/".join(str(entry.platform.get(key, "")) for key in keys).rstrip("/") for entry in index.manifests}
    return ", ".join(sorted(names))[:400]


def locator_of(name: ImageName, packed: Packed) -> Locator:
    return name.manifests.of_kind(packed.kind)
