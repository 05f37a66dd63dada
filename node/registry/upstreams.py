"""The registries: names to descriptors, and ranges of objects to blocks.

An upstream is one registry or several in order: mirrors of it, and last the registry itself. Each has its own
connections, tokens and breaker. What a mirror does not give, for whatever reason, the next one is asked for: it may
lack what the registry has. What the registry itself says is the answer.

Specification: OCI distribution 1.1 (pull). What is not said there, and is done by every client: Docker's token flow,
redirects of blobs to other hosts (httpx drops Authorization on the way), 200 where a range was asked for.

Every request is bounded in time, in size and in number; a registry that is out of reach costs one connect timeout, and
then nothing for some seconds (`Breaker`), one that has too much to do some attempts, and then the pause it wants.
Errors name the registry and the object, never a URL, since URLs of blobs are signed.
"""

from __future__ import annotations

import hashlib
import logging
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from random import Random
from types import TracebackType
from typing import Protocol, Self, TypeVar, cast

import httpx
import msgspec
import trio
from cachetools import LRUCache, TTLCache

from node.config.schema import UpstreamPart
from node.oci.challenges import Challenge, Credentials, parse_challenges, parse_token, relayed, token_request
from node.oci.manifests import MAX_MANIFEST, MEDIA_TYPE, Resolved
from node.oci.references import Grant, Locator, canonical, is_digest
from node.registry.block_cutter import BlockCutter
from node.registry.credential_helper import CredentialHelpers, HelperError
from node.registry.docker_config import DockerConfig
from node.registry.retry import BODY, MIRROR, RESOLVE, RETRIED_STATUS, Breaker, RetryPolicy
from node.registry.transport import Body, DirectTransport
from node.registry.uplink import MakeWayError, Uplink, UplinkUse
from protocol.errors import (
    BadInputError,
    CorruptObjectError,
    DeniedError,
    NotFoundError,
    ShoalError,
    UnavailableError,
)
from protocol.ids import Digest, ObjectRef

log = logging.getLogger(__name__)

MAX_TOKEN_REPLY = 1 << 20
MAX_REDIRECTS = 5
MAX_AUTHORIZED = 256
"""Repositories of one registry whose authorization is remembered."""
BASIC_LIFETIME_S = 300.0
REFUSED_S = 10.0
"""How long a repository that is not for everybody is not asked for without a client's grant: members ask for its blocks
and names, one by one, not knowing that."""
BROKEN_S, MAX_BROKEN = 2.0, 1024
"""An object that the registry fails to give (500) is not asked for so soon again: a pull wants many of its blocks."""
PROBE_S = 5.0
"""As long as a connect takes at most."""
TOKEN_FAILURE_S = 1.0
"""Whoever waited for a token while that failed fails with it, rather than trying in turn."""
SKIPPED_BYTES = 256 << 10
REMOVED_S = 300.0
"""A pull asks for one object after the other: it may end at a registry that is configured no more."""
TIMEOUT = httpx.Timeout(connect=5.0, read=10.0, write=10.0, pool=30.0)
ACCEPT = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.artifact.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "application/json",
        "*/*;q=0.1",
    ]
)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)", re.ASCII)

Count = Callable[[str, int], None]
"""Called with the registry's name and the number of body bytes just read from it."""
Connect = Callable[[UpstreamPart], tuple[httpx.AsyncClient, Callable[[], None]]]
"""A client, and what has it keep no connection from then on."""
_T = TypeVar("_T")


