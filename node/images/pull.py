"""A pull of an image into this node's cache, as a client would read it, with progress for a person."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial

import trio

from node.api.documents import PullEvent, PullProgress, PullResult
from node.content.contract import Library
from node.content.image_walk import chosen, locator_of, read_manifest, walk
from node.oci.platforms import Platform, own_platform
from node.oci.references import ImageName
from node.telemetry.provenance import Provenance
from node.telemetry.sources import Source
from protocol.errors import ShoalError

PROGRESS_EVERY_S = 0.2
"""A rate fit for a person."""


def by_name(counts: Mapping[Source, int]) -> dict[str, int]:
    return {source.value: count for source, count in counts.items()}


class Pull:
    """`events` yields progress, and the result last."""

    def __init__(self, library: Library, ledger: Provenance, image: ImageName, *, all_platforms: bool) -> None:
        self._library, self._ledger, self._image = library, ledger, image
        self._platforms: Sequence[Platform] = () if all_platforms else (own_platform(),)
        self._since, self._before = trio.current_time(), by_name(ledger.bytes_served)
        self._done = self._total = 0
        self._digest, self._last_event = "", 0.0

    async def events(self) -> AsyncGenerator[PullEvent, None]:
        error, image, library = "", self._image, self._library
        try:
            yield self._progress("")
            root = await library.resolve(image.manifests, image.reference)
            self._digest, self._total = str(root.ref.digest), root.ref.size
            read, wanted = partial(read_manifest, library, image.manifests), partial(chosen, platforms=self._platforms)
            objects = await walk(root, read, wanted)
            blobs = [packed for packed in objects if packed.kind == "blobs"]
            self._total = sum(packed.ref.size for packed in objects)
            self._done = self._total - sum(packed.ref.size for packed in blobs)
            for packed in blobs:
                async with aclosing(library.read(locator_of(image, packed), packed.ref, 0, packed.ref.size)) as chunks:
                    async for chunk in chunks:
                        self._done += len(chunk)
                        if trio.current_time() - self._last_event >= PROGRESS_EVERY_S:
                            yield self._progress(str(packed.ref.digest))
            yield self._progress(self._digest)
        except ShoalError as failure:
            error = str(failure)
        yield PullResult(
            ok=not error,
            image=str(image),
            seconds=trio.current_time() - self._since,
            digest=self._digest,
            error=error,
            bytes_total=self._total,
            by_source=self._by_source(),
        )

    def _by_source(self) -> dict[str, int]:
        now = by_name(self._ledger.bytes_served)
        return {source: now[source] - self._before[source] for source in now}

    def _progress(self, digest: str) -> PullProgress:
        self._last_event = trio.current_time()
        return PullProgress(
            phase="pulling" if digest else "resolving",
            object=digest,
            bytes_done=self._done,
            bytes_total=self._total,
            by_source=self._by_source(),
        )
