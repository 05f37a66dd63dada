"""Prefetch: the node fetches ordered images one after the other, in the background: at a rate, within hours of the day,
and after the reads of clients.

A file has the orders that are not done, so that the work continues after a restart. Bytes: docs/FORMATS.md, "Prefetch".
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec
import trio

from node.api.documents import PrefetchOrder, PrefetchReport, PrefetchRow, PrefetchState
from node.blocks.fetcher import Fetcher
from node.blocks.values import Group, Obtained, Stretch
from node.config.quantities import Window, local_time
from node.content.contract import Library
from node.content.image_walk import locator_of, survey
from node.content.verification import ObjectVerifier
from node.oci.layout import Packed
from node.oci.platforms import own_platform, parse_platforms
from node.oci.references import ImageName
from node.runtime.shared_work import Order
from node.runtime.state_files import save
from protocol.errors import UNDECODABLE, BadInputError, ShoalError, UnavailableError
from protocol.ids import ObjectRef, Piece
from protocol.stripes import stripe_blocks, stripe_count

log = logging.getLogger(__name__)

MAX_ORDERED = 4096
"""Images that wait, and as many that ended and are still reported."""
MAX_FILE = 16 << 20
DEPTH = 2
"""Stripes under way: one arrives while the one before is hashed. More would take the places of clients' reads."""
AGAIN_S, AGAIN_MOST_S = 30.0, 900.0
"""Time until the next attempt after a failure that may pass, doubled each time. Attempts do not end, since a registry
may be out of reach for a night; an operator can cancel them."""
GIVE_WAY_S = 10.0
"""Longest wait for clients before each block: clients that read without end must not stop prefetch."""
CLOCK_S = 30.0
"""Interval at which the wall clock is read again, because it may be set."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A stripe under way, and its blocks that came."""

    order: Order[Group, Obtained]
    blocks: dict[int, Obtained]


@dataclass(slots=True)
class Pace:
    """The pace of a reader, in bytes a second (0: no limit). `idle` returns once no client of this node reads."""

    rate: int
    hours: Window | None
    idle: Callable[[], Awaitable[None]]
    clock: Callable[[], datetime] = local_time
    waits_for: str = ""
    _next_at: float = field(default_factory=trio.current_time)

    async def wait(self, count: int) -> None:
        """Wait until the next `count` bytes may be requested."""
        self.waits_for = "clients that read now"
        with trio.move_on_after(GIVE_WAY_S):
            await self.idle()
        self.waits_for = "its rate"
        await trio.sleep_until(self._next_at)
        self.waits_for = "its hours of the day"
        while self.hours is not None and (seconds := self.hours.opens_in(self.clock())):  # noqa: ASYNC110 - setting a clock wakes no task
            await trio.sleep(min(seconds, CLOCK_S))
        self.waits_for = ""
        if self.rate:
            self._next_at = max(self._next_at, trio.current_time()) + count / self.rate


class _File(msgspec.Struct, frozen=True):
    version: Literal[1]
    orders: tuple[PrefetchOrder, ...]


@dataclass(slots=True, eq=False)
class _Item:
    """One image of an order."""

    name: ImageName
    order: PrefetchOrder
    state: PrefetchState = "waiting"
    error: str = ""
    done: int = 0
    total: int = 0
    again_s: float = AGAIN_S
    not_before: float = 0.0

    @property
    def row(self) -> PrefetchRow:
        return PrefetchRow(
            image=str(self.name),
            state=self.state,
            bytes_done=self.done,
            bytes_total=self.total,
            rate=self.order.rate,
            window=self.order.window,
            error=self.error,
        )


