"""The registry that clients on this node talk to: the pull part of OCI distribution 1.1, read-only, over `Library`.

A request names its upstream in `?ns=` (containerd, BuildKit) or in the first part of the path (Podman, CRI-O, skopeo);
Docker names none and means docker.io. The name is a key into the configured upstreams, never an address.

The answers follow from how clients handle failures. After an error status they ask the registry itself, so the head of
a 200 is sent only once the first bytes are ready. They resume a body that ends early with a Range request, which may
then be answered 503; a body that stalls would hang the pull, so the mirror ends it.
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

from node.content.contract import Library
from node.content.listings import Listings
from node.mirror.access import Access, ChallengedError
from node.mirror.missing import MissingNames, Name
from node.oci.byte_ranges import Span, parse_range
from node.oci.manifests import Resolved
from node.oci.references import Kind, Locator, canonical, check_reference, is_digest
from node.web.server import FileBody, Limits, Request, Response, error_response
from protocol.errors import (
    BadInputError,
    CorruptObjectError,
    DeniedError,
    NotFoundError,
    UnavailableError,
    UnsignedError,
)
from protocol.ids import Buffer, Digest

log = logging.getLogger(__name__)

HEAD_S = 25.0
"""containerd waits 30 s for the headers; after an error before that it asks the registry itself."""
STALL_S = 25.0
"""A body without progress for this time is ended: above the library's own deadlines, far below clients' 5 minutes."""
LIMITS = Limits(methods=("GET", "HEAD"), body_bytes=0)
"""For the server: a push is refused before its body is read."""
BOUNDARY = f"shoal-{secrets.token_hex(12)}"
"""Random, so that no layer can be made to contain it."""
MAX_CURSOR = 2048
"""Longest query, in characters, of the link to a next page."""
_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags|referrers)/(?P<reference>[^/]+)", re.DOTALL)
_CONDITIONS = {"range", "if-match", "if-none-match"}
"""Headers of requests that may be answered without the object's bytes."""
_VERSION = {"Docker-Distribution-API-Version": "registry/2.0"}

_T = TypeVar("_T")


