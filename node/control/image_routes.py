"""`ImageApi` on the control socket:

    POST /export?image=NAME[&platforms=A,B]    POST /import[?name=NAME][&pin=1]    with one open file (SCM_RIGHTS)
    POST /pin?image=NAME[&platforms=A,B]       POST /unpin?image=NAME    GET /pins
    POST /prefetch with a PrefetchOrder        GET /prefetched           POST /prefetch/cancel
    POST /gc?older_than=DURATION or ?to=SIZE [&dry_run=1]

Without `platforms` an export contains all platforms, and a pin holds this node's; `platforms=all` selects all. Export,
import and pin answer with JSON lines, the last of which is a WorkResult.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial

import msgspec

from node.api.image_documents import GcReport, ImageApi, PrefetchOrder, PrefetchReport, WorkEvent, WorkResult
from node.config.quantities import Duration, Size
from node.control.routes import Route, document_of, flag, image_of, lines_of
from node.oci.platforms import Platform, own_platform, parse_platforms
from node.oci.references import ImageName
from node.web.server import Handler, Request, Response
from protocol.errors import UNDECODABLE, BadInputError


def image_routes(api: ImageApi) -> Iterable[Route]:
    def export(request: Request) -> AsyncGenerator[WorkEvent, None]:
        return api.export_image(image_of(request), _platforms(request, ()), _descriptor(request))

    def import_(request: Request) -> AsyncGenerator[WorkEvent, None]:
        text = request.query.get("name", "")
        name = ImageName.parse(text) if text else None
        return api.import_archive(_descriptor(request), name, pin=flag(request, "pin"))

    def pin(request: Request) -> AsyncGenerator[WorkEvent, None]:
        return api.pin(image_of(request), _platforms(request, (own_platform(),)))

    async def prefetch(request: Request) -> PrefetchReport:
        try:
            order = msgspec.json.decode(request.body, type=PrefetchOrder)
        except UNDECODABLE as error:
            raise BadInputError(f"the body is no PrefetchOrder: {error}") from error
        return await api.prefetch(order)

    async def gc(request: Request) -> GcReport:
        older, to = request.query.get("older_than", ""), request.query.get("to", "")
        return await api.gc(
            older_than_s=Duration.read("older_than", older).seconds if older else None,
            to_bytes=Size.read("to", to).bytes if to else None,
            dry_run=flag(request, "dry_run"),
        )

    return (
        Route("POST", "/export", _work(export)),
        Route("POST", "/import", _work(import_)),
        Route("POST", "/pin", _work(pin)),
        Route("POST", "/unpin", document_of(lambda request: api.unpin(image_of(request)))),
        Route("GET", "/pins", document_of(lambda _: api.pins())),
        Route("POST", "/prefetch", document_of(prefetch)),
        Route("GET", "/prefetched", document_of(lambda _: api.prefetch_status())),
        Route("POST", "/prefetch/cancel", document_of(lambda _: api.prefetch_cancel())),
        Route("POST", "/gc", document_of(gc)),
    )


def _platforms(request: Request, default: tuple[Platform, ...]) -> tuple[Platform, ...]:
    text = request.query.get("platforms", "")
    if text == "all":
        return ()
    return parse_platforms(text.split(",")) if text else default


def _descriptor(request: Request) -> int:
    if not request.descriptors:
        raise BadInputError(
            "no open file came with the request: p2pctl sends it (SCM_RIGHTS, with the first bytes); curl cannot"
        )
    return request.descriptors[0]


def _work(start: Callable[[Request], AsyncGenerator[WorkEvent, None]]) -> Handler:
    async def handle(request: Request) -> Response:
        return await lines_of(start(request), partial(WorkResult, ok=False))

    return handle
