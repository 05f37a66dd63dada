"""Client of one registry or mirror: resolves names, and reads objects as blocks. Errors name the object, never a URL.

Specification: OCI distribution 1.1 (pull). Like all clients, it also supports Docker's token flow, redirects of blobs
to other hosts (httpx then drops Authorization), and 200 as the answer to a range. Each method makes one attempt, which
`Availability.retrying` repeats. Only `blocks` makes several itself, and continues a body where it broke off.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import httpx
import trio
from cachetools import TTLCache

from node.config.schema import UpstreamPart
from node.oci.manifests import MAX_MANIFEST, MEDIA_TYPE, UNTYPED, Resolved, read_manifest
from node.oci.references import is_digest
from node.registry import transport
from node.registry.attempts import Attempts, Availability, FailedAttemptError, reason, unexpected
from node.registry.authorization import Authorization
from node.registry.bodies import (
    CONTENT_RANGE,
    BlockCutter,
    Meter,
    MeteredBody,
    Receiver,
    body_start,
    other_size,
    receiver_of,
)
from node.registry.calls import ACCEPT, Call, Endpoint, Headers, Passed
from node.registry.reach import Reach, UnreachableHostError
from node.registry.retry import BODY, RETRIED_STATUS
from node.registry.transport import Connect
from node.registry.uplink import MakeWayError
from node.runtime.fair_places import FairPlaces
from protocol.errors import BadInputError, CorruptObjectError, DeniedError, NotFoundError
from protocol.ids import Digest, ObjectRef

log = logging.getLogger(__name__)

_DIGITS = re.compile(r"[0-9]{1,15}", re.ASCII)
CLAIM_S, MAX_CLAIMS = 1.0, 1024
"""A client that is admitted by a HEAD for a tag then asks for that tag at once: a second HEAD would be for nothing."""
BROKEN_S, MAX_BROKEN = 2.0, 4096
"""After a 500 or 404, the same call fails for BROKEN_S seconds: a pull asks for many blocks of an object, and clients
that look for an object that does not exist soon look again."""


_FINAL_STATUS = frozenset({401, 404, 500}) | RETRIED_STATUS
"""Answers to a HEAD that a GET would also get. After any other one a GET is tried: some registries refuse HEAD."""


class RegistryClient:
    def __init__(
        self, part: UpstreamPart, url: str, connect: Connect, *, availability: Availability, meter: Meter
    ) -> None:
        self.url = httpx.URL(url.rstrip("/"))
        self.name, self.availability, self.meter = availability.name, availability, meter
        self._reach = Reach(part)
        self.http, self.retire = connect(part, self._reach)
        self.authorization = Authorization(self.availability, self.url, part, meter=meter, send=self.send)
        self.body_connections = max(1, part.connections - 1)
        """Most bodies read at once; one connection is left for names."""
        self._bodies = FairPlaces(self.body_connections)
        self._names = FairPlaces(part.connections, most_each=max(1, part.connections * 2 // 3))
        """Other requests. One address of clients does not have all connections: registries answer some slowly."""
        self._failed: TTLCache[tuple[str, Call], int] = TTLCache(MAX_BROKEN, BROKEN_S, timer=trio.current_time)
        """By method and call, the status that answered it."""
        self._claims: TTLCache[Call, tuple[Resolved, float]] = TTLCache(MAX_CLAIMS, CLAIM_S, timer=trio.current_time)
        """Descriptors that answers to `admits` showed, and when these were asked for. Each is used once."""

    def report(self) -> Endpoint:
        state = self.availability
        problem = state.problem if state.breaker.failing else ""
        return Endpoint(str(self.url), problem, state.breaker.rest_s(trio.current_time()), self.meter.received)

    async def blocks(self, call: Call, cutter: BlockCutter, *, background: bool) -> AsyncGenerator[bytearray, None]:
        """The blocks that `cutter` still lacks. Raises UnavailableError; the cutter keeps the bytes received so far."""
        attempts: Attempts | None = None
        while not cutter.done:
            if background:
                await self.meter.uplink.turn()
            async with self._bodies.place():
                self.meter.uplink.check(background=background)
                attempts = attempts or await self.availability.admitted(BODY, call.subject)
                try:
                    async with aclosing(self._body(call, cutter, background=background)) as blocks:
                        async for block in blocks:
                            attempts.progressed()
                            yield block
                except FailedAttemptError as failure:
                    await attempts.pause(failure)
                except MakeWayError:
                    log.debug("%s pauses for a client", call.subject)  # closing its connection has freed the uplink

    async def _body(self, call: Call, cutter: BlockCutter, *, background: bool) -> AsyncGenerator[bytearray, None]:
        """Blocks from one response. Raises FailedAttemptError if it ends before the last block."""
        start, stop, size = cutter.position, cutter.stop, cutter.ref.size
        whole = (start, stop) == (0, size) or call.names_manifest
        headers = {"Accept": ACCEPT} | ({} if whole else {"Range": f"bytes={start}-{stop - 1}"})
        response_of = self._response("GET", call, headers, in_turn=False)  # it has a place among the bodies
        async with response_of as response, receiver_of(response) as receiver:
            self._expect(response, call, 200, 206)
            body = MeteredBody(receiver, self.meter, background=background)
            await body.skip(start - body_start(response, start, stop, size))
            if "*" in response.headers.get("content-range", "") and await self.size(call) != size:
                raise other_size()
            ends = response.status_code == 206 or stop == size
            while not cutter.done:
                block = cutter.filled(await body.recv_into(cutter.room()))
                # A connection can serve the next request only after the body's end was read.
                if ends and cutter.position >= stop and await _more(receiver) and stop == size:
                    raise other_size()
                if block is not None:
                    yield block

    async def described(self, call: Call) -> Resolved | None:
        """A manifest's descriptor as the registry claims it, by HEAD; None if only the bytes can show it. If `admits`
        has just asked the same question, its answer is used."""
        if (claimed := self._claims.pop(call, None)) is not None:
            return replace(claimed[0], age_s=trio.current_time() - claimed[1])
        async with self._response("HEAD", call, {"Accept": ACCEPT}) as response:
            if response.status_code in _FINAL_STATUS and not response.history:
                self._expect(response, call, 200)
            return _claimed(response, call) if response.status_code == 200 else None

    async def manifest(self, call: Call) -> tuple[Resolved, bytes]:
        async with self._response("GET", call, {"Accept": ACCEPT}) as response:
            self._expect(response, call, 200)
            body = await self.meter.whole(response, MAX_MANIFEST, self._subject(call))
            header = response.headers.get("docker-content-digest", "")
            expected = call.reference if is_digest(call.reference) else header
            algorithm = "sha512" if expected.startswith("sha512:") else "sha256"
            digest = Digest(algorithm, hashlib.new(algorithm, body).hexdigest())
            if expected not in ("", str(digest)):
                raise CorruptObjectError(f"{self._subject(call)}: the bytes do not hash to the digest")
            try:
                read_manifest(body)
            except BadInputError as error:  # a page of a proxy, or bytes that clients could read in two ways
                raise FailedAttemptError(f"answered with no manifest: {error}", again=False) from error
            return Resolved(ObjectRef(digest, len(body)), _media_type(response)), body

    async def size(self, call: Call) -> int:
        """A blob's size in bytes, by HEAD; by a range of one byte if HEAD returns none (presigned URLs)."""
        async with self._response("HEAD", call, {}) as response:
            length = response.headers.get("content-length", "")
            if response.status_code == 200 and length.isascii() and length.isdigit():
                return int(length)
            if response.status_code == 404 and not response.history:
                self._expect(response, call, 200)
        async with self._response("GET", call, {"Range": "bytes=0-0"}) as response:
            if response.status_code == 416:
                return 0
            self._expect(response, call, 200, 206)
            match = CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            total = match[3] if match and response.status_code == 206 else response.headers.get("content-length", "")
            if (response.status_code == 206 and not match) or not total.isdigit():
                raise FailedAttemptError("answered without a size", again=False)
            return int(total)

    async def passed(self, call: Call) -> Passed:
        async with self._response("GET", call, {"Accept": "*/*"}) as response:
            if response.status_code == 400:
                raise BadInputError(f"{self._subject(call)}: the registry does not accept the query")
            if response.status_code in (405, 501):
                raise NotFoundError(f"{self._subject(call)}: the registry does not support this list")
            self._expect(response, call, 200)
            body = await self.meter.whole(response, MAX_MANIFEST, self._subject(call))
            return Passed(body, _media_type(response), response.headers.get("link", ""))

    async def admits(self, call: Call) -> bool | None:
        """Whether the registry allows the call; None if it does not have the object. A redirect means yes."""
        method, asked = "GET" if call.tail == "tags/list" else "HEAD", trio.current_time()
        try:
            async with self._response(method, call, {"Accept": ACCEPT}, follow=False) as response:
                if response.status_code in (404, 405):
                    return None
                if response.status_code >= 400:
                    self._expect(response, call)
                if response.status_code == 200 and call.names_manifest and (claimed := _claimed(response, call)):
                    self._claims[call] = claimed, asked
                return True
        except DeniedError:
            return False

    async def gives(self, call: Call) -> bool:
        """Whether the registry gives the object of the call, by HEAD, or by GET if it does not support HEAD. A redirect
        means yes. Raises NotFoundError."""
        try:
            for method in ("HEAD", "GET"):
                async with self._response(method, call, {"Accept": ACCEPT}, follow=False) as response:
                    if method == "HEAD" and response.status_code in (405, 501):
                        continue
                    if response.status_code >= 400:
                        self._expect(response, call)
                    shown, algorithm = response.headers.get("docker-content-digest", ""), call.reference.split(":")[0]
                    if shown.startswith(algorithm) and shown != call.reference:  # it may show another algorithm's
                        raise NotFoundError(f"{self._subject(call)}: the registry has another object there")
                    break
        except DeniedError:
            return False
        return True

    @asynccontextmanager
    async def _response(
        self, method: str, call: Call, headers: Headers, *, follow: bool = True, in_turn: bool = True
    ) -> AsyncIterator[httpx.Response]:
        """The response after authorization and redirects; its body is not read yet. `in_turn`: each request waits for
        its place among the clients'. None is held while a token is fetched, which takes longer than an answer."""
        authorization = self.authorization.headers(call)
        if (status := self._failed.get((method, call))) == 404:
            raise NotFoundError(f"{self._subject(call)}: not found")
        if status is not None:
            raise FailedAttemptError(f"answered {status} just now", again=False)
        send = partial(self.send, method, call.url(self.url), follow=follow)
        async with AsyncExitStack() as stack:
            turn = await stack.enter_async_context(self._turn(in_turn))
            response = await stack.enter_async_context(aclosing(await send(headers | authorization)))
            if response.status_code == 401 and not response.history:
                turn()
                if renewed := await self.authorization.renewed(call, response, authorization):
                    await stack.enter_async_context(self._turn(in_turn))
                    response = await stack.enter_async_context(aclosing(await send(headers | renewed)))
            status = response.status_code
            if status == 404 or (status >= 500 and status not in RETRIED_STATUS):
                self._failed[method, call] = status
            yield response

    @asynccontextmanager
    async def _turn(self, in_turn: bool) -> AsyncIterator[Callable[[], None]]:
        """Wait for a place. Yields a function that gives it back before the context ends."""
        held = [await self._names.take()] if in_turn else []

        def give() -> None:
            while held:
                held.pop()()

        try:
            yield give
        finally:
            give()

    async def send(
        self,
        method: str,
        url: httpx.URL,
        headers: Headers,
        *,
        follow: bool = True,
        form: Headers | None = None,
        token: bool = False,
    ) -> httpx.Response:
        """The response, whose body is not read yet. The caller closes it. `follow`: whether to follow redirects.
        `token`: the request is for a token service, whose answer says nothing about the registry."""
        extensions = {"token": True} if token else {}
        request = self.http.build_request(method, url, headers=headers, data=form, extensions=extensions)
        try:
            self._reach.check_literal(url)
            response = await transport.send(self.http, request, self._reach, follow=follow)
        except UnreachableHostError as error:
            raise FailedAttemptError(str(error), again=False) from error
        except (httpx.PoolTimeout, httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise FailedAttemptError(reason(error), again=False) from error
        except httpx.TimeoutException as error:
            raise FailedAttemptError(reason(error), again=False, breaks=True) from error
        except httpx.HTTPError as error:
            raise FailedAttemptError(reason(error), True, breaks=isinstance(error, httpx.ConnectError)) from error
        if response.status_code not in RETRIED_STATUS and not token:
            self.availability.answered()
        return response

    def _expect(self, response: httpx.Response, call: Call, *expected: int) -> None:
        status = response.status_code
        if status in expected:
            return
        if status == 404:
            raise NotFoundError(f"{self._subject(call)}: not found")
        if status == 401 and not response.history:
            raise self.authorization.denied(call, "access denied (401)")
        if status in (401, 403):
            raise DeniedError(f"{self._subject(call)}: access denied ({status})")
        raise unexpected(response)

    def _subject(self, call: Call) -> str:
        return f"{self.name}: {call.subject}"


async def _more(receiver: Receiver) -> bool:
    """Whether a body has further bytes. A broken connection has none: its bytes are complete."""
    with suppress(httpx.HTTPError):
        return await receiver.recv_into(memoryview(bytearray(1))) > 0
    return False


def _claimed(response: httpx.Response, call: Call) -> Resolved | None:
    digest, length = response.headers.get("docker-content-digest", ""), response.headers.get("content-length", "")
    if (is_digest(call.reference) and digest != call.reference) or not _DIGITS.fullmatch(length):
        return None
    try:
        ref = ObjectRef(Digest.parse(digest), int(length))
    except BadInputError:
        return None
    return Resolved(ref, _media_type(response)) if 0 < ref.size <= MAX_MANIFEST else None


def _media_type(response: httpx.Response) -> str:
    media_type = str(response.headers.get("content-type", "")).partition(";")[0].strip()
    return media_type if MEDIA_TYPE.fullmatch(media_type) else UNTYPED
