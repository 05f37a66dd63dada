"""The documents of work on whole images (archives, pins, prefetch, gc), and the interface that provides them.

As in node/api/documents.py, fields are added, never renamed; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

from node.api.documents import Document
from node.oci.platforms import Platform
from node.oci.references import ImageName

Phase = Literal["checking", "storing", "reading", "writing"]
PrefetchState = Literal["waiting", "running", "done", "failed", "cancelled"]


class WorkProgress(Document, frozen=True, tag_field="event", tag="progress"):
    """`object` is the digest that was processed last."""

    phase: Phase
    object: str = ""
    bytes_done: int = 0
    bytes_total: int = 0


class WorkResult(Document, frozen=True, tag_field="event", tag="result"):
    """The last line of every export, import and pin. `images` are `NAME@DIGEST`."""

    ok: bool
    seconds: float
    images: tuple[str, ...] = ()
    objects: int = 0
    bytes_total: int = 0
    error: str = ""


WorkEvent = WorkProgress | WorkResult


class PinRow(Document, frozen=True):
    """`bytes_held` are on this node's disk; `since` is Unix time."""

    image: str
    digest: str
    size: int
    bytes_held: int
    since: float


class PinsReport(Document, frozen=True):
    """`bytes` counts objects shared by several images once; at most `most_bytes` may be pinned."""

    pins: tuple[PinRow, ...]
    bytes: int
    most_bytes: int


class PrefetchOrder(Document, frozen=True, forbid_unknown_fields=True):
    """Without `platforms`, this node's; `all_platforms` overrides them. `rate` is in bytes a second, 0 for no limit;
    `window` is "22:00-06:00", or "" for any time."""

    images: tuple[str, ...]
    platforms: tuple[str, ...] = ()
    all_platforms: bool = False
    rate: int = 0
    window: str = ""


class PrefetchRow(Document, frozen=True):
    image: str
    state: PrefetchState
    bytes_done: int = 0
    bytes_total: int = 0
    rate: int = 0
    window: str = ""
    error: str = ""


class PrefetchReport(Document, frozen=True):
    """`waits_for` is the reason why the current order waits; empty if it does not."""

    rows: tuple[PrefetchRow, ...]
    waits_for: str = ""


class GcReport(Document, frozen=True):
    """`bytes` of disk were freed, or with `dry_run` would be; `held_bytes` are left."""

    dry_run: bool
    pieces: int
    bytes: int
    held_bytes: int
    pinned_bytes: int


class ImageApi(Protocol):
    """Descriptors are open files that the caller closes. Each generator ends with a WorkResult, also after an error.

    Closing a generator cancels its work: a half-written archive is useless, and no name of a half-imported one is kept.
    """

    def export_image(
        self, image: ImageName, platforms: Sequence[Platform], descriptor: int
    ) -> AsyncGenerator[WorkEvent, None]: ...

    def import_archive(
        self, descriptor: int, name: ImageName | None, *, pin: bool
    ) -> AsyncGenerator[WorkEvent, None]: ...

    def pin(self, image: ImageName, platforms: Sequence[Platform]) -> AsyncGenerator[WorkEvent, None]: ...

    async def unpin(self, image: ImageName) -> PinsReport: ...

    async def pins(self) -> PinsReport: ...

    async def prefetch(self, order: PrefetchOrder) -> PrefetchReport: ...

    async def prefetch_status(self) -> PrefetchReport: ...

    async def prefetch_cancel(self) -> PrefetchReport: ...

    async def gc(self, *, older_than_s: float | None, to_bytes: int | None, dry_run: bool) -> GcReport: ...
