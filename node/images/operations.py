"""What operators do for a site that is cut off: archives out and in, pins, prefetch, gc. Implements `OfflineApi`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import trio

from cache.disk import DiskStore
from cache.store import Buffer
from node.api.image_documents import (
    GcReport,
    Phase,
    PinRow,
    PinsReport,
    PrefetchOrder,
    PrefetchReport,
    WorkEvent,
    WorkProgress,
    WorkResult,
)
from node.blocks.values import Site
from node.content.image_walk import locator_of, survey
from node.content.library import SiteLibrary
from node.content.name_table import NameTable
from node.images.archive import HASH, ArchiveReader, ArchiveWriter
from node.images.pins import Pin, Pins
from node.images.prefetch import Prefetcher
from node.oci.layout import Packed, PackedImage
from node.oci.manifests import Resolved
from node.oci.platforms import Platform
from node.oci.references import ImageName, Locator
from protocol.errors import BadInputError, UnavailableError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, Piece
from protocol.records import Record

PROGRESS_EVERY_S = 0.2
_READS = 2
"""Of an object into the disk: what another tier held and dropped meanwhile is read again once."""

RecordFor = Callable[[ObjectRef, int, bytes], Record]
"""Signs the record of a block from the object, the block's index and its sha256."""


@dataclass(frozen=True, slots=True)
class OfflineParts:
    site: Site
    disk: DiskStore
    library: SiteLibrary
    table: NameTable
    pins: Pins
    prefetcher: Prefetcher
    upstreams: Collection[str]
    record_for: RecordFor
    finished: Callable[[ObjectRef], None]
    """Tells the site's directories of an object that is held."""
    public: Callable[[Locator, float], None]
    """Notes that so many seconds ago anybody could read the repository."""


class _Told:
    """The progress of one piece of work, told at a rate fit for a person."""

    def __init__(self) -> None:
        self.done = self.total = 0
        self._since = trio.current_time()
        self._told = 0.0

    def progress(self, phase: Phase, count: int, digest: Digest) -> list[WorkProgress]:
        """Empty where the last one was a moment ago."""
        self.done = min(self.total, self.done + count)
        if trio.current_time() - self._told < PROGRESS_EVERY_S:
            return []
        self._told = trio.current_time()
        return [WorkProgress(phase=phase, object=str(digest), bytes_done=self.done, bytes_total=self.total)]

    def result(self, images: Iterable[PackedImage]) -> WorkResult:
        listed = list(images)
        objects = {packed.ref for image in listed for packed in image.objects}
        return WorkResult(
            ok=True,
            seconds=trio.current_time() - self._since,
            images=tuple(f"{image.name}@{image.root.ref.digest}" for image in listed),
            objects=len(objects),
            bytes_total=sum(ref.size for ref in objects),
        )


