"""The control API: HTTP and JSON over a unix socket, for p2pctl and `curl --unix-socket`.

    GET /status /peers /images /cache /doctor    GET /why?image=NAME    GET /tags[?match=PATTERN]
    POST /pull?image=NAME[&all_platforms=1]

    POST /export?image=NAME[&platforms=A,B]    POST /import[?name=NAME][&pin=1]    with one open file (SCM_RIGHTS)
    POST /pin?image=NAME[&platforms=A,B]       POST /unpin?image=NAME    GET /pins
    POST /prefetch with a PrefetchOrder        GET /prefetched           POST /prefetch/cancel
    POST /gc?older_than=DURATION or ?to=SIZE [&dry_run=1]
    POST /revoke with a revocation's text      POST /reload (node/control/reload.py)

All of them are rows of one table, in which `control_handler` looks up each request. An answer is a JSON document of
node/api/documents.py, or for pull, export, import and pin a stream of JSON lines; an error is `{"error": text}`, or the
last line of a stream. Without `platforms` an export contains all platforms, and a pin holds this node's;
`platforms=all` selects all.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import trio

from node.api import documents as doc
from node.config.quantities import Duration, Size
from node.control.socket import control_socket
from node.identity.certificates import validity_of
from node.identity.revocations import Revocations
from node.membership.gossip import Gossiper
from node.oci.platforms import Platform, own_platform, parse_platforms
from node.oci.references import ImageName
from node.stages import Admitted
from node.telemetry.metrics import CONTENT_TYPE, Metrics
from node.web.server import Handler, Limits, Request, Response, serve_http
from protocol import errors
from protocol.admission import cluster_id, read_revocation
from protocol.errors import BadInputError

LIMITS = Limits(connections=64, descriptors=1)
"""p2pctl opens an archive and sends the open file, because p2pd may lack the rights of p2pctl's user."""
METRICS_LIMITS = Limits(connections=16, body_bytes=0, methods=("GET", "HEAD"))
"""A few scrapers, each of which keeps its connection open."""
_STATUS_CODES = {
    BadInputError: 400,
    errors.DeniedError: 403,
    errors.UnsignedError: 403,
    errors.NotFoundError: 404,
    errors.UnavailableError: 503,
}
_OTHER_ERROR = 502
"""For all other errors: a peer or a registry is at fault."""


class Route(NamedTuple):
    method: str
    path: str
    handler: Handler


class ControlApi(Protocol):
    """Raises the errors of protocol.errors; NotFoundError for an unknown image.

    `pull` yields progress at a rate suitable for a person, and a PullResult last. Closing the generator ends the pull.
    `tags` takes a glob over `upstream/repository:tag`.
    """

    async def status(self) -> doc.Status: ...

    async def peers(self) -> doc.PeersReport: ...

    async def images(self) -> doc.ImagesReport: ...

    async def tags(self, pattern: str) -> doc.TagsReport: ...

    async def cache(self) -> doc.CacheReport: ...

    def pull(self, image: ImageName, *, all_platforms: bool) -> AsyncGenerator[doc.PullEvent, None]: ...

    async def why(self, image: ImageName) -> doc.WhyReport: ...

    async def doctor(self) -> doc.DoctorReport: ...


def control_routes(api: ControlApi) -> Iterable[Route]:
    async def pull(request: Request) -> Response:
        image = _image(request)
        events = api.pull(image, all_platforms=_flag(request, "all_platforms"))
        return await _lines_of(events, partial(doc.PullResult, ok=False, image=str(image)))

    return (
        Route("GET", "/status", document_of(lambda _: api.status())),
        Route("GET", "/peers", document_of(lambda _: api.peers())),
        Route("GET", "/images", document_of(lambda _: api.images())),
        Route("GET", "/cache", document_of(lambda _: api.cache())),
        Route("GET", "/doctor", document_of(lambda _: api.doctor())),
        Route("GET", "/why", document_of(lambda request: api.why(_image(request)))),
        Route("GET", "/tags", document_of(lambda request: api.tags(request.query.get("match") or "*"))),
        Route("POST", "/pull", pull),
    )