@dataclass(slots=True)
class Prefetcher:
    path: Path
    _: KW_ONLY
    library: Library
    verifier: ObjectVerifier
    fetcher: Fetcher
    holds: Callable[[Piece], bool]
    holds_all: Callable[[ObjectRef], bool]
    _items: list[_Item] = field(default_factory=list)
    _over: deque[_Item] = field(default_factory=lambda: deque(maxlen=MAX_ORDERED))
    _pace: Pace | None = None
    _working: trio.CancelScope | None = None
    _news: trio.Event = field(default_factory=trio.Event)

    def report(self) -> PrefetchReport:
        rows = tuple(item.row for item in (*self._over, *self._items))
        return PrefetchReport(rows=rows, waits_for=self._pace.waits_for if self._pace else "")

    def order(self, order: PrefetchOrder) -> None:
        """Accept an order, or raise BadInputError and accept nothing of it."""
        items = _items(order)
        if len(self._items) + len(items) > MAX_ORDERED:
            raise BadInputError(f"{len(self._items)} images wait already, and at most {MAX_ORDERED} may")
        self._items += items
        self._save()
        self._news.set()

    def cancel(self) -> None:
        """Cancel all images that are not done."""
        for item in self._items:
            item.state = "cancelled"
            self._over.append(item)
        self._items.clear()
        self._save()
        if self._working is not None:
            self._working.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._items = self.load()
        task_status.started()
        while True:
            self._news = trio.Event()
            now = trio.current_time()
            item = next((item for item in self._items if item.not_before <= now), None)
            if item is None:
                with trio.move_on_at(min((item.not_before for item in self._items), default=float("inf"))):
                    await self._news.wait()
                continue
            with trio.CancelScope() as self._working:
                await self._work_on(item)
            self._working = self._pace = None

    async def _work_on(self, item: _Item) -> None:
        item.state = "running"
        try:
            await self._fetch(item)
        except UnavailableError as error:
            self._put_off(item, str(error))
        except ShoalError as error:
            self._end(item, "failed", str(error))
        except Exception as error:  # a bug that one image shows is reported, and must not end the daemon
            log.exception("prefetch of %s failed", item.name)
            self._end(item, "failed", f"internal error: {type(error).__name__}")
        else:
            self._end(item, "done", "")

    def _put_off(self, item: _Item, error: str) -> None:
        if item in self._items:  # else it was cancelled meanwhile
            log.info("prefetch of %s continues in %.0f s: %s", item.name, item.again_s, error)
            item.state, item.error = "waiting", error
            item.not_before = trio.current_time() + item.again_s
            item.again_s = min(2 * item.again_s, AGAIN_MOST_S)

    def _end(self, item: _Item, state: PrefetchState, error: str) -> None:
        if item in self._items:
            item.state, item.error = state, error
            self._items.remove(item)
            self._over.append(item)
            self._save()

    async def _fetch(self, item: _Item) -> None:
        hours = Window(item.order.window) if item.order.window else None
        self._pace = pace = Pace(item.order.rate, hours, self.fetcher.idle)
        await pace.wait(0)
        platforms = () if item.order.all_platforms else parse_platforms(item.order.platforms) or (own_platform(),)
        image = await survey(self.library, item.name, platforms)
        item.done, item.total = 0, image.size
        for packed in image.objects:
            await self._object(item, packed, pace)

    async def _object(self, item: _Item, packed: Packed, pace: Pace) -> None:
        """Fetch an object's missing blocks and verify its digest, as for a client."""
        ref, locator = packed.ref, locator_of(item.name, packed)
        if self.holds_all(ref):
            item.done += ref.size
            return
        hasher = hashlib.new(ref.digest.algorithm)
        ahead: deque[_Ahead] = deque()

        async def take() -> None:
            blocks = ahead[0].blocks
            await ahead[0].order.wait()
            ahead.popleft().order.release()
            for index in sorted(blocks):
                data = blocks[index].held.data
                hasher.update(data)
                item.done += len(data)
            item.again_s = AGAIN_S

        try:
            for number in range(stripe_count(ref.block_count)):
                stretch = Stretch(locator, ref, tuple(stripe_blocks(number, ref.block_count)), background=True)
                for index in stretch.indices:
                    if not self.holds(stretch.piece(index)):
                        await pace.wait(ref.block_length(index))
                blocks: dict[int, Obtained] = {}
                ahead.append(_Ahead(self.fetcher.begin(stretch, False, blocks.__setitem__), blocks))
                if len(ahead) == DEPTH:
                    await take()
            while ahead:
                await take()
        finally:
            for reading in ahead:
                reading.order.release()
        if hasher.hexdigest() == ref.digest.hex:
            await self.verifier.check(locator, ref, hasher.hexdigest())
            return
        # A client's read replaces the false blocks and quarantines their signers.
        async with aclosing(self.library.read(locator, ref, 0, ref.size)) as chunks:
            async for _ in chunks:
                pass

    def load(self) -> list[_Item]:
        try:
            with self.path.open("rb") as file:
                orders = msgspec.json.decode(file.read(MAX_FILE), type=_File).orders
            return [item for order in orders[:MAX_ORDERED] for item in _items(order)][:MAX_ORDERED]
        except FileNotFoundError:
            return []
        except (OSError, *UNDECODABLE, BadInputError) as error:
            log.warning("%s is not readable, and its orders are lost: %s", self.path, error)
            return []

    def _save(self) -> None:
        orders = tuple(msgspec.structs.replace(item.order, images=(str(item.name),)) for item in self._items)
        save(self.path, msgspec.json.encode(_File(1, orders)), "the orders of prefetch")


def _items(order: PrefetchOrder) -> list[_Item]:
    """Raises BadInputError."""
    if not order.images:
        raise BadInputError("no image is named")
    if order.window:
        Window(order.window)
    if order.rate < 0:
        raise BadInputError("the rate is below 0")
    parse_platforms(order.platforms)
    return [_Item(ImageName.parse(image), order) for image in dict.fromkeys(order.images)]
