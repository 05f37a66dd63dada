"""The registry that clients on this node talk to: the pull part of OCI distribution 1.1, read-only, over `Library`.

Which upstream is meant is said by `?ns=` (containerd, BuildKit), by the first part of the path (Podman, CRI-O,
skopeo), or by nothing (Docker: docker.io). It is a key into the configured upstreams, never an address.

What clients do with failures shapes the answers. An error status makes them go on to the registry itself, so the head
of a 200 is sent only when the first bytes are there. A body that ends early with FIN is resumed with a Range request,
which may then be answered 503; a body that stalls would hang the pull, so it is cut.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import trio
from cachetools import LRUCache

from node.content.contract import Library
from node.content.listings import Listings
from node.mirror.access import Access, ChallengedError
from node.oci.byte_ranges import Span, parse_range
from node.oci.manifests import Resolved
from node.oci.references import Kind, Locator, canonical, check_reference, is_digest
from node.web.server import FileBody, Limits, Request, Response, error_response
from protocol.erasure import Buffer
from protocol.errors import BadInputError, CorruptObjectError, DeniedError, NotFoundError, UnavailableError
from protocol.ids import Digest

log = logging.getLogger(__name__)

HEAD_S = 25.0
"""containerd waits 30 s for the headers; an error before that lets it go on to the registry itself."""
STALL_S = 25.0
"""A body without progress for so long is cut: longer than the library's own deadlines, far below clients' 5 minutes."""
LIMITS = Limits(methods=("GET", "HEAD"), body_bytes=0)
"""For the server: whatever tries to push is turned away before its body is read."""
BOUNDARY = f"shoal-{secrets.token_hex(12)}"
"""Not to be foreseen: no layer can be made to hold it."""
MAX_MISSING = 4096
"""Names whose absence is remembered, for when the registry is out of reach."""
MAX_CURSOR = 2048
"""Characters of the query of a registry's next page."""
_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<what>manifests|blobs|tags|referrers)/(?P<reference>[^/]+)", re.DOTALL)
_VERSION = {"Docker-Distribution-API-Version": "registry/2.0"}
_READING = ("GET", "HEAD")

_T = TypeVar("_T")


class _ProblemError(Exception):
    """An answer in the specification's error form."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.response = error_response(status, code, message, _VERSION | dict(headers or {}))


@dataclass(frozen=True, slots=True)
class _Target:
    """`locator` is that of blobs for a blob, else that of manifests; `what` is the path's word for the kind."""

    locator: Locator
    what: str
    reference: str

    @property
    def unknown(self) -> str:
        """The error code for what is not there."""
        return {"blobs": "BLOB_UNKNOWN", "manifests": "MANIFEST_UNKNOWN"}.get(self.what, "NAME_UNKNOWN")


