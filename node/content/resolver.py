"""Resolution of tags and digests to descriptors, for the whole site, by one node that asks the registry.

The first living one of a name's three homes asks the registry and remembers the answer; the other members ask that
home. An answer's age counts from the question to the registry, through however many members it passes. So two nodes
never disagree for longer than the tag's time to live (node/content/known_names.py). While the registry is out of reach,
all members use the youngest answer that the site has.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import trio

from cache.store import READ_HERE, Askers
from node.blocks.home import Home
from node.blocks.questions import Questions
from node.blocks.values import Site
from node.content.known_names import KnownNames
from node.exchange.contract import Answer, Lane
from node.oci.manifests import Resolved
from node.oci.references import Locator, is_digest
from node.runtime.single_flight import SingleFlight
from protocol import messages
from protocol.errors import DeniedError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import Digest, ObjectRef, PeerId, is_possible

log = logging.getLogger(__name__)

ASK_S = 2.0
"""A home sends `Waiting` while it asks the registry; a home that is silent for this time has failed."""
LAST_RESORT_MEMBERS = 64
"""Members that are asked for the answers that they hold if the registry does not answer."""
JOINED_S = 1.0
"""A home may have asked the registry this much earlier than this node asked the home: for another member."""


class Registries(Protocol):
    """The part of node/registry/upstreams.py that is used here."""

    async def resolve(
        self, locator: Locator, reference: str, previous: Resolved | None = None, /
    ) -> tuple[Resolved, bytes | None]: ...


class Resolver:
    """`served` is called with the age in seconds of each tag's answer to a client. `public_age`: how many seconds ago
    this node saw that the repository can be read without a grant."""

    def __init__(
        self,
        site: Site,
        known_names: KnownNames,
        upstreams: Registries,
        *,
        questions: Questions,
        home: Home,
        nursery: trio.Nursery,
        served: Callable[[float], None],
        public_age: Callable[[Locator], float | None] = lambda _: None,
    ) -> None:
        self._site, self.known, self._upstreams = site, known_names, upstreams
        self._questions, self._home = questions, home
        self._served, self._public_age = served, public_age
        self._asking: SingleFlight[tuple[Locator, str], Resolved] = SingleFlight(nursery)
        self._revalidating: SingleFlight[tuple[Locator, str], Resolved] = SingleFlight(nursery)

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        """Answer a client of this node. Raises NotFoundError, DeniedError or UnavailableError."""
        resolved = self.known.fresh(locator, reference)
        if resolved is None:
            resolved = await self._asking.do((locator, reference), lambda: self._ask_site(locator, reference))
        if not is_digest(reference):
            self._served(resolved.age_s)
        return resolved

    async def handle(self, peer: PeerId, request: messages.Resolve) -> Answer:
        locator, reference = Locator.parse(request.source), request.reference
        resolved = self.known.fresh(locator, reference)
        if resolved is None and request.hops:
            resolved = await self.ask_registry(locator, reference, kept_for=(peer,))
        resolved = resolved or self.known.usable(locator, reference)
        if resolved is None:
            return Answer(messages.Failed("not-held", "not known here"))
        if locator.kind == "manifests":
            resolved = self.known.typed(resolved) or resolved
        ref, public = resolved.ref, self._public_age(locator)
        age_s = -1.0 if public is None else public
        return Answer(
            messages.Resolved(str(ref.digest), ref.size, resolved.media_type, resolved.age_s, public_age_s=age_s)
        )

    async def _ask_site(self, locator: Locator, reference: str) -> Resolved:
        site, now = self._site, trio.current_time()
        # A client's grant stays on this node, and no member gets the answer to a question that was asked with one.
        homes = site.placement().name_homes(f"{locator}@{reference}") if locator.grant is None else ()
        for home in homes:
            if home == site.own:
                break
            if site.health.avoided(home, now):
                continue
            began = trio.current_time()
            try:
                resolved = await self._ask_member(home, locator, reference, hops=1)
            except UnavailableError:
                break
            except NotFoundError:
                self.known.forget(locator, reference)
                raise
            except DeniedError:
                raise
            except ShoalError as error:
                log.debug("name home %s: %s", home, error)
                continue
            if self.known.is_doubted(locator, resolved):
                break
            limit_s = max(trio.current_time() - began + JOINED_S, self.known.ttl_s(locator, reference))
            if resolved.age_s < limit_s or self.known.site_was_asked(locator, reference):
                return resolved
            break  # the home does not reach the registry, but this node may
        return await self.ask_registry(locator, reference)

    async def _ask_member(self, peer: PeerId, locator: Locator, reference: str, *, hops: int) -> Resolved:
        """The member's answer, or the answer known here if that is younger."""
        asked = trio.current_time()
        message = await self._question(peer, locator, reference, hops)
        digest = Digest.parse(message.digest)
        if is_digest(reference) and str(digest) != reference:
            raise UnavailableError(f"{peer} answers with another digest than {reference}")
        if not is_possible(digest, message.size, self.known.max_object):
            raise UnavailableError(f"{peer} answers with {message.size} bytes for {digest}")
        # The answer's age may include part of the round trip. Too high an age only makes the node ask again too early.
        age_s = max(0.0, message.age_s) + trio.current_time() - asked
        resolved = Resolved(ObjectRef(digest, message.size), message.media_type, age_s)
        return self.known.note(locator, reference, resolved, peer)

    async def _question(self, peer: PeerId, locator: Locator, reference: str, hops: int) -> messages.Resolved:
        question = messages.Resolve(str(locator), reference, hops)
        answer = await self._questions.ask(peer, question, Lane.CONTROL, ASK_S)
        if not isinstance(answer.message, messages.Resolved):
            raise UnavailableError(f"{peer} has no answer for {reference}")
        return answer.message

    async def public_age_s(self, locator: Locator, reference: str) -> float | None:
        """How long ago a member saw that anybody may read the repository, for when the registry is out of reach."""
        ages: list[float] = []

        async def ask(peer: PeerId) -> None:
            ages.append((await self._question(peer, locator, reference, 0)).public_age_s)

        await self._ask_others(locator, reference, ask)
        return min((age_s for age_s in ages if age_s >= 0), default=None)

    async def _ask_others(self, locator: Locator, reference: str, ask: Callable[[PeerId], Awaitable[object]]) -> None:
        """Ask up to LAST_RESORT_MEMBERS other members at once, the name's homes first; failures are only logged."""

        async def try_to_ask(peer: PeerId) -> None:
            try:
                await ask(peer)
            except ShoalError as error:
                log.debug("%s: %s", peer, error)

        site, now = self._site, trio.current_time()
        homes = site.placement().name_homes(f"{locator}@{reference}")
        peers = dict.fromkeys([*homes, *(member.peer_id for member in site.view.site)])
        others = [peer for peer in peers if peer != site.own and not site.health.avoided(peer, now)]
        async with trio.open_nursery() as nursery:
            for peer in others[:LAST_RESORT_MEMBERS]:
                nursery.start_soon(try_to_ask, peer)

    async def ask_registry(self, locator: Locator, reference: str, *, kept_for: Askers = READ_HERE) -> Resolved:
        """The registry's answer, or the youngest one of the site while the registry is out of reach."""
        return await self._revalidating.do((locator, reference), lambda: self._revalidate(locator, reference, kept_for))

    async def _revalidate(self, locator: Locator, reference: str, kept_for: Askers) -> Resolved:
        previous, asked = self.known.get(locator, reference), trio.current_time()
        if previous is not None and self.known.is_doubted(locator, previous):
            previous = None
        try:
            resolved, body = await self._upstreams.resolve(locator, reference, previous)
        except UnavailableError as error:
            return await self._out_of_reach(locator, reference, error)
        except NotFoundError:
            self.known.forget(locator, reference)
            raise
        if body is not None:
            await self._home.admit(locator, resolved.ref, body, kept_for=kept_for)
        # The registry's answer may be as old as the question.
        resolved = replace(resolved, age_s=trio.current_time() - asked)
        return self.known.confirm(locator, reference, resolved, body)

    async def _out_of_reach(self, locator: Locator, reference: str, error: UnavailableError) -> Resolved:
        """The youngest answer that the site has. The members are asked once in a time to live, so that they still
        agree, but never for a name that a client reads with a grant."""
        stale = self.known.usable(locator, reference)
        if locator.grant is None and (stale is None or not self.known.site_was_asked(locator, reference)):
            self.known.asking_site(locator, reference)
            if self.known.max_age_s(locator, reference):  # a member may have imported the image
                ask = partial(self._ask_member, locator=locator, reference=reference, hops=0)
                await self._ask_others(locator, reference, ask)
            stale = self.known.usable(locator, reference)
        if stale is None:
            raise error
        if not is_digest(reference):
            log.warning("%s is served %.0f s old: %s", f"{locator}@{reference}", stale.age_s, error)
        return stale
