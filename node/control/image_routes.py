"""`OfflineApi` on the control socket:

    POST /export?image=NAME[&platforms=A,B]    POST /import[?name=NAME][&pin=1]    with one open file (SCM_RIGHTS)
    POST /pin?image=NAME[&platforms=A,B]       POST /unpin?image=NAME    GET /pins
    POST /prefetch with a PrefetchOrder        GET /prefetched           POST /prefetch/cancel
    POST /gc?older_than=DURATION or ?to=SIZE [&dry_run=1]

Without platforms an export has all, and a pin this node's; `platforms=all` names all. Export, import and pin answer
with JSON lines, the last of which is a WorkResult.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import trio

from node.api.image_documents import OfflineApi, PrefetchOrder, WorkEvent, WorkResult
from node.config.quantities import Duration, Size
from node.control.routes import Routes, document, image_of, line
from node.oci.platforms import Platform, own_platform, parse_platforms
from node.oci.references import ImageName
from node.web.server import Request, Response
from protocol.errors import UNDECODABLE, BadInputError, ShoalError


def offline_routes(api: OfflineApi) -> Routes:
    async def export(request: Request) -> Response:
        platforms = _platforms(request, ())
        return await _work(api.export_image(image_of(request), platforms, _descriptor(request)))

    async def import_(request: Request) -> Response:
        text = request.query.get("name", "")
        name = ImageName.parse(text) if text else None
        return await _work(api.import_archive(_descriptor(request), name, pin=_flag(request, "pin")))

    async def pin(request: Request) -> Response:
        return await _work(api.pin(image_of(request), _platforms(request, (own_platform(),))))

    async def unpin(request: Request) -> Response:
        return document(await api.unpin(image_of(request)))

    async def pins(request: Request) -> Response:
        return document(await api.pins())

    async def prefetch(request: Request) -> Response:
        try:
            order = msgspec.json.decode(request.body, type=PrefetchOrder)
        except UNDECODABLE as error:
            raise BadInputError(f"the body is no PrefetchOrder: {error}") from error
        return document(await api.prefetch(order))

    async def prefetched(request: Request) -> Response:
        return document(await api.prefetch_status())

    async def cancel(request: Request) -> Response:
        return document(await api.prefetch_cancel())

    async def gc(request: Request) -> Response:
        older, to = request.query.get("older_than", ""), request.query.get("to", "")
        report = await api.gc(
            older_than_s=Duration.read("older_than", older).seconds if older else None,
            to_bytes=Size.read("to", to).bytes if to else None,
            dry_run=_flag(request, "dry_run"),
        )
        return document(report)

    return {
        "/export": ("POST", export), "/import": ("POST", import_), "/pin": ("POST", pin), "/unpin": ("POST", unpin),
        "/pins": ("GET", pins), "/prefetch": ("POST", prefetch), "/prefetched": ("GET", prefetched),
        "/prefetch/cancel": ("POST", cancel), "/gc": ("POST", gc),
    }  # fmt: skip


def _flag(request: Request, name: str) -> bool:
    return request.query.get(name, "") in ("1", "true")


def _platforms(request: Request, without: tuple[Platform, ...]) -> tuple[Platform, ...]:
    text = request.query.get("platforms", "")
    if text == "all":
        return ()
    return parse_platforms(text.split(",")) if text else without


def _descriptor(request: Request) -> int:
    if not request.descriptors:
        raise BadInputError(
            "no open file came with the request: p2pctl sends it (SCM_RIGHTS, with the first bytes); curl can't"
        )
    return request.descriptors[0]


async def _work(events: AsyncGenerator[WorkEvent, None]) -> Response:
    await trio.lowlevel.checkpoint()
    return Response(200, {"Content-Type": "application/x-ndjson"}, _lines(events))


async def _lines(events: AsyncGenerator[WorkEvent, None]) -> AsyncGenerator[bytes, None]:
    started = trio.current_time()
    try:
        async with aclosing(events):
            async for event in events:
                yield line(event)
    except ShoalError as error:
        yield line(WorkResult(ok=False, seconds=trio.current_time() - started, error=str(error)))