class Mirror:
    """`handle` is a handler for `http_server.serve_http`."""

    def __init__(self, library: Library, upstreams: Collection[str], listings: Listings, access: Access) -> None:
        """`upstreams` by their canonical names; it may change."""
        self._library, self._access = library, access
        self._upstreams = upstreams
        self._listings = listings
        self._missing: LRUCache[_Target, str] = LRUCache(MAX_MISSING)
        """With the registry's word for it."""

    async def handle(self, request: Request) -> Response:
        what = request.path[:300]
        try:
            with trio.move_on_after(HEAD_S):
                return await self._route(request)
        except _ProblemError as problem:
            return problem.response
        except ChallengedError as error:
            return error_response(401, "UNAUTHORIZED", str(error), _VERSION | {"WWW-Authenticate": error.challenge})
        except DeniedError as error:
            return _problem(403, "DENIED", error)
        except BadInputError as error:
            return _problem(400, "UNSUPPORTED", error)
        except (UnavailableError, CorruptObjectError) as error:
            log.warning("%s %r: %s", request.method, what, error)
            return _problem(503, "UNAVAILABLE", error)
        log.warning("%s %r: nothing came in %.0f s", request.method, what, HEAD_S)
        return _problem(503, "UNAVAILABLE", f"nothing came in {HEAD_S:.0f} s")

    async def _route(self, request: Request) -> Response:
        if request.method not in _READING:
            raise _read_only(request.path)
        if request.path in ("/v2/", "/v2"):
            return Response(200, {"Content-Type": "application/json", **_VERSION}, b"{}")
        target = self._target(request)
        try:
            answer = await self._answer(request, target)
        except NotFoundError as error:
            self._missing[target] = str(error)
            raise _ProblemError(404, target.unknown, str(error)) from error
        except UnavailableError:
            # The registry's last word stands while it is out of reach, as it does for what is there.
            if target in self._missing:
                raise _ProblemError(404, target.unknown, self._missing[target]) from None
            raise
        if self._missing and target in self._missing:
            del self._missing[target]
        return answer

    async def _answer(self, request: Request, target: _Target) -> Response:
        locator = await self._access.admit(
            target.locator, "" if target.what == "tags" else target.reference, request.headers.get("authorization", "")
        )
        try:
            if target.what in ("tags", "referrers"):
                return await self._listed(request, locator, target)
            found = await self._library.resolve(locator, target.reference)
            return await self._object(request, locator, found)
        except DeniedError as error:
            if locator.grant is None:
                raise
            raise self._access.refused(locator) from error

    # What is meant

    def _target(self, request: Request) -> _Target:
        match = _PATH.fullmatch(request.path)
        if not match or (match["what"] == "tags" and match["reference"] != "list"):
            raise _ProblemError(404, "NAME_UNKNOWN", "not a path of the pull API")
        what, reference = match["what"], match["reference"]
        upstream, repository = self._upstream(match["name"], request.query.get("ns", ""))
        kind: Kind = "blobs" if what == "blobs" else "manifests"
        locator = _valid("NAME_INVALID", lambda name: Locator(upstream, name, kind), repository)
        if what in ("blobs", "referrers") or (what == "manifests" and is_digest(reference)):
            _valid("DIGEST_INVALID", Digest.parse, reference)
        elif what == "manifests":
            _valid("MANIFEST_UNKNOWN", check_reference, reference, status=404)  # nothing can have such a tag
        return _Target(locator, what, reference)

    def _upstream(self, name: str, ns: str) -> tuple[str, str]:
        first, _, rest = name.partition("/")
        if ns:
            asked, repository = ns, name
        elif rest and (canonical(first) in self._upstreams or "." in first or ":" in first):
            asked, repository = first, rest
        else:
            asked, repository = "docker.io", name
        configured = canonical(asked)
        if configured not in self._upstreams:
            names = ", ".join(self._upstreams)
            raise _ProblemError(404, "NAME_UNKNOWN", f"{asked[:255]!r} is not configured here; configured: {names}")
        return configured, repository

    # Objects

    async def _object(self, request: Request, locator: Locator, found: Resolved) -> Response:
        digest, size = str(found.ref.digest), found.ref.size
        etag = f'"{digest}"'
        headers = {
            **_VERSION,
            "Content-Type": "application/octet-stream" if locator.kind == "blobs" else found.media_type,
            "Docker-Content-Digest": digest,
            "ETag": etag,
            "Accept-Ranges": "bytes",
        }
        if "if-match" in request.headers and not _names(request.headers["if-match"], etag, weak=False):
            raise _ProblemError(412, "PRECONDITION_FAILED", f"it is {digest} now")
        if "if-none-match" in request.headers and _names(request.headers["if-none-match"], etag, weak=True):
            return Response(304, headers)
        if request.method == "HEAD":
            return Response(200, headers | {"Content-Length": str(size)})
        spans = None
        if request.headers.get("if-range", etag) == etag and "range" in request.headers:
            spans = parse_range(request.headers["range"], size)
        if spans is None:
            return await self._one(200, headers, locator, found, Span(0, size))
        if not spans:
            unsatisfied = {"Content-Range": f"bytes */{size}"}
            raise _ProblemError(416, "RANGE_INVALID", f"{digest} has {size} bytes", unsatisfied)
        if len(spans) == 1:
            headers["Content-Range"] = spans[0].content_range(size)
            return await self._one(206, headers, locator, found, spans[0])
        return await self._several(headers, locator, found, spans)

    async def _one(
        self, status: int, headers: Mapping[str, str], locator: Locator, found: Resolved, span: Span
    ) -> Response:
        headers = {**headers, "Content-Length": str(span.length)}
        if not span.length:
            return Response(status, headers)
        file = self._library.sealed(found.ref.digest, span.start, span.stop)
        if file is not None:
            return Response(status, headers, FileBody(file, span.start, span.stop))
        return await _begun(status, headers, self._read(locator, found, [span]))

    async def _several(
        self, headers: dict[str, str], locator: Locator, found: Resolved, spans: Sequence[Span]
    ) -> Response:
        """multipart/byteranges, RFC 9110, 14.6."""
        size, kind = found.ref.size, headers["Content-Type"]
        heads = [
            f"\r\n--{BOUNDARY}\r\nContent-Type: {kind}\r\nContent-Range: {span.content_range(size)}\r\n\r\n".encode()
            for span in spans
        ]
        end = f"\r\n--{BOUNDARY}--\r\n".encode()
        length = sum(map(len, heads)) + sum(span.length for span in spans) + len(end)

        async def parts() -> AsyncGenerator[Buffer, None]:
            async with aclosing(self._read(locator, found, spans)) as chunks:
                for head, span in zip(heads, spans, strict=True):
                    left = span.length
                    while left > 0:
                        chunk = await anext(chunks)
                        yield b"".join([head, chunk]) if head else chunk
                        left -= len(chunk)
                        head = b""
            yield end

        headers["Content-Type"] = f"multipart/byteranges; boundary={BOUNDARY}"
        return await _begun(206, headers | {"Content-Length": str(length)}, parts())

    async def _read(self, locator: Locator, found: Resolved, spans: Sequence[Span]) -> AsyncGenerator[Buffer, None]:
        """What the library yields, of exactly the spans' length and never slower than a chunk in STALL_S."""
        left = sum(span.length for span in spans)
        (start, stop), *more = ((span.start, span.stop) for span in spans)
        async with aclosing(self._library.read(locator, found.ref, start, stop, *more)) as chunks:
            while left > 0:
                chunk: Buffer | None = None
                with trio.move_on_after(STALL_S) as scope:
                    chunk = await anext(chunks, None)
                if scope.cancelled_caught:
                    raise UnavailableError(f"{found.ref.digest}: no progress for {STALL_S:.0f} s")
                if chunk is None:
                    raise UnavailableError(f"{found.ref.digest}: {left} of the bytes asked for did not come")
                left -= len(chunk)
                yield chunk

    # Lists

    async def _listed(self, request: Request, locator: Locator, target: _Target) -> Response:
        query = {name: value for name, value in request.query.items() if name != "ns"}
        if sum(map(len, (*query, *query.values()))) > MAX_CURSOR:
            raise _ProblemError(400, "UNSUPPORTED", f"a query of more than {MAX_CURSOR} characters")
        if target.what == "tags":
            listed = await self._listings.tags(locator, query)
        else:
            listed = await self._listings.referrers(locator, Digest.parse(target.reference), query)
        headers = {**_VERSION, "Content-Type": listed.media_type}
        if link := _own_link(listed.link, request):
            headers["Link"] = link
        if listed.filters:
            headers["OCI-Filters-Applied"] = listed.filters
        return Response(200, headers, listed.body)


