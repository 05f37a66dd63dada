"""The configured upstreams: names to descriptors, and ranges of objects to blocks.

An upstream is a list of mirrors in order, and last the registry itself, each with its own connections, tokens and
breaker (node/registry/client.py). If a mirror fails for any reason, the next is asked: a mirror may lack an object that
the registry has. The answer of the registry itself is final.

Every request is bounded in time, size and number. An unreachable registry costs one connect timeout, and then no time
for some seconds (`Breaker`). An overloaded registry costs some attempts, and then the pause that it asks for.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from functools import partial
from random import Random
from typing import Self, TypeVar

import httpx
import msgspec
import trio
from cachetools import TTLCache

from node.config.schema import UpstreamPart
from node.oci.manifests import UNTYPED, Resolved
from node.oci.references import Grant, Locator, canonical
from node.registry.attempts import Availability
from node.registry.bodies import Begun, BlockCutter, Meter
from node.registry.calls import Call, Endpoint, Passed
from node.registry.client import RegistryClient
from node.registry.transport import Connect, sockets
from node.registry.uplink import Uplink, UplinkUse
from protocol.errors import NotFoundError, ShoalError, UnavailableError
from protocol.ids import MAX_OBJECT_SIZE, Digest, ObjectRef, is_possible
from protocol.ways import ALWAYS_SITE, Choice, Ways

log = logging.getLogger(__name__)

REMOVED_S = 300.0
"""How long a removed upstream can still be read: a pull asks for one object after another and should finish."""
BEGUN_S, MAX_BEGUN = 60.0, 8
"""How long, and how many, incomplete blocks are kept when a read ends: what an uplink brought before it was cut need
not cross it again. They take at most 4 MiB for each upstream."""
REACHED_S = 30.0
"""An answer of a registry within this time is told to members that may take it for unreachable."""
Count = Callable[[str, int], None]
"""Called with the upstream's name and the number of body bytes just read from it."""
_T = TypeVar("_T")


class _Upstream:
    """`part` lacks the uplink's settings, `access_grace` and `prefer`: a change of those needs no new connections."""

    def __init__(self, part: UpstreamPart, uplink: Uplink, connect: Connect, *, count: Count, rng: Random) -> None:
        self.part, self.uplink = _own(part), uplink
        self.ways, self.prefer = Ways(), part.prefer
        self.in_order: list[RegistryClient] = []
        for place, url in enumerate(part.urls, 1):
            is_mirror = place < len(part.urls)
            name = httpx.URL(url).netloc.decode("ascii") if is_mirror else part.name
            meter = Meter(uplink, partial(count, part.name))
            availability = Availability(name, is_mirror=is_mirror, rng=rng)
            self.in_order.append(RegistryClient(part, url, connect, availability=availability, meter=meter))
        self.registry = self.in_order[-1]
        self._begun: TTLCache[tuple[ObjectRef, int], Begun] = TTLCache(MAX_BEGUN, BEGUN_S, timer=trio.current_time)

    @contextmanager
    def continuing(self, cutter: BlockCutter) -> Iterator[None]:
        """Begin with the bytes of the first block that an earlier read got before it failed or was given up, and keep
        those that this one gets if it does not complete its block."""
        if (begun := self._begun.pop((cutter.ref, cutter.index), None)) is not None:
            cutter.resume(begun)
        try:
            yield
        finally:
            if (begun := cutter.begun) is not None:
                self._begun[begun.ref, begun.index] = begun

    def asked(self, grant: Grant | None) -> list[RegistryClient]:
        """The clients in order. A client's grant is for the registry itself: mirrors do not see it."""
        return [self.registry] if grant else self.in_order

    @contextmanager
    def measured(self, cutter: BlockCutter) -> Iterator[None]:
        """Let `ways` know how long the registry takes for what `cutter` still lacks."""
        reading = self.ways.registry.begin(cutter.stop - cutter.position, trio.current_time())
        cutter.watch(lambda count: reading.came(count, trio.current_time()))
        try:
            yield
        finally:
            reading.ended(trio.current_time())

    def inherit(self, before: _Upstream) -> None:
        """Take over the challenges that clients may be answering now, the bytes read so far from each URL, and what is
        known of the ways."""
        self.ways = before.ways
        self.registry.authorization.challenges = before.registry.authorization.challenges
        received = {client.url: client.meter.received for client in before.in_order}
        for client in self.in_order:
            client.meter.received = received.get(client.url, 0)