class _FailedError(Exception):
    """One attempt failed. `again`: another may help; `breaks`: the registry is out of reach for everybody."""

    def __init__(self, reason: str, *, again: bool, breaks: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.again = again
        self.breaks = breaks
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Passed:
    """A list that the registry gave. `link` and `filters` are what the headers of that name say, "" without them."""

    body: bytes
    media_type: str
    link: str = ""
    filters: str = ""


@dataclass(frozen=True, slots=True)
class _Call:
    """A request below /v2/; `what` names it in errors."""

    repository: str
    tail: str
    what: str
    query: Mapping[str, str] | None = None
    grant: Grant | None = None

    @property
    def path(self) -> str:
        return f"/v2/{self.repository}/{self.tail}"


def _call(locator: Locator, reference: str) -> _Call:
    separator = "@" if is_digest(reference) else ":"
    what = f"{locator.kind[:-1]} {locator.repository}{separator}{reference}"
    return _Call(locator.repository, f"{locator.kind}/{reference}", what, grant=locator.grant)


def _tags(locator: Locator) -> _Call:
    return _Call(locator.repository, "tags/list", f"tags of {locator.repository}", {"n": "1"}, locator.grant)


class Upstreams:
    """All configured registries. An async context manager: leaving it closes the connections."""

    def __init__(
        self, parts: Sequence[UpstreamPart], *, count: Count, rng: Random, uplinks: Iterable[Uplink] = (),
        public: Callable[[Locator], None] = lambda _: None, connect: Connect | None = None,
    ) -> None:  # fmt: skip
        """`uplinks`: those of upstreams that have limits; the others have none. `connect`: None for sockets.

        `public` is called when a registry that was told nothing of who reads gave what a name stands for.
        """
        self._public = public
        self._connect, self._count, self._rng = connect or _sockets(), count, rng
        self._registries: dict[str, _Registry] = {}
        self._removed: dict[str, tuple[_Registry, float]] = {}
        """With the time until which reads find them."""
        self.prepared(parts, uplinks)()

    @property
    def names(self) -> Collection[str]:
        """Those of now: a view that changes with them."""
        return self._registries.keys()

    def prepared(self, parts: Sequence[UpstreamPart], uplinks: Iterable[Uplink] = ()) -> Callable[[], None]:
        """What takes `parts` in the place of those before; it does not fail. Raises BadInputError.

        What of an upstream stays as it was keeps its connections, tokens and breaker. Reads under way end where they
        began, and for REMOVED_S those of an upstream that is removed may go on.
        """
        limited = {uplink.name: uplink for uplink in uplinks}
        wanted = {canonical(part.name): self._kept(part) or self._made(part, limited) for part in parts}

        def change() -> None:
            for name, registry in self._registries.items():
                if wanted.get(name) is not registry:
                    registry.retire()
                if name not in wanted:
                    self._removed[name] = registry, trio.current_time() + REMOVED_S
            self._registries.clear()
            self._registries.update(wanted)

        return change

    def _kept(self, part: UpstreamPart) -> _Registry | None:
        """The registry that there is, where a new one would be the same. A file `ca` may have changed."""
        known = self._registries.get(canonical(part.name))
        return known if known is not None and known.part == _own(part) and not part.ca else None

    def _made(self, part: UpstreamPart, uplinks: Mapping[str, Uplink]) -> _Registry:
        known = self._registries.get(canonical(part.name))
        uplink = uplinks.get(part.name) or Uplink(part.name)
        made = _registry(part, uplink, self._connect, self._count, self._rng)
        if known is not None:
            made.inherit(known)
        return made

    def connections(self, upstream: str) -> int:
        """How many `blocks` of it can be read at once; one connection is left for names."""
        return self._find(upstream).body_connections

    def endpoints(self, upstream: str) -> tuple[Endpoint, ...]:
        """In the order in which they are asked."""
        return tuple(registry.report() for registry in self._in_order(upstream))

    def uplink(self, upstream: str) -> UplinkUse:
        return self._find(upstream).uplink.use()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._registries:
            for registry in self._in_order(name):
                await registry.client.aclose()

    async def resolve(
        self, locator: Locator, reference: str, known: Resolved | None = None
    ) -> tuple[Resolved, bytes | None]:
        """What `reference` stands for, and a manifest's bytes unless it is still the `known` one.

        Raises NotFoundError, DeniedError, UnavailableError, or CorruptObjectError where the bytes are not the digest's.
        """
        call = _call(locator, reference)

        async def ask(registry: _Registry) -> tuple[Resolved, bytes | None]:
            if locator.kind == "blobs":
                size = await registry.retrying(RESOLVE, call.what, lambda: registry.size(call))
                return Resolved(_sized(Digest.parse(reference), size), "application/octet-stream"), None
            if known is not None and await registry.retrying(RESOLVE, call.what, lambda: registry.still(call, known)):
                return Resolved(known.ref, known.media_type), None
            return await registry.retrying(RESOLVE, call.what, lambda: registry.manifest(call, reference))

        async def noted(registry: _Registry) -> tuple[Resolved, bytes | None]:
            found = await ask(registry)
            # A mirror may give to anybody what the registry does not.
            if locator.grant is None and registry.relays and not registry.is_mirror:
                self._public(locator)
            return found

        return await self._first(self._in_order(locator.upstream, locator.grant), noted)

    async def blocks(
        self, locator: Locator, ref: ObjectRef, first: int, count: int, *, certain: bool = False,
        background: bool = False,
    ) -> AsyncGenerator[bytearray, None]:  # fmt: skip
        """Blocks [first, first + count) in order. Raises as `resolve`; the bytes are not checked against the digest.

        `certain`: from the registry itself, not from a mirror. `background`: no client waits (node/registry/uplink.py).
        """
        call, cutter = _call(locator, str(ref.digest)), BlockCutter(ref, first, count)
        order = [self._find(locator.upstream)] if certain else self._in_order(locator.upstream, locator.grant)
        with nullcontext() if background else order[-1].uplink.foreground():
            for registry in order:
                try:
                    async with aclosing(registry.blocks(call, cutter, ref.size, background)) as blocks:
                        async for block in blocks:
                            yield block
                    return
                except ShoalError as error:
                    if registry is order[-1]:
                        raise
                    log.debug("the next one is asked: %s", error)

    async def admits(self, locator: Locator, reference: str) -> bool:
        """Whether the registry lets the locator's grant, or without one anybody, read its repository.

        It is asked for `reference`, and where it does not know that, or "", for its tags. Raises NotFoundError where
        it knows neither, and UnavailableError.
        """
        registry = self._find(locator.upstream)
        for call in [_call(locator, reference), _tags(locator)] if reference else [_tags(locator)]:
            told = await registry.retrying(RESOLVE, call.what, partial(registry.admits, call))
            if told is not None:
                return told
        raise NotFoundError(f"{registry.name}: {locator.repository}: neither {reference} nor tags found")

    def challenge(self, locator: Locator, *, basic: bool) -> str:
        """The registry's last challenge for the repository, as `relayed` makes it one for clients."""
        return self._find(locator.upstream).challenge(locator.repository, basic=basic)

    async def passthrough(
        self, upstream: str, repository: str, tail: str, query: Mapping[str, str], grant: Grant | None = None
    ) -> Passed:
        """`tags/list` or `referrers/<digest>` of a repository. Raises as `resolve`; BadInputError for a bad query."""
        call = _Call(repository, tail, f"{tail} of {repository}", query, grant)

        async def ask(registry: _Registry) -> Passed:
            return await registry.retrying(RESOLVE, call.what, lambda: registry.passed(call))

        return await self._first(self._in_order(upstream, grant), ask)

    async def _first(self, order: list[_Registry], ask: Callable[[_Registry], Awaitable[_T]]) -> _T:
        *mirrors, registry = order
        for mirror in mirrors:
            try:
                return await ask(mirror)
            except ShoalError as error:
                log.debug("the next one is asked: %s", error)
        return await ask(registry)

    def _in_order(self, upstream: str, grant: Grant | None = None) -> list[_Registry]:
        """A client's grant is for the registry itself: no mirror of it is shown one."""
        registry = self._find(upstream)
        return [registry] if grant else [*registry.mirrors, registry]

    def _find(self, upstream: str) -> _Registry:
        """The registry itself."""
        registry = self._registries.get(canonical(upstream)) or self._removed_lately(canonical(upstream))
        if registry is None:
            raise NotFoundError(f"{upstream} is not configured here; configured: {', '.join(self.names)}")
        return registry

    def _removed_lately(self, name: str) -> _Registry | None:
        registry, until = self._removed.get(name, (None, 0.0))
        return registry if registry is not None and trio.current_time() < until else None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A registry or a mirror of it, and how it does. `problem` is "" where it answered last; bodies' bytes."""

    url: str
    problem: str
    retry_in_s: float
    received: int


class _Registry:
    """One of an upstream's: a connection pool, a breaker, and what it takes for authorization."""

    def __init__(
        self, part: UpstreamPart, url: str, uplink: Uplink, connect: Connect, count: Count, rng: Random,
        mirrors: tuple[_Registry, ...] | None = None,
    ) -> None:  # fmt: skip
        """`mirrors` of the registry itself; None for one of them, which has another name and so other credentials."""
        self._url = httpx.URL(url.rstrip("/"))
        self.part = _own(part)
        self._upstream = part.name
        self.name = part.name if mirrors is not None else self._url.netloc.decode("ascii")
        self.is_mirror = mirrors is None
        self.mirrors = mirrors or ()
        self.problem = ""
        self.uplink = uplink
        self._received = 0
        self.rng = rng
        self.breaker = Breaker()
        self.probed = trio.lowlevel.ParkingLot()
        """All of it is unparked when the registry answered, or failed for everybody."""
        self.body_connections = max(1, part.connections - 1)
        self.bodies = trio.Semaphore(self.body_connections)
        self.client, self._keep_none = connect(part)
        self._count = count
        self._config = DockerConfig(part.docker_config if part.access == "node" else "")
        self.relays = part.access == "relay"
        self._helpers = CredentialHelpers()
        self._refused_header = ""
        self._challenges: LRUCache[str, list[Challenge]] = LRUCache(MAX_AUTHORIZED)
        """What the registry last asked of whom it refused, by repository."""
        self._refused: TTLCache[str, bool] = TTLCache(MAX_AUTHORIZED, REFUSED_S, timer=trio.current_time)
        self._broken: TTLCache[tuple[str, str], int] = TTLCache(MAX_BROKEN, BROKEN_S, timer=trio.current_time)
        """The status that was the answer to a call, by its repository and tail."""
        self._authorized: LRUCache[str, tuple[str, float]] = LRUCache(MAX_AUTHORIZED)
        self._authorizing = trio.Lock()
        self._token_failure: tuple[float, _FailedError] | None = None

    def retire(self) -> None:
        """Another has taken its place: what it reads it reads to the end, and then it keeps no connection."""
        for registry in (self, *self.mirrors):
            registry._keep_none()

    def inherit(self, before: _Registry) -> None:
        """What clients were just told to meet, and what was read so far of each URL."""
        self._challenges = before._challenges
        received = {one._url: one._received for one in (before, *before.mirrors)}
        for registry in (self, *self.mirrors):
            registry._received = received.get(registry._url, 0)

    def report(self) -> Endpoint:
        retry_in_s = self.breaker.rest_s(trio.current_time())
        return Endpoint(str(self._url), self.problem if self.breaker.failing else "", retry_in_s, self._received)

    async def admit(self, what: str) -> None:
        """Raises UnavailableError where the breaker lets no call through. While one tries whether the registry is well
        again the others wait for what comes of it: the first pull after an outage makes many calls at once."""
        wait_s = self.breaker.wait_s(trio.current_time())
        if wait_s and self.breaker.probing:
            with trio.move_on_after(PROBE_S):
                await self.probed.park()
            wait_s = self.breaker.wait_s(trio.current_time())
        if wait_s:
            raise UnavailableError(f"{self.name}: {what}: {self.problem}; next attempt in {wait_s:.0f} s")

    async def retrying(self, policy: RetryPolicy, what: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        await self.admit(what)
        attempts = _Attempts(self, policy, what)
        while True:
            try:
                return await attempt()
            except _FailedError as failure:
                await attempts.pause(failure)

    async def blocks(
        self, call: _Call, cutter: BlockCutter, size: int, background: bool
    ) -> AsyncGenerator[bytearray, None]:
        """What is wanted still. Raises UnavailableError; the cutter tells how far this came."""
        attempts: _Attempts | None = None
        while not cutter.done:
            if background:
                await self.uplink.turn()
            async with self.bodies:
                self.uplink.check(background=background)
                if attempts is None:
                    await self.admit(call.what)
                    attempts = _Attempts(self, BODY, call.what)
                try:
                    async with aclosing(self.body(call, cutter, size, background)) as blocks:
                        async for block in blocks:
                            attempts.progressed()
                            yield block
                except _FailedError as failure:
                    await attempts.pause(failure)
                except MakeWayError:
                    log.debug("%s makes way", call.what)  # its connection is closed, so that it is in nobody's way

    # One attempt each

    async def still(self, call: _Call, known: Resolved) -> bool:
        """Whether the registry confirms by HEAD that the call's reference stands for `known`."""
        async with self._response("HEAD", call, {"Accept": ACCEPT}) as response:
            if response.status_code in (404, *RETRIED_STATUS):
                self._expect(response, call, 200)
            digest = response.headers.get("docker-content-digest", "")
            return bool(response.status_code == 200 and digest == str(known.ref.digest))

    async def manifest(self, call: _Call, reference: str) -> tuple[Resolved, bytes]:
        async with self._response("GET", call, {"Accept": ACCEPT}) as response:
            self._expect(response, call, 200)
            body = await self._bounded(response, call, MAX_MANIFEST)
            digest = _digest_of(body, reference, response.headers.get("docker-content-digest", ""))
            if digest is None:
                raise CorruptObjectError(f"{self.name}: {call.what}: the bytes do not hash to the digest")
            return Resolved(ObjectRef(digest, len(body)), _media_type(response)), body

    async def size(self, call: _Call) -> int:
        """A blob's size, from HEAD; from a range of one byte where HEAD is not answered (presigned URLs)."""
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
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            total = match[3] if match and response.status_code == 206 else response.headers.get("content-length", "")
            if (response.status_code == 206 and not match) or not total.isdigit():
                raise _FailedError("tells no size", again=False)
            return int(total)

    async def body(
        self, call: _Call, cutter: BlockCutter, size: int, background: bool
    ) -> AsyncGenerator[bytearray, None]:
        """The blocks that are still wanted, from one connection. Raises _FailedError where fewer come."""
        start, stop = cutter.position, cutter.stop
        whole = (start, stop) == (0, size) or call.tail.startswith("manifests/")
        headers = {"Accept": ACCEPT} | ({} if whole else {"Range": f"bytes={start}-{stop - 1}"})
        async with self._response("GET", call, headers) as response, _body_of(response) as body:
            self._expect(response, call, 200, 206)
            skipped = start - _body_start(response, start, stop, size)
            scratch = memoryview(bytearray(min(skipped, SKIPPED_BYTES)))
            while skipped:
                skipped -= await self._receive(body, scratch[:skipped], background)
            while not cutter.done:
                block = cutter.filled(await self._receive(body, cutter.room(), background))
                if block is not None:
                    yield block
            if response.status_code == 206 or stop == size:
                # Only a body whose end was read leaves the connection fit for the next request.
                with suppress(httpx.HTTPError):
                    await body.recv_into(memoryview(bytearray(1)))

    async def _receive(self, body: _Receiver, view: memoryview, background: bool) -> int:
        taken, count = await self.uplink.take(len(view), background=background), 0
        try:
            count = await body.recv_into(view[: taken.count])
        except httpx.HTTPError as error:
            raise _FailedError(_reason(error), again=True) from error
        finally:
            self.uplink.came(taken, count)
        if not count:
            raise _FailedError("the body ended early", again=True)
        self._note(count)
        return count

    def _note(self, count: int) -> None:
        self._received += count
        self._count(self._upstream, count)

    async def passed(self, call: _Call) -> Passed:
        async with self._response("GET", call, {"Accept": "*/*"}) as response:
            if response.status_code == 400:
                raise BadInputError(f"{self.name}: {call.what}: the registry does not accept the query")
            if response.status_code in (405, 501):
                raise NotFoundError(f"{self.name}: {call.what}: the registry does not list that")
            self._expect(response, call, 200)
            body = await self._bounded(response, call, MAX_MANIFEST)
            return Passed(body, _media_type(response), response.headers.get("link", ""))

    async def admits(self, call: _Call) -> bool | None:
        """None where the registry does not know what is asked for. A redirect is a yes: it is followed for nothing."""
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

    # What they are made of

    @asynccontextmanager
    async def _response(
        self, method: str, call: _Call, headers: Mapping[str, str], *, follow: bool = True
    ) -> AsyncIterator[httpx.Response]:
        """The answer, after authorization and redirects; its body not yet read."""
        if call.grant is None and call.repository in self._refused:
            raise self._denied(call, "access denied (401)")
        if (status := self._broken.get((call.repository, call.tail))) is not None:
            raise _FailedError(f"answered {status} just now", again=False)
        url = self._url.copy_with(raw_path=(self._url.path.rstrip("/") + call.path).encode("ascii"))
        if call.query:
            url = url.copy_merge_params(call.query)
        async with AsyncExitStack() as stack:
            used = call.grant.authorization if call.grant else self._remembered(call.repository)
            response = await self._send(method, url, headers, used, follow)
            stack.push_async_callback(response.aclose)
            if response.status_code == 401 and not response.history:
                challenges = parse_challenges(response.headers.get("www-authenticate", ""))
                self._challenges[call.repository] = challenges
                if call.grant is None:
                    await response.aclose()
                    header = await self._authorize(call, challenges, used)
                    response = await self._send(method, url, headers, header, follow)
                    stack.push_async_callback(response.aclose)
            yield response

    def _denied(self, call: _Call, why: str) -> DeniedError:
        """The registry wants to know who reads, and this node does not say, or not what it wants."""
        if self.relays and call.grant is None:
            self._refused[call.repository] = True
        return DeniedError(f"{self.name}: {call.what}: {why}")

    def challenge(self, repository: str, *, basic: bool) -> str:
        challenges = self._challenges.get(repository, [])
        return relayed(challenges, insecure=self._url.scheme == "http", repository=repository, basic=basic)

    async def _send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], authorization: str | None,
        follow: bool = True, form: Mapping[str, str] | None = None,
    ) -> httpx.Response:  # fmt: skip
        sent = dict(headers) | ({"Authorization": authorization} if authorization else {})
        request = self.client.build_request(method, url, headers=sent, data=form)
        try:
            response = await self.client.send(request, stream=True, follow_redirects=follow)
        except (httpx.PoolTimeout, httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise _FailedError(_reason(error), again=False) from error
        except httpx.TimeoutException as error:
            raise _FailedError(_reason(error), again=False, breaks=True) from error
        except httpx.HTTPError as error:
            raise _FailedError(_reason(error), again=True, breaks=isinstance(error, httpx.ConnectError)) from error
        if response.status_code not in RETRIED_STATUS:
            self.breaker.succeeded()
            self.probed.unpark_all()
        return response

    def _expect(self, response: httpx.Response, call: _Call, *expected: int) -> None:
        status = response.status_code
        if status in expected:
            return
        if status == 404:
            raise NotFoundError(f"{self.name}: {call.what}: not found")
        if status == 401 and not response.history:
            raise self._denied(call, "access denied (401)")
        if status in (401, 403):
            raise DeniedError(f"{self.name}: {call.what}: access denied ({status})")
        after = response.headers.get("retry-after", "")
        retry_after_s = float(after) if after.isascii() and after.isdigit() else None
        busy = status in RETRIED_STATUS
        if status >= 500 and not busy:
            self._broken[call.repository, call.tail] = status
        raise _FailedError(f"answered {status}", again=busy, breaks=busy, retry_after_s=retry_after_s)

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in response.aiter_raw():
                self._note(len(chunk))
                self.uplink.note(len(chunk))
                yield chunk
        except httpx.HTTPError as error:
            raise _FailedError(_reason(error), again=True) from error

    async def _bounded(self, response: httpx.Response, call: _Call, limit: int) -> bytes:
        body = bytearray()
        async with aclosing(self._chunks(response)) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > limit:
                    raise UnavailableError(f"{self.name}: {call.what}: larger than {limit} bytes")
        return bytes(body)

    # Authorization

    def _remembered(self, repository: str) -> str | None:
        header, until = self._authorized.get(repository, (None, 0.0))
        return header if trio.current_time() < until else None

    async def _authorize(self, call: _Call, challenges: list[Challenge], used: str | None) -> str:
        """An Authorization header other than the one that was refused; one task asks, the others wait for it."""
        async with self._authorizing:
            remembered = self._remembered(call.repository)
            if remembered is not None and remembered != used:
                return remembered
            if self._token_failure and trio.current_time() < self._token_failure[0]:
                raise self._token_failure[1]
            try:
                header, lifetime_s = await self._meet(call, challenges, used)
            except _FailedError as failure:
                self._token_failure = (trio.current_time() + TOKEN_FAILURE_S, failure)
                raise
            self._authorized[call.repository] = (header, trio.current_time() + lifetime_s)
            return header

    async def _credentials(self) -> Credentials | None:
        """This node's own for the registry."""
        names = (self.name, self._url.netloc.decode("ascii"))
        config = self._config.read()
        helper = config.helper(names)
        try:
            found = await self._helpers.get(*helper, self._refused_header) if helper else None
        except HelperError as error:
            raise _FailedError(str(error), again=False) from error
        return found or config.of(names)

    async def _meet(self, call: _Call, challenges: list[Challenge], used: str | None) -> tuple[str, float]:
        self._refused_header = used or self._refused_header
        credentials = await self._credentials()
        for challenge in challenges:
            if challenge.scheme == "bearer":
                return await self._token(call, challenge, credentials)
            if challenge.scheme == "basic" and credentials and not credentials.is_identity:
                return credentials.header, BASIC_LIFETIME_S
        raise self._denied(call, "access denied" if credentials else "access denied; no credentials for it")

    async def _token(self, call: _Call, challenge: Challenge, credentials: Credentials | None) -> tuple[str, float]:
        scope = f"repository:{call.repository}:pull"
        asked = token_request(challenge, insecure=self._url.scheme == "http", scope=scope)
        if asked is None:
            raise self._denied(call, "the token service it names is not https")
        try:
            url = httpx.URL(asked.realm).copy_merge_params(asked.query)
        except httpx.InvalidURL as error:
            raise self._denied(call, "the token service it names is not a URL") from error
        if credentials and credentials.is_identity:
            response = await self._send("POST", httpx.URL(asked.realm), {}, None, False, asked.form(credentials))
        else:
            response = await self._send("GET", url, {}, credentials.header if credentials else None)
        try:
            if response.status_code == 401 and credentials:
                self._refused_header = credentials.header
            if response.status_code in (400, 401, 403, 404):
                raise self._denied(call, f"the token service answered {response.status_code}")
            self._expect(response, call, 200)
            token = parse_token(await self._bounded(response, call, MAX_TOKEN_REPLY))
        finally:
            await response.aclose()
        if token is None:
            raise _FailedError("the token service sent no token", again=False)
        return f"Bearer {token[0]}", token[1]


class _Attempts:
    """The attempts at one call: spaced by the policy, ended with UnavailableError."""

    def __init__(self, registry: _Registry, policy: RetryPolicy, what: str) -> None:
        self._registry = registry
        self._policy = MIRROR if registry.is_mirror else policy
        self._what = what
        self._failures = 0

    def progressed(self) -> None:
        self._failures = 0

    async def pause(self, failure: _FailedError) -> None:
        registry = self._registry
        self._failures += 1
        # One that fails to answer again is not asked as often as one that did so far.
        once_more = failure.again and not (failure.breaks and registry.breaker.failing)
        again = self._policy.delay(self._failures, failure.retry_after_s, registry.rng) if once_more else None
        if again is None:
            if failure.breaks or registry.is_mirror:
                if not registry.breaker.failing:
                    log.warning("%s is passed over for a while: %s", registry.name, failure)
                registry.problem = str(failure)
                registry.breaker.failed(trio.current_time(), failure.retry_after_s or 0.0)
                registry.probed.unpark_all()
            raise UnavailableError(f"{registry.name}: {self._what}: {failure}") from failure
        log.info("%s: %s: %s; %s again in %.1f s", registry.name, self._what, failure, self._policy.name, again)
        await trio.sleep(again)


def _own(part: UpstreamPart) -> UpstreamPart:
    """Without what is the uplink's and the access's."""
    return msgspec.structs.replace(part, rate="", daily="", daily_spent="refuse", hours=(), access_grace="")


def _registry(part: UpstreamPart, uplink: Uplink, connect: Connect, count: Count, rng: Random) -> _Registry:
    *before, url = part.urls
    mirrors = tuple(_Registry(part, one, uplink, connect, count, rng) for one in before)
    return _Registry(part, url, uplink, connect, count, rng, mirrors)


def _sockets() -> Connect:
    default = ssl.create_default_context()

    def connect(part: UpstreamPart) -> tuple[httpx.AsyncClient, Callable[[], None]]:
        context = _trusted(part, default)
        transport = DirectTransport(context, part.connections)
        return client_over(transport, context, part.connections), transport.retire

    return connect


def _trusted(part: UpstreamPart, default: ssl.SSLContext) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=part.ca) if part.ca else default
        if part.ca and len(part.urls) > 1:
            context.load_default_certs()  # one of them may be public, and another the site's own
    except (OSError, ssl.SSLError) as error:
        raise BadInputError(f'upstream "{part.name}": ca = "{part.ca}": {error}') from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def client_over(
    transport: httpx.AsyncBaseTransport, context: ssl.SSLContext, connections: int, *, environment: bool = True
) -> httpx.AsyncClient:
    """`environment`: where that names a proxy, it is taken, by httpx's own transport and with this context."""
    return httpx.AsyncClient(
        verify=context,
        mounts={"all://*": transport},  # the least specific of patterns: those of proxies go before it
        trust_env=environment,
        timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=connections),
        follow_redirects=True,
        max_redirects=MAX_REDIRECTS,
        headers={"User-Agent": "shoal", "Accept-Encoding": "identity"},
    )