class _ProblemError(Exception):
    """An answer in the specification's error form."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.response = error_response(status, code, message, _VERSION | dict(headers or {}))


@dataclass(frozen=True, slots=True)
class _Target:
    """`path_kind` is the word in the path; `locator.kind` is "blobs" for a blob, and "manifests" for all others."""

    locator: Locator
    path_kind: str
    reference: str

    @property
    def name(self) -> Name:
        return self.locator, self.path_kind, self.reference

    @property
    def unknown(self) -> str:
        """The error code for a missing object."""
        return {"blobs": "BLOB_UNKNOWN", "manifests": "MANIFEST_UNKNOWN"}.get(self.path_kind, "NAME_UNKNOWN")


class Mirror:
    """`handle` is a handler for `serve_http`. `upstreams` holds canonical names, and may change later."""

    def __init__(self, library: Library, upstreams: Collection[str], listings: Listings, access: Access) -> None:
        self._library, self._access = library, access
        self._upstreams = upstreams
        self._listings = listings
        self._missing = MissingNames()

    async def handle(self, request: Request) -> Response:
        path = request.path[:300]
        try:
            with trio.move_on_after(HEAD_S):
                return await self._route(request)
        except _ProblemError as problem:
            return problem.response
        except ChallengedError as error:
            return error_response(401, "UNAUTHORIZED", str(error), _VERSION | {"WWW-Authenticate": error.challenge})
        except (DeniedError, UnsignedError) as error:
            return _problem(403, "DENIED", error)
        except BadInputError as error:
            return _problem(400, "UNSUPPORTED", error)
        except (UnavailableError, CorruptObjectError) as error:
            log.warning("%s %r: %s", request.method, path, error)
            return _problem(503, "UNAVAILABLE", error)
        log.warning("%s %r: no data within %.0f s", request.method, path, HEAD_S)
        return _problem(503, "UNAVAILABLE", f"no data within {HEAD_S:.0f} s")

    async def _route(self, request: Request) -> Response:
        if request.method not in LIMITS.methods:
            raise _read_only(request.path)
        if request.path in ("/v2/", "/v2"):
            return Response(200, {"Content-Type": "application/json", **_VERSION}, b"{}")
        target = self._target(request)
        try:
            answer = await self._answer(request, target)
        except NotFoundError as error:
            self._missing.note(target.name, str(error))
            raise _ProblemError(404, target.unknown, str(error)) from error
        except UnavailableError:
            # While the registry is out of reach its last answer counts, for absent objects as for present ones.
            if (text := self._missing.get(target.name)) is not None:
                raise _ProblemError(404, target.unknown, text) from None
            raise
        self._missing.read_from(target.locator)
        self._missing.forget(target.name)
        return answer

    async def _answer(self, request: Request, target: _Target) -> Response:
        locator = await self._access.admit(
            target.locator,
            "" if target.path_kind == "tags" else target.reference,
            request.headers.get("authorization", ""),
        )
        try:
            if target.path_kind in ("tags", "referrers"):
                return await self._listed(request, locator, target)
            resolved = await self._resolved(request, locator, target.reference)
            try:
                return await self._object(request, locator, resolved)
            except UnavailableError:
                # Its size may have been a false claim, which the failed read made doubtful: then another one counts.
                again = await self._resolved(request, locator, target.reference)
                if again.ref == resolved.ref:
                    raise
                return await self._object(request, locator, again)
        except DeniedError as error:
            if locator.grant is None:
                raise
            raise self._access.refused(locator) from error

    def _target(self, request: Request) -> _Target:
        match = _PATH.fullmatch(request.path)
        if not match or (match["kind"] == "tags" and match["reference"] != "list"):
            raise _ProblemError(404, "NAME_UNKNOWN", "not a path of the pull API")
        path_kind, reference = match["kind"], match["reference"]
        upstream, repository = self._upstream(match["name"], request.query.get("ns", ""))
        kind: Kind = "blobs" if path_kind == "blobs" else "manifests"
        locator = _valid("NAME_INVALID", lambda name: Locator(upstream, name, kind), repository)
        if path_kind in ("blobs", "referrers") or (path_kind == "manifests" and is_digest(reference)):
            _valid("DIGEST_INVALID", Digest.parse, reference)
        elif path_kind == "manifests":
            _valid("MANIFEST_UNKNOWN", check_reference, reference, status=404)  # no object can have such a tag
        return _Target(locator, path_kind, reference)

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

    async def _resolved(self, request: Request, locator: Locator, reference: str) -> Resolved:
        """The descriptor. An answer that shows anything of the object beside its bytes needs the right to read it at
        once, and an answer without bytes its true size; a plain GET waits for both until the first bytes are there."""
        resolved = await self._library.resolve(locator, reference)
        if request.method == "HEAD" or _CONDITIONS & request.headers.keys() or not resolved.ref.size:
            await self._access.check(locator, resolved.ref.digest)
        if request.method == "HEAD" or not resolved.ref.size:
            resolved = await self._library.sized(locator, resolved)
        return resolved

    async def _object(self, request: Request, locator: Locator, resolved: Resolved) -> Response:
        digest, size = str(resolved.ref.digest), resolved.ref.size
        etag = f'"{digest}"'
        headers = {
            **_VERSION,
            "Content-Type": "application/octet-stream" if locator.kind == "blobs" else resolved.media_type,
            "Docker-Content-Digest": digest,
            "ETag": etag,
            "Accept-Ranges": "bytes",
        }
        if "if-match" in request.headers and not _names(request.headers["if-match"], etag, weak=False):
            raise _ProblemError(412, "PRECONDITION_FAILED", f"the object is {digest} now")
        if "if-none-match" in request.headers and _names(request.headers["if-none-match"], etag, weak=True):
            return Response(304, headers)
        if request.method == "HEAD":
            return Response(200, headers | {"Content-Length": str(size)})
        spans = None
        if request.headers.get("if-range", etag) == etag and "range" in request.headers:
            spans = parse_range(request.headers["range"], size)
        if spans is None:
            return await self._one(200, headers, locator, resolved, span=Span(0, size))
        if not spans:
            sized = await self._library.sized(locator, resolved)
            if sized.ref != resolved.ref:
                return await self._object(request, locator, sized)
            unsatisfied = {"Content-Range": f"bytes */{size}"}
            raise _ProblemError(416, "RANGE_INVALID", f"{digest} has {size} bytes", unsatisfied)
        if len(spans) == 1:
            headers["Content-Range"] = spans[0].content_range(size)
            return await self._one(206, headers, locator, resolved, span=spans[0])
        return await self._several(headers, locator, resolved, spans)

    async def _one(
        self, status: int, headers: Mapping[str, str], locator: Locator, resolved: Resolved, *, span: Span
    ) -> Response:
        headers = {**headers, "Content-Length": str(span.length)}
        if not span.length:
            return Response(status, headers)
        file = None
        if self._library.holds_sealed(locator, resolved.ref):
            await self._access.check(locator, resolved.ref.digest)
            file = self._library.sealed(resolved.ref, span.start, span.stop)
        if file is not None:
            return Response(status, headers, FileBody(file, span.start, span.stop))
        return await _begun(status, headers, self._read(locator, resolved, [span]))

    async def _several(
        self, headers: dict[str, str], locator: Locator, resolved: Resolved, spans: Sequence[Span]
    ) -> Response:
        """multipart/byteranges (RFC 9110, section 14.6)."""
        size, kind = resolved.ref.size, headers["Content-Type"]
        heads = [
            f"\r\n--{BOUNDARY}\r\nContent-Type: {kind}\r\nContent-Range: {span.content_range(size)}\r\n\r\n".encode()
            for span in spans
        ]
        end = f"\r\n--{BOUNDARY}--\r\n".encode()
        length = sum(map(len, heads)) + sum(span.length for span in spans) + len(end)

        async def parts() -> AsyncGenerator[Buffer, None]:
            async with aclosing(self._read(locator, resolved, spans)) as chunks:
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

    async def _read(self, locator: Locator, resolved: Resolved, spans: Sequence[Span]) -> AsyncGenerator[Buffer, None]:
        """The library's chunks: exactly the bytes of the spans, with at most STALL_S between chunks. Before each chunk
        is given away, the client's right to the object is checked by what is known of its origin then."""
        left = sum(span.length for span in spans)
        first, *more = ((span.start, span.stop) for span in spans)
        async with aclosing(self._library.read(locator, resolved.ref, *first, *more)) as chunks:
            while left > 0:
                chunk: Buffer | None = None
                with trio.move_on_after(STALL_S) as scope:
                    chunk = await anext(chunks, None)
                if scope.cancelled_caught:
                    raise UnavailableError(f"{resolved.ref.digest}: no progress for {STALL_S:.0f} s")
                if chunk is None:
                    raise UnavailableError(f"{resolved.ref.digest}: {left} of the requested bytes are missing")
                await self._access.check(locator, resolved.ref.digest)
                left -= len(chunk)
                yield chunk

    async def _listed(self, request: Request, locator: Locator, target: _Target) -> Response:
        query = {name: value for name, value in request.query.items() if name != "ns"}
        if sum(map(len, (*query, *query.values()))) > MAX_CURSOR:
            raise _ProblemError(400, "UNSUPPORTED", f"a query of more than {MAX_CURSOR} characters")
        if target.path_kind == "tags":
            listed = await self._listings.tags(locator, query)
        else:
            listed = await self._listings.referrers(locator, Digest.parse(target.reference), query)
        headers = {**_VERSION, "Content-Type": listed.media_type}
        if link := own_link(listed.link, request):
            headers["Link"] = link
        if listed.filters:
            headers["OCI-Filters-Applied"] = listed.filters
        return Response(200, headers, listed.body)


