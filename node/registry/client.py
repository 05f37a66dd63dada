"""Client of one registry or mirror: resolves names, and reads objects as blocks. Errors name the object, never a URL.

Specification: OCI distribution 1.1 (pull). Like all clients, it also supports Docker's token flow, redirects of blobs
to other hosts (httpx then drops Authorization), and 200 as the answer to a range. Each method makes one attempt, which
`Availability.retrying` repeats. Only `blocks` makes several itself, and continues a body where it broke off.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import httpx
import trio
from cachetools import TTLCache

from node.config.schema import UpstreamPart
from node.oci.manifests import MAX_MANIFEST, MEDIA_TYPE, UNTYPED, Resolved
from node.oci.references import is_digest
from node.registry import transport
from node.registry.attempts import Attempts, Availability, FailedAttemptError, reason, unexpected
from node.registry.authorization import Authorization
from node.registry.bodies import CONTENT_RANGE, BlockCutter, Meter, MeteredBody, body_start, receiver_of
from node.registry.calls import ACCEPT, Call, Endpoint, Headers, Passed
from node.registry.reach import Reach, UnreachableHostError
from node.registry.retry import BODY, RETRIED_STATUS
from node.registry.transport import Connect
from node.registry.uplink import MakeWayError
from node.runtime.fair_places import FairPlaces
from protocol.errors import BadInputError, CorruptObjectError, DeniedError, NotFoundError
from protocol.ids import Digest, ObjectRef

log = logging.getLogger(__name__)

BROKEN_S, MAX_BROKEN = 2.0, 4096
"""After a 500 or 404, the same call fails for BROKEN_S seconds: a pull asks for many blocks of an object, and clients
that look for an object that does not exist soon look again."""
_T = TypeVar("_T")


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

    def report(self) -> Endpoint:
        state = self.availability
        problem = state.problem if state.breaker.failing else ""
        return Endpoint(str(self.url), problem, state.breaker.rest_s(trio.current_time()), self.meter.received)

    async def ask(self, call: Call, attempt: Callable[[Call], Awaitable[_T]]) -> _T:
        """The result of one of the methods below, each attempt in its turn among the clients'."""

        async def in_turn(call: Call) -> _T:
            async with self._names.place():
                return await attempt(call)

        return await self.availability.retrying(call, in_turn)

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
        whole = (start, stop) == (0, size) or call.tail.startswith("manifests/")
        headers = {"Accept": ACCEPT} | ({} if whole else {"Range": f"bytes={start}-{stop - 1}"})
        async with self._response("GET", call, headers) as response, receiver_of(response) as receiver:
            self._expect(response, call, 200, 206)
            body = MeteredBody(receiver, self.meter, background=background)
            await body.skip(start - body_start(response, start, stop, size))
            while not cutter.done:
                block = cutter.filled(await body.recv_into(cutter.room()))
                if block is not None:
                    yield block
            if response.status_code == 206 or stop == size:
                # A connection can serve the next request only after the body's end was read.
                with suppress(httpx.HTTPError):
                    await receiver.recv_into(memoryview(bytearray(1)))

    async def confirms(self, current: Resolved, call: Call) -> bool:
        """Ask (by HEAD) whether the call's reference still resolves to `current`."""
        async with self._response("HEAD", call, {"Accept": ACCEPT}) as response:
            if response.status_code in (404, *RETRIED_STATUS):
                self._expect(response, call, 200)
            digest = response.headers.get("docker-content-digest", "")
            return bool(response.status_code == 200 and digest == str(current.ref.digest))

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
        method = "GET" if call.tail == "tags/list" else "HEAD"
        try:
            async with self._response(method, call, {"Accept": ACCEPT}, follow=False) as response:
                if response.status_code in (404, 405):
                    return None
                if response.status_code >= 400:
                    self._expect(response, call)
                return True
        except DeniedError:
            return False

    @asynccontextmanager
    async def _response(
        self, method: str, call: Call, headers: Headers, *, follow: bool = True
    ) -> AsyncIterator[httpx.Response]:
        """The response after authorization and redirects; its body is not read yet."""
        authorization = self.authorization.headers(call)
        if (status := self._failed.get((method, call))) == 404:
            raise NotFoundError(f"{self._subject(call)}: not found")
        if status is not None:
            raise FailedAttemptError(f"answered {status} just now", again=False)
        send = partial(self.send, method, call.url(self.url), follow=follow)
        response = await send(headers | authorization)
        try:
            if response.status_code == 401 and not response.history:
                renewed = await self.authorization.renewed(call, response, authorization)
                response = await send(headers | renewed) if renewed else response
            status = response.status_code
            if status == 404 or (status >= 500 and status not in RETRIED_STATUS):
                self._failed[method, call] = status
            yield response
        finally:
            await response.aclose()

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


def _media_type(response: httpx.Response) -> str:
    media_type = str(response.headers.get("content-type", "")).partition(";")[0].strip()
    return media_type if MEDIA_TYPE.fullmatch(media_type) else UNTYPED