class Upstreams:
    """All configured upstreams. An async context manager: leaving it closes the connections."""

    def __init__(
        self,
        parts: Sequence[UpstreamPart],
        *,
        count: Count,
        rng: Random,
        uplinks: Iterable[Uplink] = (),
        public: Callable[[Locator], None] = lambda _: None,
        max_object: int = MAX_OBJECT_SIZE,
        connect: Connect | None = None,
    ) -> None:
        """`uplinks` are those with limits; other upstreams have no limits. `connect`: None for real sockets.

        Objects of more than `max_object` bytes are not resolved. `public` is called when a registry resolved a name
        without credentials of this node or of a client.
        """
        self._public, self._max_object = public, max_object
        self._upstream = partial(_Upstream, connect=connect or sockets(), count=count, rng=rng)
        self._upstreams: dict[str, _Upstream] = {}
        self._removed: dict[str, tuple[_Upstream, float]] = {}
        """By name, a removed upstream and the time until which it can be read."""
        self.prepared(parts, uplinks)()

    @property
    def names(self) -> Collection[str]:
        """A view that changes with the configuration."""
        return self._upstreams.keys()

    def prepared(self, parts: Sequence[UpstreamPart], uplinks: Iterable[Uplink] = ()) -> Callable[[], None]:
        """A function that replaces the upstreams by `parts`; it does not fail. Raises BadInputError.

        An unchanged upstream keeps its connections, tokens and breaker. A read in progress continues on the upstream
        where it began. A removed upstream can be read for another REMOVED_S.
        """
        limited = {uplink.name: uplink for uplink in uplinks}
        prefers = {canonical(part.name): part.prefer for part in parts}
        wanted = {canonical(part.name): self._current_or_new(part, limited) for part in parts}

        def change() -> None:
            for name, upstream in self._upstreams.items():
                if wanted.get(name) is not upstream:
                    for client in upstream.in_order:
                        client.retire()
                if name not in wanted:
                    self._removed[name] = upstream, trio.current_time() + REMOVED_S
            self._upstreams.clear()
            self._upstreams.update(wanted)
            for name, prefer in prefers.items():
                wanted[name].prefer = prefer

        return change

    def _current_or_new(self, part: UpstreamPart, uplinks: Mapping[str, Uplink]) -> _Upstream:
        current = self._upstreams.get(canonical(part.name))
        if current is not None and current.part == _own(part) and not part.ca:  # the file `ca` may have changed
            return current
        upstream = self._upstream(part, uplinks.get(part.name) or Uplink(part.name))
        if current is not None:
            upstream.inherit(current)
        return upstream

    def connections(self, upstream: str) -> int:
        """How many calls of `blocks` can read from the upstream at once."""
        return self._find(upstream).registry.body_connections

    def endpoints(self, upstream: str) -> tuple[Endpoint, ...]:
        """The states of its mirrors and of its registry, in the order in which they are asked."""
        return tuple(client.report() for client in self._find(upstream).in_order)

    def uplink(self, upstream: str) -> UplinkUse:
        return self._find(upstream).uplink.use()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for upstream in self._upstreams.values():
            for client in upstream.in_order:
                await client.http.aclose()

    async def resolve(self, locator: Locator, reference: str, *, whole: bool = False) -> tuple[Resolved, bytes | None]:
        """The descriptor that `reference` stands for, and the manifest's bytes if `whole`, or if the registry does not
        show the descriptor without them. A descriptor without bytes is a claim: its size and type are not checked.

        Raises NotFoundError, DeniedError, UnavailableError, or CorruptObjectError if the bytes do not have the digest.
        """
        call = Call.of(locator, reference)

        async def ask(client: RegistryClient) -> tuple[Resolved, bytes | None]:
            answer: tuple[Resolved, bytes | None]
            if locator.kind == "blobs":
                size = await client.availability.retrying(call, client.size)
                answer = Resolved(self._sized(Digest.parse(reference), size, client.name), UNTYPED), None
            elif not whole and (claimed := await client.availability.retrying(call, client.described)) is not None:
                answer = claimed, None
            else:
                answer = await client.availability.retrying(call, client.manifest)
            # A mirror may serve objects to everyone that the registry does not.
            if locator.grant is None and client.authorization.relays and not client.availability.is_mirror:
                self._public(locator)
            return answer

        return await self._first(self._find(locator.upstream).asked(locator.grant), ask)

    async def blocks(
        self,
        locator: Locator,
        ref: ObjectRef,
        first: int,
        count: int,
        *,
        certain: bool = False,
        background: bool = False,
        coming: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[bytearray, None]:
        """Blocks [first, first + count) in order. Raises as `resolve`; the bytes are not checked against the digest.

        `certain`: from the registry itself, not from a mirror. `background`: no client waits (node/registry/uplink.py).
        `coming` is called whenever bytes of the blocks arrive.
        """
        upstream, call = self._find(locator.upstream), Call.of(locator, str(ref.digest))
        cutter = BlockCutter(ref, first, count, coming)
        with (
            nullcontext() if background else upstream.uplink.foreground(),
            nullcontext() if certain else upstream.continuing(cutter),
            nullcontext() if background else upstream.measured(cutter),
        ):
            for client in [upstream.registry] if certain else upstream.asked(locator.grant):
                try:
                    async with aclosing(client.blocks(call, cutter, background=background)) as blocks:
                        async for block in blocks:
                            yield block
                    return
                except ShoalError as error:
                    if client is upstream.registry:
                        raise
                    log.debug("the next URL is asked: %s", error)

    async def admits(self, locator: Locator, reference: str) -> bool:
        """Whether the registry lets the locator's grant, or without one everyone, read its repository.

        The registry is asked for `reference`. If it lacks that, or `reference` is "", it is asked for the tags. Raises
        NotFoundError if it has neither, and UnavailableError.
        """
        client = self._find(locator.upstream).registry
        for call in [Call.of(locator, reference), Call.tags(locator)] if reference else [Call.tags(locator)]:
            admitted = await client.availability.retrying(call, client.admits)
            if admitted is not None:
                return admitted
        raise NotFoundError(f"{client.name}: {locator.repository}: neither {reference} nor tags found")

    def is_open(self, upstream: str) -> bool:
        """Whether a read without a client's grant shows that everybody may read the object: this node has no
        credentials, and no mirror answers for the registry, since a mirror may have credentials."""
        asked = self._find(upstream)
        return asked.part.access != "node" and len(asked.in_order) == 1

    async def gives(self, locator: Locator, digest: Digest) -> bool:
        """Whether the registry itself gives this object of the locator's repository to the locator's grant, or without
        one to everybody. Raises NotFoundError if the repository does not have it, and UnavailableError."""
        client = self._find(locator.upstream).registry
        return await client.availability.retrying(Call.of(locator, str(digest)), client.gives)

    def answers(self, upstream: str) -> bool:
        """Whether the registry answered this node lately, and has not failed since."""
        if (asked := self._upstreams.get(canonical(upstream))) is None:
            return False
        state = asked.registry.availability
        return not state.breaker.failing and trio.current_time() - state.answered_at < REACHED_S

    def choose(self, upstream: str, length: int, nodes: int) -> Choice:
        """The way for a read of `length` bytes for a client of this node: through the site, or from the registry.
        `nodes` of the site share the uplink."""
        asked = self._upstreams.get(canonical(upstream))
        if asked is None or asked.prefer == "site":
            return ALWAYS_SITE
        pushed_at = max(client.availability.pushed_at for client in asked.in_order)
        now, budget = trio.current_time(), asked.uplink.policy.limited
        return asked.ways.choose(length, now, nodes=nodes, pushed_at=pushed_at, budget=budget)

    def ways(self, upstream: str) -> Ways:
        """What both ways gave lately. Reads of blocks from the registry are measured here, those from members by
        `Ways.site`."""
        asked = self._upstreams.get(canonical(upstream))
        return asked.ways if asked is not None else Ways()

    def told(self, upstream: str) -> None:
        """Another member says that the registry answers: a node that takes it for unreachable soon tries again."""
        if (asked := self._upstreams.get(canonical(upstream))) is not None:
            asked.registry.availability.hinted()

    def challenge(self, locator: Locator, *, basic: bool) -> str:
        """The registry's last challenge for the repository, which a client should answer; "" for none."""
        return self._find(locator.upstream).registry.authorization.challenge(locator.repository, basic=basic)

    async def passthrough(self, locator: Locator, tail: str, query: Mapping[str, str]) -> Passed:
        """`tags/list` or `referrers/<digest>` of a repository. Raises as `resolve`; BadInputError for a bad query."""
        repository, grant = locator.repository, locator.grant
        call = Call(repository, tail, f"{tail} of {repository}", query=tuple(sorted(query.items())), grant=grant)
        clients = self._find(locator.upstream).asked(grant)
        return await self._first(clients, lambda client: client.availability.retrying(call, client.passed))

    async def _first(self, clients: list[RegistryClient], ask: Callable[[RegistryClient], Awaitable[_T]]) -> _T:
        *mirrors, registry = clients
        for mirror in mirrors:
            try:
                return await ask(mirror)
            except ShoalError as error:
                log.debug("the next URL is asked: %s", error)
        return await ask(registry)

    def _sized(self, digest: Digest, size: int, name: str) -> ObjectRef:
        if not is_possible(digest, size, self._max_object):
            raise UnavailableError(
                f"{name}: {digest} has {size} bytes, by its answer; max_object is {self._max_object}"
            )
        return ObjectRef(digest, size)

    def _find(self, name: str) -> _Upstream:
        upstream = self._upstreams.get(canonical(name))
        if upstream is None:
            removed, until = self._removed.get(canonical(name), (None, 0.0))
            upstream = removed if trio.current_time() < until else None
        if upstream is None:
            raise NotFoundError(f"{name} is not configured here; configured: {', '.join(self.names)}")
        return upstream


def _own(part: UpstreamPart) -> UpstreamPart:
    return msgspec.structs.replace(
        part, rate="", daily="", daily_spent="refuse", hours=(), access_grace="", prefer="site"
    )