def _read_only(path: str) -> _ProblemError:
    """The error for a malformed digest comes first: the specification's test suite expects it for a PUT."""
    match = _PATH.fullmatch(path)
    if match and match["kind"] == "manifests" and is_digest(match["reference"]):
        _valid("DIGEST_INVALID", Digest.parse, match["reference"])
    return _ProblemError(405, "UNSUPPORTED", "this mirror is read-only", {"Allow": ", ".join(LIMITS.methods)})


async def _begun(status: int, headers: Mapping[str, str], body: AsyncGenerator[Buffer, None]) -> Response:
    """A response whose first bytes are ready; a later failure ends the body early."""
    return Response(status, headers, body, first=[await anext(body)])


def _valid(code: str, parse: Callable[[str], _T], text: str, *, status: int = 400) -> _T:
    try:
        return parse(text)
    except BadInputError as error:
        raise _ProblemError(status, code, str(error)) from error


def _problem(status: int, code: str, error: object) -> Response:
    return error_response(status, code, str(error), _VERSION)


def _names(header: str, etag: str, *, weak: bool) -> bool:
    """Whether If-Match or If-None-Match names the ETag, or any by `*` (RFC 9110, sections 13.1.1 and 13.1.2)."""
    tags = [part.strip() for part in header.split(",")]
    return any((tag.removeprefix("W/") if weak else tag) in (etag, "*") for tag in tags)


def own_link(link: str, request: Request) -> str:
    """The registry's link to the next page as a link to this mirror, with the same path and the registry's query.

    It gets the request's `ns` back, and `artifactType`, which the registry did not receive.
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