class ImageApi(Protocol):
    """Descriptors are open files that the caller closes. Each generator ends with a WorkResult, also after an error.

    Closing a generator cancels its work: a half-written archive is useless, and no name of a half-imported one is kept.
    """

    def export_image(
        self, image: ImageName, platforms: Sequence[Platform], descriptor: int
    ) -> AsyncGenerator[doc.WorkEvent, None]: ...

    def import_archive(
        self, descriptor: int, name: ImageName | None, *, pin: bool
    ) -> AsyncGenerator[doc.WorkEvent, None]: ...

    def pin(self, image: ImageName, platforms: Sequence[Platform]) -> AsyncGenerator[doc.WorkEvent, None]: ...

    async def unpin(self, image: ImageName) -> doc.PinsReport: ...

    async def pins(self) -> doc.PinsReport: ...

    async def prefetch(self, order: doc.PrefetchOrder) -> doc.PrefetchReport: ...

    async def prefetch_status(self) -> doc.PrefetchReport: ...

    async def prefetch_cancel(self) -> doc.PrefetchReport: ...

    async def gc(self, *, older_than_s: float | None, to_bytes: int | None, dry_run: bool) -> doc.GcReport: ...


def image_routes(api: ImageApi) -> Iterable[Route]:
    def export(request: Request) -> AsyncGenerator[doc.WorkEvent, None]:
        return api.export_image(_image(request), _platforms(request, ()), _descriptor(request))

    def import_(request: Request) -> AsyncGenerator[doc.WorkEvent, None]:
        text = request.query.get("name", "")
        name = ImageName.parse(text) if text else None
        return api.import_archive(_descriptor(request), name, pin=_flag(request, "pin"))

    def pin(request: Request) -> AsyncGenerator[doc.WorkEvent, None]:
        return api.pin(_image(request), _platforms(request, (own_platform(),)))

    async def prefetch(request: Request) -> doc.PrefetchReport:
        try:
            order = msgspec.json.decode(request.body, type=doc.PrefetchOrder)
        except errors.UNDECODABLE as error:
            raise BadInputError(f"the body is not a PrefetchOrder: {error}") from error
        return await api.prefetch(order)

    async def gc(request: Request) -> doc.GcReport:
        older, to = request.query.get("older_than", ""), request.query.get("to", "")
        return await api.gc(
            older_than_s=Duration.read("older_than", older).seconds if older else None,
            to_bytes=Size.read("to", to).bytes if to else None,
            dry_run=_flag(request, "dry_run"),
        )

    return (
        Route("POST", "/export", _work(export)),
        Route("POST", "/import", _work(import_)),
        Route("POST", "/pin", _work(pin)),
        Route("POST", "/unpin", document_of(lambda request: api.unpin(_image(request)))),
        Route("GET", "/pins", document_of(lambda _: api.pins())),
        Route("POST", "/prefetch", document_of(prefetch)),
        Route("GET", "/prefetched", document_of(lambda _: api.prefetch_status())),
        Route("POST", "/prefetch/cancel", document_of(lambda _: api.prefetch_cancel())),
        Route("POST", "/gc", document_of(gc)),
    )


def cluster_row(admitted: Admitted) -> doc.ClusterRow:
    verifier = admitted.verifier.credentials
    return doc.ClusterRow(
        id=cluster_id(verifier.authority).hex(),
        admits=admitted.place.authority is not None,
        certificate_ends=validity_of(verifier.certificate).end,
        revocations=len(admitted.revocations.all),
    )


