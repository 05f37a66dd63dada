"""The control API: HTTP and JSON over a unix socket, for p2pctl and `curl --unix-socket`.

    GET /status /peers /images /cache /doctor    GET /why?image=NAME    GET /tags[?match=PATTERN]
    POST /pull?image=NAME[&all_platforms=1]

and the routes of image_routes.py, cluster_routes.py and reload.py. All of them are rows of one table, in which
`control_handler` looks up each request. An answer is a JSON document of node/api/documents.py or node/api/
image_documents.py, or a stream of JSON lines; an error is `{"error": text}`, or the last line of a stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from node.api.documents import ControlApi, PullResult
from node.control.socket import control_socket
from node.oci.references import ImageName
from node.telemetry.metrics import CONTENT_TYPE, Metrics
from node.web.server import Handler, Limits, Request, Response, serve_http
from protocol.errors import BadInputError, DeniedError, NotFoundError, ShoalError, UnavailableError

LIMITS = Limits(connections=64, descriptors=1)
"""For the server: an archive's file comes with the request, since p2pd may not open what p2pctl's user may."""
METRICS_LIMITS = Limits(connections=16, body_bytes=0, methods=("GET", "HEAD"))
"""A few scrapers, each with a connection that it keeps."""
_STATUS_CODES = ((BadInputError, 400), (DeniedError, 403), (NotFoundError, 404), (UnavailableError, 503))
_OTHER_ERROR = 502
"""A peer or a registry is at fault, and no class above says more."""


class Route(NamedTuple):
    method: str
    path: str
    handler: Handler


def control_routes(api: ControlApi) -> Iterable[Route]:
    async def pull(request: Request) -> Response:
        image = image_of(request)
        events = api.pull(image, all_platforms=flag(request, "all_platforms"))
        return await lines_of(events, partial(PullResult, ok=False, image=str(image)))

    return (
        Route("GET", "/status", document_of(lambda _: api.status())),
        Route("GET", "/peers", document_of(lambda _: api.peers())),
        Route("GET", "/images", document_of(lambda _: api.images())),
        Route("GET", "/cache", document_of(lambda _: api.cache())),
        Route("GET", "/doctor", document_of(lambda _: api.doctor())),
        Route("GET", "/why", document_of(lambda request: api.why(image_of(request)))),
        Route("GET", "/tags", document_of(lambda request: api.tags(request.query.get("match") or "*"))),
        Route("POST", "/pull", pull),
    )


def control_handler(routes: Iterable[Route]) -> Handler:
    """A route with GET answers HEAD too."""
    table = {route.path: route for route in routes}

    async def handle(request: Request) -> Response:
        route = table.get(request.path)
        if route is None:
            return _error(404, f"no such path: {request.path[:200]}")
        methods = ("GET", "HEAD") if route.method == "GET" else (route.method,)
        if request.method not in methods:
            needs = "read with GET" if route.method == "GET" else f"a {route.method}"
            return _error(405, f"{route.path} is {needs}", {"Allow": ", ".join(methods)})
        try:
            return await route.handler(request)
        except ShoalError as error:
            status = next((code for kind, code in _STATUS_CODES if isinstance(error, kind)), _OTHER_ERROR)
            return _error(status, str(error))

    return handle


def image_of(request: Request) -> ImageName:
    text = request.query.get("image", "")
    if not text:
        raise BadInputError("which image? add ?image=NAME")
    return ImageName.parse(text)


def flag(request: Request, name: str) -> bool:
    return request.query.get(name, "") in ("1", "true")


def document_of(answer: Callable[[Request], Awaitable[msgspec.Struct]]) -> Handler:
    async def handle(request: Request) -> Response:
        return Response(200, {"Content-Type": "application/json"}, _line(await answer(request)))

    return handle


async def lines_of(events: AsyncGenerator[msgspec.Struct, None], failed: Callable[..., msgspec.Struct]) -> Response:
    """Stream the events; an error becomes the last line, `failed(seconds=..., error=...)`."""

    async def lines() -> AsyncGenerator[bytes, None]:
        started = trio.current_time()
        try:
            async with aclosing(events):
                async for event in events:
                    yield _line(event)
        except ShoalError as error:
            yield _line(failed(seconds=trio.current_time() - started, error=str(error)))

    await trio.lowlevel.checkpoint()
    return Response(200, {"Content-Type": "application/x-ndjson"}, lines())


def _line(document: msgspec.Struct) -> bytes:
    return msgspec.json.encode(document) + b"\n"


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    body = msgspec.json.encode({"error": text}) + b"\n"
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, body)


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
