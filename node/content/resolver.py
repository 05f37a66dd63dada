"""Resolution of tags and digests to descriptors: this node asks the registry itself.

Each node asks once in a tag's time to live, by HEAD, and the digest that the registry names decides. No other member
has a say while the registry answers. The bytes come through the site by their digest, so the registry still sends them
once. A member's word counts only while the registry is out of reach, and only for a name for which this node has no
answer of its own (node/content/agreement.py). What this node tells others is never what it heard from others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import trio

from cache.store import READ_HERE
from node.blocks.home import Home
from node.blocks.questions import Questions
from node.blocks.values import Site
from node.config.quantities import HostPort
from node.content.agreement import Agreement, Witness, agreements, decided
from node.content.known_names import KnownNames
from node.exchange.contract import Answer, Lane
from node.oci.manifests import Resolved
from node.oci.references import Locator, is_digest
from node.runtime.single_flight import SingleFlight
from protocol import messages
from protocol.errors import BadInputError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import Digest, ObjectRef, PeerId, is_possible

log = logging.getLogger(__name__)

ASK_S = 2.0
"""Longest wait for a member, which answers from memory. It may not ask for more: a liar would never end."""
LAST_RESORT_MEMBERS = 64
"""Members that are asked at a time for the answers that they hold if the registry does not answer."""
SITE_S = 10.0
"""Longest search for an agreement in a large site: clients wait 25 s for the head of an answer."""
MAX_CANDIDATES = 8
"""Digests that members name for a signed tag and whose signatures are looked for: each costs questions and reads."""
BETTER_S = 1.0
"""Once an image has a signature, the wait for one that more hosts name: liars name images whose search never ends."""

Accept = Callable[[Resolved], Awaitable[None]]
"""Raises ShoalError if an answer must not be used, because no signature that the operator wants is on it."""


class Registries(Protocol):
    """The part of node/registry/upstreams.py that is used here."""

    async def resolve(
        self, locator: Locator, reference: str, /, *, whole: bool = False
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
        self._asking: SingleFlight[tuple[Locator, str, bool], Resolved] = SingleFlight(nursery)

    async def resolve(self, locator: Locator, reference: str, accept: Accept | None = None) -> Resolved:
        """Answer a client of this node. Raises NotFoundError, DeniedError or UnavailableError.

        `accept`: a signature decides about this name. In an outage, the first answer of a member that it accepts is
        then used, however few members gave it. The caller has `accept` check the result too.
        """
        resolved = self.known.fresh(locator, reference) or await self.ask_registry(locator, reference, accept)
        if not is_digest(reference):
            self._served(resolved.age_s)
        return resolved

    async def ask_registry(self, locator: Locator, reference: str, accept: Accept | None = None) -> Resolved:
        """As `resolve`, but the registry is asked even if there is a fresh answer. Concurrent calls share one."""
        key = locator, reference, accept is not None
        return await self._asking.do(key, lambda: self._ask_registry(locator, reference, accept))

    async def handle(self, peer: PeerId, request: messages.Resolve) -> Answer:
        locator, reference = Locator.parse(request.source), request.reference
        resolved, public = self.known.told(locator, reference), self._public_age(locator)
        if resolved is None:
            return Answer(messages.Failed("not-held", "not known here"))
        ref, age_s = resolved.ref, -1.0 if public is None else public
        return Answer(
            messages.Resolved(str(ref.digest), ref.size, resolved.media_type, resolved.age_s, public_age_s=age_s)
        )

    async def _ask_registry(self, locator: Locator, reference: str, accept: Accept | None) -> Resolved:
        last, asked = self.known.get(locator, reference), trio.current_time()
        whole = last is not None and self.known.is_doubted(locator, last.ref)
        try:
            resolved, body = await self._upstreams.resolve(locator, reference, whole=whole)
        except UnavailableError as error:
            return await self._in_outage(locator, reference, accept, error)
        except NotFoundError:
            self.known.forget(locator, reference)
            raise
        if body is not None:
            await self._home.admit(locator, resolved.ref, body, kept_for=READ_HERE)
        # The registry's answer may be as old as the question.
        resolved = replace(resolved, age_s=resolved.age_s + trio.current_time() - asked)
        return self.known.confirm(locator, reference, resolved, body)

    # While the registry is out of reach

    async def _in_outage(
        self, locator: Locator, reference: str, accept: Accept | None, error: UnavailableError
    ) -> Resolved:
        """This node's own last answer, else that of the members. These are asked once in a time to live, but never for
        a name that a client reads with a grant."""
        known = self.known
        known.unanswered(locator, reference)
        resolved = known.usable(locator, reference)
        if resolved is not None and is_digest(reference) and known.is_doubted(locator, resolved.ref):
            resolved = None  # its size is wrong, and a member may know the right one
        if resolved is None and locator.grant is None and known.max_age_s(locator, reference):
            resolved = known.heard(locator, reference, signed=accept is not None)
            resolved = resolved or await self._ask_site(locator, reference, accept)
        if resolved is None:
            raise error
        if not is_digest(reference):
            log.warning("%s is served %.0f s old: %s", f"{locator}@{reference}", resolved.age_s, error)
        return resolved

    async def _ask_site(self, locator: Locator, reference: str, accept: Accept | None) -> Resolved | None:
        """The members' answer, if enough of them agree on one. They are asked some at a time until that is so."""
        witnesses: list[Witness] = []

        async def ask(peer: PeerId) -> None:
            witnesses.append(await self._witness(peer, locator, reference))

        with trio.move_on_after(SITE_S):
            others = self._others()
            for start in range(0, len(others), LAST_RESORT_MEMBERS):
                await self._ask_all(others[start : start + LAST_RESORT_MEMBERS], ask)
                agreement = await self._agreement(locator, reference, witnesses, accept)
                if agreement is not None:
                    return self.known.hear(locator, reference, agreement, signed=accept is not None)
        return None

    async def _agreement(
        self, locator: Locator, reference: str, witnesses: Sequence[Witness], accept: Accept | None
    ) -> Agreement | None:
        doubted = self.known.doubted(locator)
        if is_digest(reference):  # it only says which size to try: the bytes prove themselves
            return next(iter(agreements(witnesses, 1, doubted)), None)
        if accept is None:
            return decided(witnesses, self.known.policies.witnesses, doubted)
        return await _best_accepted(list(agreements(witnesses, 1, doubted))[:MAX_CANDIDATES], accept)

    async def _witness(self, peer: PeerId, locator: Locator, reference: str) -> Witness:
        asked = trio.current_time()
        message = await self._question(peer, locator, reference)
        digest = Digest.parse(message.digest)
        if is_digest(reference) and str(digest) != reference:
            raise UnavailableError(f"{peer} answers with another digest than {reference}")
        if not is_possible(digest, message.size, self.known.max_object):
            raise UnavailableError(f"{peer} answers with {message.size} bytes for {digest}")
        age_s = message.age_s + trio.current_time() - asked
        resolved = Resolved(ObjectRef(digest, message.size), message.media_type, age_s)
        return Witness(peer, self._host(peer), resolved)

    def _host(self, peer: PeerId) -> str:
        """The host on which this node reaches the member. On loopback each port counts as a host: such a site is for
        trying things out, and has no other hosts."""
        member = self._site.view.find(peer)
        claimed = member.addresses[0] if member and member.addresses else ""
        try:
            where = self._site.exchange.reached(peer) or HostPort.parse(claimed)
        except BadInputError:
            return claimed
        return str(where) if where.is_loopback else where.host

    async def _question(self, peer: PeerId, locator: Locator, reference: str) -> messages.Resolved:
        question = messages.Resolve(str(locator), reference)
        with trio.move_on_after(ASK_S):
            answer = await self._questions.ask(peer, question, Lane.CONTROL, ASK_S)
            if isinstance(answer.message, messages.Resolved):
                return answer.message
        raise UnavailableError(f"{peer} has no answer for {reference}")

    async def public_age_s(self, locator: Locator, reference: str) -> float | None:
        """How long ago a member saw that anybody may read the repository, for when the registry is out of reach."""
        ages: list[float] = []

        async def ask(peer: PeerId) -> None:
            ages.append((await self._question(peer, locator, reference)).public_age_s)

        await self._ask_all(self._others()[:LAST_RESORT_MEMBERS], ask)
        return min((age_s for age_s in ages if age_s >= 0), default=None)

    def _others(self) -> list[PeerId]:
        site, now = self._site, trio.current_time()
        peers = (member.peer_id for member in site.view.site)
        return [peer for peer in peers if peer != site.own and not site.health.avoided(peer, now)]

    async def _ask_all(self, peers: Iterable[PeerId], ask: Callable[[PeerId], Awaitable[object]]) -> None:
        """Ask these members at once; failures are only logged."""

        async def try_to_ask(peer: PeerId) -> None:
            try:
                await ask(peer)
            except ShoalError as error:
                log.debug("%s: %s", peer, error)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(try_to_ask, peer)


async def _best_accepted(ranked: Sequence[Agreement], accept: Accept) -> Agreement | None:
    """The first of the answers that is accepted; the checks run at the same time."""
    open_numbers, accepted = set(range(len(ranked))), set[int]()

    async def check(number: int) -> None:
        try:
            await accept(ranked[number].resolved)
        except ShoalError as error:
            log.debug("%s is not used: %s", ranked[number].resolved.ref.digest, error)
        else:
            accepted.add(number)
        open_numbers.discard(number)
        if accepted and min(accepted) < min(open_numbers, default=len(ranked)):
            nursery.cancel_scope.cancel()
        elif accepted:
            nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, trio.current_time() + BETTER_S)

    async with trio.open_nursery() as nursery:
        for number in range(len(ranked)):
            nursery.start_soon(check, number)
    return ranked[min(accepted)] if accepted else None