def _read_only(path: str) -> _ProblemError:
    """A digest that is none is told even so: the specification's suite asks for that with a PUT."""
    match = _PATH.fullmatch(path)
    if match and match["what"] == "manifests" and is_digest(match["reference"]):
        _valid("DIGEST_INVALID", Digest.parse, match["reference"])
    return _ProblemError(405, "UNSUPPORTED", "this mirror is read-only", {"Allow": ", ".join(_READING)})


async def _begun(status: int, headers: Mapping[str, str], body: AsyncGenerator[Buffer, None]) -> Response:
    """A response whose first bytes are there already; what fails later ends the body early."""
    return Response(status, headers, body, first=[await anext(body)])


def _valid(code: str, parse: Callable[[str], _T], text: str, *, status: int = 400) -> _T:
    try:
        return parse(text)
    except BadInputError as error:
        raise _ProblemError(status, code, str(error)) from error


def _problem(status: int, code: str, error: object) -> Response:
    return error_response(status, code, str(error), _VERSION)


def _names(header: str, etag: str, *, weak: bool) -> bool:
    """Whether an If-Match or If-None-Match header names the tag, or all by `*` (RFC 9110, 13.1.1 and 13.1.2)."""
    tags = [part.strip() for part in header.split(",")]
    return any((tag.removeprefix("W/") if weak else tag) in (etag, "*") for tag in tags)


def _own_link(link: str, request: Request) -> str:
    """The registry's link to the next page, as one to this mirror: same path, and its query, which may be any cursor.

    The request's `artifactType`, which the registry was not told, and `ns` are put back.
    """
    match = re.match(rf'\s*<([^>]{{1,{MAX_CURSOR}}})>\s*;\s*rel="?next"?', link)
    if not match:
        return ""
    try:
        fields = dict(parse_qsl(urlsplit(match[1]).query, max_num_fields=16))
    except ValueError:
        return ""
    own = {name: request.query[name] for name in ("artifactType", "ns") if name in request.query}
    query = {name: value for name, value in fields.items() if name != "ns"} | own
    return f'<{quote(request.path, safe="/:")}?{urlencode(query)}>; rel="next"'
