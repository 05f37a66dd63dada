"""The control socket: `ControlApi` as HTTP and JSON over a unix socket, for p2pctl and `curl --unix-socket`.

    GET /status /peers /images /cache /doctor    GET /why?image=NAME    GET /tags[?match=PATTERN]
    POST /pull?image=NAME[&all_platforms=1]

and those of node/control/image_routes.py. Answers are the documents of node/api/documents.py; a pull is a stream of
JSON lines. Errors are `{"error": text}`. The socket's file mode is 0660: its owner
and group may use it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path

import msgspec
import trio

from node.api.documents import ControlApi, PullResult
from node.oci.references import ImageName
from node.telemetry.metrics import CONTENT_TYPE, Metrics
from node.web.server import Handler, Limits, Request, Response, serve_http
from protocol.errors import BadInputError, DeniedError, NotFoundError, ShoalError, UnavailableError

log = logging.getLogger(__name__)

SOCKET_MODE = 0o660
MAX_SOCKET_PATH = 107
"""Bytes of sockaddr_un.sun_path, less its end mark."""

LIMITS = Limits(connections=64, descriptors=1)
"""For the server: an archive's file comes with the request, since p2pd may not open what p2pctl's user may."""
METRICS_LIMITS = Limits(connections=16, body_bytes=0, methods=("GET", "HEAD"))
"""A few scrapers, each with a connection that it keeps."""
_BACKLOG = 16
_STATUS_CODES = ((BadInputError, 400), (DeniedError, 403), (NotFoundError, 404), (UnavailableError, 503))
_OTHER_ERROR = 502
"""A peer or a registry is at fault, and no class above says more."""


Routes = Mapping[str, tuple[str, Handler]]
"""Path to method and handler."""


def control_handler(api: ControlApi, more: Routes) -> Handler:
    documents: Mapping[str, Callable[[], Awaitable[msgspec.Struct]]] = {
        "/status": api.status,
        "/peers": api.peers,
        "/images": api.images,
        "/cache": api.cache,
        "/doctor": api.doctor,
    }

    async def route(request: Request) -> Response:
        if request.path == "/pull":
            if request.method != "POST":
                return _error(405, "a pull is a POST", {"Allow": "POST"})
            return _pull(api, request)
        if request.path in more:
            method, answer = more[request.path]
            if request.method != method:
                return _error(405, f"{request.path} is a {method}", {"Allow": method})
            return await answer(request)
        known = request.path in ("/why", "/tags") or request.path in documents
        if not known:
            return _error(404, f"no such path: {request.path[:200]}")
        if request.method not in ("GET", "HEAD"):
            return _error(405, f"{request.path} is read with GET", {"Allow": "GET, HEAD"})
        if request.path == "/why":
            return document(await api.why(image_of(request)))
        if request.path == "/tags":
            return document(await api.tags(request.query.get("match") or "*"))
        return document(await documents[request.path]())

    async def handle(request: Request) -> Response:
        try:
            return await route(request)
        except ShoalError as error:
            status = next((code for kind, code in _STATUS_CODES if isinstance(error, kind)), _OTHER_ERROR)
            return _error(status, str(error))

    return handle


def image_of(request: Request) -> ImageName:
    text = request.query.get("image", "")
    if not text:
        raise BadInputError("which image? add ?image=NAME")
    return ImageName.parse(text)


def _pull(api: ControlApi, request: Request) -> Response:
    image = image_of(request)
    everything = request.query.get("all_platforms", "") in ("1", "true")
    return Response(200, {"Content-Type": "application/x-ndjson"}, _lines(api, image, everything))


async def _lines(api: ControlApi, image: ImageName, everything: bool) -> AsyncGenerator[bytes, None]:
    started = trio.current_time()
    try:
        async with aclosing(api.pull(image, all_platforms=everything)) as events:
            async for event in events:
                yield line(event)
    except ShoalError as error:
        seconds = trio.current_time() - started
        yield line(PullResult(ok=False, image=str(image), seconds=seconds, error=str(error)))


def line(event: msgspec.Struct) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def document(answer: msgspec.Struct) -> Response:
    return Response(200, {"Content-Type": "application/json"}, msgspec.json.encode(answer) + b"\n")


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    body = msgspec.json.encode({"error": text}) + b"\n"
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, body)


def metrics_handler(metrics: Metrics) -> Handler:
    """GET /metrics, for a listener of its own."""

    async def handle(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        if request.path != "/metrics":
            return _error(404, "only /metrics is here")
        if request.method not in ("GET", "HEAD"):
            return _error(405, "metrics are read with GET", {"Allow": "GET, HEAD"})
        return Response(200, {"Content-Type": CONTENT_TYPE}, metrics.render())

    return handle


@contextmanager
def control_socket(path: Path) -> Iterator[trio.SocketListener]:
    """Listen on a unix socket; its file is there from entering to leaving. Raises BadInputError where it can't be.

    A socket file that nobody answers on is what an unclean stop left, and is replaced. Anything else is kept.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _clear_stale(path)
            _listen(sock, path)
        except OSError as error:
            raise BadInputError(f"control.socket: cannot listen on {path}: {error.strerror or error}") from error
        made = path.stat()
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        finally:
            _remove(path, made)


def _clear_stale(path: Path) -> None:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise BadInputError(f"control.socket: {path} is longer than the {MAX_SOCKET_PATH} bytes of a socket's path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadInputError(f"control.socket: {path} is there and is not a socket: remove it, or choose another")
        if _answers(path):
            raise BadInputError(f"control.socket: another daemon answers on {path}: stop it, or choose another")
        log.info("replacing the control socket of a daemon that is gone", extra={"path": path})
        path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its backlog is full: somebody listens
        return True


def _listen(sock: socket.socket, path: Path) -> None:
    """Nobody can connect before `listen`, so the mode is right from the first connection on."""
    sock.bind(str(path))
    path.chmod(SOCKET_MODE)
    sock.listen(_BACKLOG)


def _remove(path: Path, made: os.stat_result) -> None:
    """Only our own: the file may have been replaced since."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
            path.unlink()


async def serve_control(
    api: ControlApi,
    path: Path,
    more: Routes | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `api` on a unix socket until cancelled, and `more` beside it."""
    with control_socket(path) as listener:
        await serve_http([listener], control_handler(api, more or {}), limits=LIMITS, task_status=task_status)