def cluster_routes(gossiper: Gossiper, revocations: Revocations) -> Iterable[Route]:
    """Access to the socket is not enough to revoke a member: each revocation is signed with the authority's key."""

    async def revoke(request: Request) -> doc.RevokeReport:
        await trio.lowlevel.checkpoint()
        revocation = read_revocation(request.body.decode("utf-8", "replace").strip())
        try:
            new = gossiper.revoke((revocation,))
        except errors.PeerMisbehavedError as error:
            raise BadInputError(str(error)) from error
        if revocation.subject not in revocations:
            raise errors.UnavailableError("this cluster can hold no further revocation: it needs a new key")
        return doc.RevokeReport(subject=revocation.subject, new=bool(new), total=len(revocations.all))

    return (Route("POST", "/revoke", document_of(revoke)),)


def control_handler(routes: Iterable[Route]) -> Handler:
    """Looks up each request in a table of the routes. A route with GET answers HEAD too."""
    table = {route.path: route for route in routes}

    async def handle(request: Request) -> Response:
        route = table.get(request.path)
        if route is None:
            return _error(404, f"no such path: {request.path[:200]}")
        methods = ("GET", "HEAD") if route.method == "GET" else (route.method,)
        if request.method not in methods:
            return _error(405, f"{route.path} needs {route.method}", {"Allow": ", ".join(methods)})
        try:
            return await route.handler(request)
        except errors.ShoalError as error:
            status = next((code for kind, code in _STATUS_CODES.items() if isinstance(error, kind)), _OTHER_ERROR)
            return _error(status, str(error))

    return handle


def _image(request: Request) -> ImageName:
    text = request.query.get("image", "")
    if not text:
        raise BadInputError("which image? add ?image=NAME")
    return ImageName.parse(text)


def _flag(request: Request, name: str) -> bool:
    return request.query.get(name, "") in ("1", "true")


def _platforms(request: Request, default: tuple[Platform, ...]) -> tuple[Platform, ...]:
    text = request.query.get("platforms", "")
    if text == "all":
        return ()
    return parse_platforms(text.split(",")) if text else default


def _descriptor(request: Request) -> int:
    if not request.descriptors:
        raise BadInputError(
            "the request needs an open file, which p2pctl sends (SCM_RIGHTS, with the first bytes) and curl cannot send"
        )
    return request.descriptors[0]


def document_of(answer: Callable[[Request], Awaitable[msgspec.Struct]]) -> Handler:
    async def handle(request: Request) -> Response:
        return Response(200, {"Content-Type": "application/json"}, _line(await answer(request)))

    return handle


def _work(start: Callable[[Request], AsyncGenerator[doc.WorkEvent, None]]) -> Handler:
    async def handle(request: Request) -> Response:
        return await _lines_of(start(request), partial(doc.WorkResult, ok=False))

    return handle


async def _lines_of(events: AsyncGenerator[msgspec.Struct, None], failed: Callable[..., msgspec.Struct]) -> Response:
    """Stream the events; an error becomes the last line, `failed(seconds=..., error=...)`."""

    async def lines() -> AsyncGenerator[bytes, None]:
        started = trio.current_time()
        try:
            async with aclosing(events):
                async for event in events:
                    yield _line(event)
        except errors.ShoalError as error:
            yield _line(failed(seconds=trio.current_time() - started, error=str(error)))

    await trio.lowlevel.checkpoint()
    return Response(200, {"Content-Type": "application/x-ndjson"}, lines())


def _line(document: object) -> bytes:
    return msgspec.json.encode(document) + b"\n"


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, _line({"error": text}))


def metrics_handler(metrics: Metrics) -> Handler:
    """GET /metrics, for a TCP listener of its own."""

    async def render(_: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(200, {"Content-Type": CONTENT_TYPE}, metrics.render())

    return control_handler([Route("GET", "/metrics", render)])


async def serve_control(
    path: Path, routes: Iterable[Route], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the routes on a unix socket at `path` until cancelled."""
    with control_socket(path) as listener:
        await serve_http([listener], control_handler(routes), limits=LIMITS, task_status=task_status)