def _reason(error: Exception) -> str:
    """What happened, without the library's text, which may hold a URL."""
    names: dict[type[Exception], str] = {
        httpx.ConnectTimeout: "no connection in time",
        httpx.ReadTimeout: "silent for too long",
        httpx.ConnectError: "cannot be reached",
        httpx.TooManyRedirects: "redirects without end",
    }
    return names.get(type(error), f"the connection broke ({type(error).__name__})")


class _Receiver(Protocol):
    async def recv_into(self, view: memoryview) -> int: ...


class _Portions:
    """A body as httpx's own transport gives it, which the environment's proxies need."""

    def __init__(self, portions: AsyncIterator[bytes]) -> None:
        self._portions = portions
        self._rest = memoryview(b"")

    async def recv_into(self, view: memoryview) -> int:
        if not self._rest:
            self._rest = memoryview(await anext(self._portions, b""))
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


@asynccontextmanager
async def _body_of(response: httpx.Response) -> AsyncIterator[_Receiver]:
    direct: Body | None = response.extensions.get("body")
    if direct is not None:
        yield direct
        return
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_raw())) as portions:
        yield _Portions(portions)


def _sized(digest: Digest, size: int) -> ObjectRef:
    try:
        return ObjectRef(digest, size)
    except BadInputError as error:
        raise UnavailableError(str(error)) from error


def _media_type(response: httpx.Response) -> str:
    media_type = str(response.headers.get("content-type", "")).partition(";")[0].strip()
    return media_type if MEDIA_TYPE.fullmatch(media_type) else "application/octet-stream"


def _digest_of(body: bytes, reference: str, header: str) -> Digest | None:
    """The digest of `body`; None where it is not what was asked for, or not what the registry says it is."""
    expected = reference if is_digest(reference) else header
    algorithm = "sha512" if expected.startswith("sha512:") else "sha256"
    digest = Digest(algorithm, hashlib.new(algorithm, body).hexdigest())
    return digest if expected in ("", str(digest)) else None


def _body_start(response: httpx.Response, start: int, stop: int, size: int) -> int:
    """The object's offset of the body's first byte."""
    if response.status_code == 200:
        if response.headers.get("content-length", str(size)) != str(size):
            raise _FailedError("the object has another size than was told", again=False)
        return 0
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if not match or int(match[1]) != start or not start < int(match[2]) + 1 <= stop or match[3] not in ("*", str(size)):
        raise _FailedError("answered another range than was asked for", again=False)
    return start
