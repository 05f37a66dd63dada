"""Operations for a site that is cut off: export and import of archives, pins, prefetch, gc. Implements `ImageApi`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import trio

from cache.disk import DiskStore
from node.api import documents
from node.blocks.held_objects import bytes_held
from node.blocks.values import Site
from node.content.contract import Library
from node.content.image_walk import locator_of, survey
from node.content.name_table import NameTable
from node.images.archive import HASH, ArchiveReader, ArchiveWriter
from node.images.pins import Pin, Pins
from node.images.prefetch import Prefetcher
from node.images.pull import PROGRESS_EVERY_S
from node.oci.layout import Packed, PackedImage
from node.oci.manifests import Resolved
from node.oci.platforms import Platform
from node.oci.references import ImageName, Locator
from protocol.errors import BadInputError, UnavailableError
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, Piece
from protocol.records import Record

_READS = 2
"""Reads of an object that is pinned. If another tier drops a block before it is copied to the disk, the block is
missing after the first read."""

RecordFor = Callable[[ObjectRef, int, bytes], Record]
"""Signs the record of a block, from the object, the block's index and the block's sha256."""


class _Work:
    """The progress of an operation, reported at a rate fit for a person."""

    def __init__(self) -> None:
        self._done = self.total = 0
        self._since = trio.current_time()
        self._last_event = 0.0

    def progress(self, phase: documents.Phase, count: int, digest: Digest) -> list[documents.WorkProgress]:
        """Empty if the last event is less than PROGRESS_EVERY_S old."""
        self._done = min(self.total, self._done + count)
        if trio.current_time() - self._last_event < PROGRESS_EVERY_S:
            return []
        self._last_event = trio.current_time()
        return [documents.WorkProgress(phase=phase, object=str(digest), bytes_done=self._done, bytes_total=self.total)]

    def result(self, images: Sequence[PackedImage]) -> documents.WorkResult:
        objects = {packed.ref for image in images for packed in image.objects}
        return documents.WorkResult(
            ok=True,
            seconds=trio.current_time() - self._since,
            images=tuple(f"{image.name}@{image.root.ref.digest}" for image in images),
            objects=len(objects),
            bytes_total=sum(ref.size for ref in objects),
        )


@dataclass(kw_only=True, slots=True, eq=False)
class ImageOperations:
    """`finished` announces a held object to the site's directories. `public` notes how many seconds ago anybody could
    read a repository."""

    site: Site
    disk: DiskStore
    library: Library
    table: NameTable
    pinned: Pins
    prefetcher: Prefetcher
    upstreams: Collection[str]
    record_for: RecordFor
    finished: Callable[[ObjectRef], None]
    public: Callable[[Locator, float], None]

    def __post_init__(self) -> None:
        """Restore the names of pinned images, in case the table of names was lost."""
        for pin in self.pinned:
            name = pin.image.name
            if self.table.get(str(name.manifests), name.reference) is None:
                self._remember(pin.image, max(0.0, time.time() - pin.since))

    def _remember(self, image: PackedImage, age_s: float) -> None:
        """Note an image's names, and that anybody may read its repository: the operator's statement of this age counts
        like the registry's, until the registry contradicts it."""
        self.public(image.name.manifests, age_s)
        table, name, root = self.table, image.name, image.root
        for packed in image.objects:
            resolved = Resolved(packed.ref, packed.media_type, age_s)
            table.put(str(locator_of(name, packed)), str(packed.ref.digest), resolved, "import")
        table.put(str(name.manifests), name.reference, Resolved(root.ref, root.media_type, age_s), "import")

    async def export_image(
        self, image: ImageName, platforms: Sequence[Platform], descriptor: int
    ) -> AsyncGenerator[documents.WorkEvent, None]:
        writer, work = ArchiveWriter(descriptor), _Work()
        packed_image = await survey(self.library, image, platforms)
        work.total = packed_image.size
        await writer.begin(packed_image.root, image)
        for packed in packed_image.objects:
            ref = packed.ref
            await writer.head(packed)
            async with aclosing(self.library.read(locator_of(image, packed), ref, 0, ref.size)) as chunks:
                async for chunk in chunks:
                    await writer.write(chunk)
                    for event in work.progress("writing", len(chunk), ref.digest):
                        yield event
            await writer.tail(ref)
        await writer.end()
        yield work.result([packed_image])

    async def import_archive(
        self, descriptor: int, name: ImageName | None, *, pin: bool
    ) -> AsyncGenerator[documents.WorkEvent, None]:
        archive, work = ArchiveReader(descriptor), _Work()
        images = await archive.images(name)
        for image in images:
            self._check_upstream(image.name)
        objects = {packed.ref: packed for image in images for packed in image.objects}
        work.total = 2 * sum(ref.size for ref in objects)
        with self.pinned.holding(objects.values()):
            hashes = {ref: bytearray() for ref in objects}
            for packed in objects.values():
                async with aclosing(archive.hashes(packed)) as parts:
                    async for part in parts:
                        hashes[packed.ref] += part
                        for event in work.progress("checking", len(part) // HASH * BLOCK_SIZE, packed.ref.digest):
                            yield event
            for packed in objects.values():
                for index in range(packed.ref.block_count):
                    sha = bytes(hashes[packed.ref][index * HASH : (index + 1) * HASH])
                    await self._store(archive, packed, index, sha)
                    for event in work.progress("storing", packed.ref.block_length(index), packed.ref.digest):
                        yield event
                self.site.facts.given_to_all(packed.ref.digest)  # as `_remember` says of its repository
                self.site.facts.verified(packed.ref)
                self.site.tiers.seal(packed.ref)
            await self._settle(images, pin=pin)
        yield work.result(images)

    def _check_upstream(self, name: ImageName) -> None:
        if name.upstream not in self.upstreams:
            raise BadInputError(
                f"{name}: no [[upstream]] named {name.upstream}, so no client could ask for it; the upstreams are:"
                f" {', '.join(self.upstreams)}"
            )

    async def _store(self, archive: ArchiveReader, packed: Packed, index: int, sha: bytes) -> None:
        """Store a block on disk with a record of this node, unless the disk has it with a record that is accepted."""
        ref, tiers = packed.ref, self.site.tiers
        piece = Piece(ref.block(index))
        if self.disk.holds(piece):
            held = await self.disk.get(piece)
            if held and held.record.sha256 == sha and self.site.trust.accepts(held.record.signer):
                tiers.claim(piece)
                return
            await tiers.discard(piece)
        data = await archive.block(packed, index, sha)
        await self._put(piece, data, self.record_for(ref, index, sha))

    async def _put(self, piece: Piece, data: Buffer, record: Record) -> None:
        if not await self.disk.put(piece, data, record):
            raise UnavailableError("the disk accepts no more: it is full, or cache.min_free is reached")

    async def _settle(self, images: Sequence[PackedImage], *, pin: bool) -> None:
        """Make the images known to clients and to the site, now that all blocks are written."""
        await self.disk.flush()
        for image in images:
            if pin:
                await self.pinned.add(image)
            self._remember(image, 0.0)
            for packed in image.objects:
                self.finished(packed.ref)

    async def pin(self, image: ImageName, platforms: Sequence[Platform]) -> AsyncGenerator[documents.WorkEvent, None]:
        work = _Work()
        packed_image = await survey(self.library, image, platforms)
        work.total = packed_image.size
        with self.pinned.holding(packed_image.objects):
            for packed in packed_image.objects:
                async with aclosing(self._to_disk(image, packed)) as counts:
                    async for count in counts:
                        for event in work.progress("reading", count, packed.ref.digest):
                            yield event
            await self.disk.flush()
            await self.pinned.add(packed_image)
        yield work.result([packed_image])

    async def _to_disk(self, image: ImageName, packed: Packed) -> AsyncGenerator[int, None]:
        """Read the missing blocks, and copy to the disk those that only another tier holds. Yields 0 for each chunk,
        and the object's size at the end."""
        ref = packed.ref
        for _ in range(_READS):
            if self._bytes_on_disk(ref) == ref.size:
                break
            index = 0
            async with aclosing(self.library.read(locator_of(image, packed), ref, 0, ref.size)) as chunks:
                async for chunk in chunks:
                    if chunk:  # a chunk of a whole read is a block, or empty while the first block is late
                        piece, index = Piece(ref.block(index)), index + 1
                        block = None if self.disk.holds(piece) else await self.site.tiers.get(piece, ref.size)
                        if block is not None:
                            await self._put(piece, block[0].data, block[0].record)
                    yield 0
        if self._bytes_on_disk(ref) != ref.size:
            raise UnavailableError(f"{ref.digest}: the disk does not hold all of it: it is full, or fails")
        yield ref.size

    def _bytes_on_disk(self, ref: ObjectRef) -> int:
        return bytes_held(self.disk.holdings(ref.digest), ref)

    async def unpin(self, image: ImageName) -> documents.PinsReport:
        await self.pinned.remove(image)
        return await self.pins()

    async def pins(self) -> documents.PinsReport:
        await trio.lowlevel.checkpoint()
        rows = tuple(map(self._row, self.pinned))
        return documents.PinsReport(pins=rows, bytes=self.pinned.bytes, most_bytes=self.pinned.most_bytes)

    def _row(self, pin: Pin) -> documents.PinRow:
        return documents.PinRow(
            image=str(pin.image.name),
            digest=str(pin.image.root.ref.digest),
            size=pin.image.size,
            bytes_held=sum(self._bytes_on_disk(packed.ref) for packed in pin.image.objects),
            since=pin.since,
        )

    async def prefetch(self, order: documents.PrefetchOrder) -> documents.PrefetchReport:
        await trio.lowlevel.checkpoint()
        self.prefetcher.order(order)
        return self.prefetcher.report()

    async def prefetch_status(self) -> documents.PrefetchReport:
        await trio.lowlevel.checkpoint()
        return self.prefetcher.report()

    async def prefetch_cancel(self) -> documents.PrefetchReport:
        await trio.lowlevel.checkpoint()
        self.prefetcher.cancel()
        return self.prefetcher.report()

    async def gc(self, *, older_than_s: float | None, to_bytes: int | None, dry_run: bool) -> documents.GcReport:
        if older_than_s is not None and to_bytes is None:
            victims = self.disk.unused(older_than_s)
        elif to_bytes is not None and older_than_s is None:
            victims = self.disk.beyond(to_bytes)
        else:
            raise BadInputError("choose either the pieces not used for some time, or all beyond a size")
        pieces, freed = await self.disk.remove(victims, dry_run=dry_run)
        left = self.disk.statistics()
        held = left.bytes - freed if dry_run else left.bytes
        return documents.GcReport(
            dry_run=dry_run, pieces=pieces, bytes=freed, held_bytes=held, pinned_bytes=left.pinned_bytes
        )
