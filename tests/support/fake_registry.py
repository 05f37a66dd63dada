"""A registry of one repository in the test's own trio run, with the faults of real registries on demand.

In the same process, a test of the registry client can read each request, and change faults and credentials between two
requests. tests/support/faulty_origin.py breaks bodies for whole daemons.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from urllib.parse import parse_qsl

import trio

from node.oci.challenges import Credentials
from node.oci.references import Locator
from node.web.server import Buffer, Request, Response, serve_http
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE
from tests.support.blobs import Blob

BLOB = Blob.random(7, 3 * BLOCK_SIZE + 77).content
MANIFEST = b'{"schemaVersion": 2, "layers": []}'
BLOB_REF, MANIFEST_REF = Blob(BLOB).ref, Blob(MANIFEST).ref
SCOPE = "repository:org/app:pull"
MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
BLOBS = Locator("fake", "org/app", "blobs")
MANIFESTS = Locator("fake", "org/app", "manifests")


def cut(first: int, count: int) -> list[bytes]:
    """`count` blocks of BLOB from block `first`."""
    return [BLOB[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(first, first + count)]


async def serve(nursery: trio.Nursery, handle: Callable[[Request], Awaitable[Response]]) -> str:
    """Answer requests on a free port of loopback until `nursery` ends; returns the URL."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(partial(serve_http, listeners, handle))
    return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"


class FakeRegistry:
    """Each request to /v2/ gets the next of `faults`: a status, a fault of `blob_answer`, or None (a good answer)."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[int | str | None] = []
        self.scheme = ""
        self.password = ""
        self.identity = ""
        self.tokens = 0
        self.valid_token = ""
        self.elsewhere = ""
        self.retry_after = "0"
        self.manifest = MANIFEST

    async def handle(self, request: Request) -> Response:
        self.requests.append(request)
        if request.path == "/token":
            return self._token(request)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return Response(fault, {"Retry-After": self.retry_after} if fault == 429 else {})
        if not self._allowed(request):
            realm = f'realm="http://{request.headers["host"]}/token?x=1",service="fake"'
            return Response(401, {"WWW-Authenticate": f"{self.scheme} {realm}"})
        if "/manifests/" in request.path:
            return self.answer_manifest(request)
        if request.path.endswith("/tags/list"):
            return Response(
                200, {"Content-Type": "application/json", "Link": "<x>"}, json.dumps(request.query).encode()
            )
        if self.elsewhere:
            return Response(307, {"Location": f"{self.elsewhere}/data?signature=hush"})
        return blob_answer(request, fault)

    def _token(self, request: Request) -> Response:
        if self.identity:
            grant = {"grant_type": "refresh_token", "client_id": "shoal", "refresh_token": self.identity}
            assert dict(parse_qsl(request.body.decode())) == grant | {"service": "fake", "scope": SCOPE}
            self.tokens, self.valid_token = 1, "t1"
            return Response(200, {}, b'{"access_token": "t1"}')
        if self.password and request.headers.get("authorization") != Credentials("u", self.password).header:
            return Response(401)
        self.tokens += 1
        self.valid_token = f"t{self.tokens}"
        assert request.query == {"x": "1", "service": "fake", "scope": SCOPE}
        return Response(200, {}, json.dumps({"token": self.valid_token, "expires_in": 100}).encode())

    def _allowed(self, request: Request) -> bool:
        sent = request.headers.get("authorization", "")
        basic = Credentials("u", self.password).header
        return {
            "": True,
            "Basic": sent == basic,
            "Bearer": bool(self.valid_token) and sent == f"Bearer {self.valid_token}",
        }[self.scheme]

    def answer_manifest(self, request: Request) -> Response:
        if request.path.rpartition("/")[2] not in ("latest", str(MANIFEST_REF.digest)):
            return Response(404)
        digest = Blob(self.manifest).digest if self.manifest != b"forged" else MANIFEST_REF.digest
        headers = {"Docker-Content-Digest": str(digest), "Content-Type": f"{MEDIA_TYPE}; charset=utf-8"}
        return Response(200, headers, self.manifest)


def blob_answer(request: Request, fault: int | str | None) -> Response:
    if not request.path.endswith((str(BLOB_REF.digest), "/data")):
        return Response(404)
    if request.method == "HEAD":
        return Response(403) if fault == "no head" else Response(200, {"Content-Length": str(len(BLOB))})
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if fault == "no ranges" or not match:
        return Response(200, {"Content-Length": str(len(BLOB))}, _pieces(BLOB, fault))
    start, stop = int(match[1]), int(match[2]) + 1
    shown = start + 1 if fault == "other range" else start
    headers = {"Content-Range": f"bytes {shown}-{stop - 1}/{len(BLOB)}", "Content-Length": str(stop - start)}
    return Response(206, headers, _pieces(BLOB[start:stop], fault))


async def _pieces(data: bytes, fault: int | str | None) -> AsyncGenerator[Buffer, None]:
    for start in range(0, len(data), 300_000):
        if fault == "breaks" and start:
            raise UnavailableError("fault on purpose")
        if fault == "stalls" and start:
            await trio.sleep_forever()
        yield data[start : start + 300_000]