class Offline:
    def __init__(self, parts: OfflineParts) -> None:
        self._parts = parts
        self._remember_pinned()

    def _remember_pinned(self) -> None:
        """What pinned images stand for, where the table of names was lost."""
        for pin in self._parts.pins:
            source, name = str(pin.image.name.manifests), pin.image.name
            if self._parts.table.get(source, name.reference) is None:
                self._remember(pin.image, max(0.0, time.time() - pin.since))

    def _remember(self, image: PackedImage, age_s: float) -> None:
        """An operator's word counts as the registry's, and is so old: what the name stands for, and that anybody may
        read the repository, until the registry says otherwise."""
        self._parts.public(image.name.manifests, age_s)
        table, name, root = self._parts.table, image.name, image.root
        for packed in image.objects:
            found = Resolved(packed.ref, packed.media_type, age_s)
            table.put(str(locator_of(name, packed)), str(packed.ref.digest), found)
        table.put(str(name.manifests), name.reference, Resolved(root.ref, root.media_type, age_s))

    # Archives

    async def export_image(
        self, image: ImageName, platforms: Sequence[Platform], descriptor: int
    ) -> AsyncGenerator[WorkEvent, None]:
        library, writer, told = self._parts.library, ArchiveWriter(descriptor), _Told()
        found = await survey(library, image, platforms)
        told.total = sum(packed.ref.size for packed in found.objects)
        await writer.begin(found.root, image)
        for packed in found.objects:
            ref = packed.ref
            await writer.head(packed)
            async with aclosing(library.read(locator_of(image, packed), ref, 0, ref.size)) as chunks:
                async for chunk in chunks:
                    await writer.data(chunk)
                    for event in told.progress("writing", len(chunk), ref.digest):
                        yield event
            await writer.tail(ref)
        await writer.end()
        yield told.result([found])

    async def import_archive(
        self, descriptor: int, name: ImageName | None, *, pin: bool
    ) -> AsyncGenerator[WorkEvent, None]:
        archive, told = ArchiveReader(descriptor), _Told()
        images = await archive.images(name)
        for image in images:
            self._check_upstream(image.name)
        objects = {packed.ref: packed for image in images for packed in image.objects}
        told.total = 2 * sum(ref.size for ref in objects)
        with self._parts.pins.holding(objects.values()):
            hashes: dict[ObjectRef, bytes] = {}
            for packed in objects.values():
                found = bytearray()
                async with aclosing(archive.hashes(packed)) as some:
                    async for part in some:
                        found += part
                        for event in told.progress("checking", len(part) // HASH * BLOCK_SIZE, packed.ref.digest):
                            yield event
                hashes[packed.ref] = bytes(found)
            for packed in objects.values():
                for index in range(packed.ref.block_count):
                    await self._store(archive, packed, index, hashes[packed.ref])
                    for event in told.progress("storing", packed.ref.block_length(index), packed.ref.digest):
                        yield event
                self._parts.site.tiers.seal(packed.ref)
            await self._settle(images, pin=pin)
        yield told.result(images)

    def _check_upstream(self, name: ImageName) -> None:
        if name.upstream not in self._parts.upstreams:
            known = ", ".join(self._parts.upstreams)
            raise BadInputError(
                f"{name}: no [[upstream]] named {name.upstream}, so that no client could ask for it; there are: {known}"
            )

    async def _store(self, archive: ArchiveReader, packed: Packed, index: int, hashes: bytes) -> None:
        """One block to the disk, with a record of this node's, unless it is there already."""
        parts, ref = self._parts, packed.ref
        piece, sha = Piece(ref.block(index)), hashes[index * HASH : (index + 1) * HASH]
        if parts.disk.holds(piece):
            held = await parts.disk.get(piece)
            if held and held.record.sha256 == sha and parts.site.trust.accepts(held.record.signer):
                return
            await parts.site.tiers.discard(piece)
        data = await archive.block(packed, index, sha)
        await self._put(piece, data, parts.record_for(ref, index, sha))

    async def _put(self, piece: Piece, data: Buffer, record: Record) -> None:
        if not await self._parts.disk.put(piece, data, record):
            raise UnavailableError("the disk takes no more: it is full, or cache.min_free is reached")

    async def _settle(self, images: Sequence[PackedImage], *, pin: bool) -> None:
        """All blocks are written. Only now is a name known that leads to them, and the site told."""
        await self._parts.disk.flush()
        for image in images:
            if pin:
                await self._parts.pins.add(image)
            self._remember(image, 0.0)
            for packed in image.objects:
                self._parts.finished(packed.ref)

    # Pins

    async def pin(self, image: ImageName, platforms: Sequence[Platform]) -> AsyncGenerator[WorkEvent, None]:
        told = _Told()
        found = await survey(self._parts.library, image, platforms)
        told.total = sum(packed.ref.size for packed in found.objects)
        with self._parts.pins.holding(found.objects):
            for packed in found.objects:
                async with aclosing(self._to_disk(image, packed)) as counts:
                    async for count in counts:
                        for event in told.progress("reading", count, packed.ref.digest):
                            yield event
            await self._parts.disk.flush()
            await self._parts.pins.add(found)
        yield told.result([found])

    async def _to_disk(self, image: ImageName, packed: Packed) -> AsyncGenerator[int, None]:
        """Read what is missing; the disk takes also what another tier holds. Yields how many bytes are there."""
        library, ref = self._parts.library, packed.ref
        for _ in range(_READS):
            if self._bytes_on_disk(ref) == ref.size:
                break
            index = 0
            async with aclosing(library.read(locator_of(image, packed), ref, 0, ref.size)) as chunks:
                async for _chunk in chunks:
                    await self._copy_to_disk(Piece(ref.block(index)), ref)
                    index += 1
                    yield 0
        if self._bytes_on_disk(ref) != ref.size:
            raise UnavailableError(f"{ref.digest}: the disk does not take all of it: it is full, or fails")
        yield ref.size

    async def _copy_to_disk(self, piece: Piece, ref: ObjectRef) -> None:
        if not self._parts.disk.holds(piece):
            found = await self._parts.site.tiers.get(piece, ref.size)
            if found is not None:
                await self._put(piece, found[0].data, found[0].record)

    def _bytes_on_disk(self, ref: ObjectRef) -> int:
        bits = self._parts.disk.holdings(ref.digest).blocks
        return sum(ref.block_length(index) for index in range(ref.block_count) if bits >> index & 1)

    async def unpin(self, image: ImageName) -> PinsReport:
        await self._parts.pins.remove(image)
        return await self.pins()

    async def pins(self) -> PinsReport:
        await trio.lowlevel.checkpoint()
        pins = self._parts.pins
        return PinsReport(pins=tuple(map(self._row, pins)), bytes=pins.bytes, most_bytes=pins.most_bytes)

    def _row(self, pin: Pin) -> PinRow:
        refs = {packed.ref for packed in pin.image.objects}
        return PinRow(
            image=str(pin.image.name),
            digest=str(pin.image.root.ref.digest),
            size=sum(ref.size for ref in refs),
            bytes_held=sum(map(self._bytes_on_disk, refs)),
            since=pin.since,
        )

    # Prefetch and gc

    async def prefetch(self, order: PrefetchOrder) -> PrefetchReport:
        await trio.lowlevel.checkpoint()
        self._parts.prefetcher.order(order)
        return self._parts.prefetcher.report()

    async def prefetch_status(self) -> PrefetchReport:
        await trio.lowlevel.checkpoint()
        return self._parts.prefetcher.report()

    async def prefetch_cancel(self) -> PrefetchReport:
        await trio.lowlevel.checkpoint()
        self._parts.prefetcher.cancel()
        return self._parts.prefetcher.report()

    async def gc(self, *, older_than_s: float | None, to_bytes: int | None, dry_run: bool) -> GcReport:
        disk = self._parts.disk
        if older_than_s is not None and to_bytes is None:
            named = disk.unused(older_than_s)
        elif to_bytes is not None and older_than_s is None:
            named = disk.beyond(to_bytes)
        else:
            raise BadInputError("what is to go? either what was not used for some time, or all beyond a size")
        pieces, freed = await disk.remove(named, dry_run=dry_run)
        left = disk.statistics()
        held = left.bytes - freed if dry_run else left.bytes
        return GcReport(dry_run=dry_run, pieces=pieces, bytes=freed, held_bytes=held, pinned_bytes=left.pinned_bytes)
