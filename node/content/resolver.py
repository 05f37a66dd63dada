"""What names stand for: tags and digests to descriptors, for the whole site, through one node that asks the registry.

The first alive of a name's three homes asks the origin and remembers; the others ask it. A tag is as old as the
question that the registry answered last, wherever that was heard, so that two nodes never disagree for longer than its
time to live (node/config/tag_policy.py). While the registry is out of reach all take the youngest answer that the
site has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import trio
from cachetools import LRUCache, TTLCache

from node.api.documents import TagState
from node.blocks.home import Home
from node.blocks.questions import Questions
from node.blocks.values import Site
from node.config.tag_policy import TagPolicies, TagPolicy
from node.content.name_table import _MAX_RECENT, REGISTRY, KnownTag, NameTable, _Key
from node.exchange.contract import Answer, Lane
from node.oci.manifests import UNTYPED, Resolved, descriptors, media_type_of, parse_manifest
from node.oci.references import Locator, is_digest
from node.runtime.single_flight import SingleFlight
from protocol import messages
from protocol.errors import DeniedError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import Digest, ObjectRef, PeerId

log = logging.getLogger(__name__)

ASK_S = 2.0
"""A home says `Waiting` while it asks the registry; silence this long is a home that is gone."""
LAST_RESORT_MEMBERS = 64
"""Asked for what they know when the registry does not answer."""
JOINED_S = 1.0
"""A home's question to the registry, which another's joins, may be so much older."""
DOUBTED_S = 60.0
"""A home that lies is asked again after this, and found out again."""


class Registries(Protocol):
    """What is needed of node/registry/upstreams.py here."""

    async def resolve(
        self, locator: Locator, reference: str, known: Resolved | None = None
    ) -> tuple[Resolved, bytes | None]: ...


class Names:
    def __init__(
        self,
        site: Site,
        table: NameTable,
        upstreams: Registries,
        questions: Questions,
        home: Home,
        nursery: trio.Nursery,
        policies: TagPolicies,
        served: Callable[[float], None],
        public_age: Callable[[Locator], float | None] = lambda _: None,
        pinned: Callable[[str, str], bool] = lambda source, reference: False,
    ) -> None:
        self._site, self._table, self._upstreams = site, table, upstreams
        self._questions, self._home = questions, home
        self.policies, self._served = policies, served
        self._public_age, self._pinned = public_age, pinned
        self._asking: SingleFlight[tuple[Locator, str], Resolved] = SingleFlight(nursery)
        self._origin: SingleFlight[tuple[Locator, str], Resolved] = SingleFlight(nursery)
        self._site_asked: LRUCache[_Key, float] = LRUCache(_MAX_RECENT)
        """When the site was asked last for a tag that the registry did not tell; without those that it told since."""
        self._types: LRUCache[Digest, str] = LRUCache(_MAX_RECENT)
        """Of manifests, by the registry's word or their own bytes."""
        self._doubted: TTLCache[tuple[str, ObjectRef], bool] = TTLCache(_MAX_RECENT, DOUBTED_S, timer=trio.current_time)

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        """For a client of this node. Raises NotFoundError, DeniedError or UnavailableError."""
        found = self._fresh(locator, reference)
        if found is None:
            found = await self._asking.do((locator, reference), lambda: self._ask_site(locator, reference))
        if not is_digest(reference):
            self._served(found.age_s)
        return found

    async def handle(self, peer: PeerId, request: messages.Resolve) -> Answer:
        """For a member."""
        locator = Locator.parse(request.source)
        found = self._fresh(locator, request.reference)
        if found is None and request.reach == 0:
            found = self._usable(locator, request.reference)
            if found is None:
                return Answer(messages.Failed("not-held", "not known here"))
        if found is None:
            found = await self._ask_origin(locator, request.reference)
        if locator.kind == "manifests":
            found = self.typed(found) or found
        public = self._public_age(locator)
        age_s = -1.0 if public is None else public
        return Answer(messages.Resolved(str(found.ref.digest), found.ref.size, found.media_type, found.age_s, age_s))

    def learn(self, locator: Locator, body: bytes) -> None:
        """A manifest was read: what it names needs not be asked for."""
        manifest = parse_manifest(body)
        self._table.put_many(str(locator.of_kind("blobs")), list(descriptors(manifest, "blobs")))
        # Clients go by a manifest's type: one that its index does not type is left to be asked for.
        typed = [one for one in descriptors(manifest, "manifests") if one.media_type != UNTYPED]
        self._table.put_many(str(locator.of_kind("manifests")), typed)

    def typed(self, found: Resolved) -> Resolved | None:
        """With the manifest's own media type, whoever told another one; None where it was not looked at yet."""
        media_type = self._types.get(found.ref.digest)
        return None if media_type is None else replace(found, media_type=media_type)

    def look_at(self, locator: Locator, reference: str, found: Resolved, body: bytes) -> None:
        """A manifest, whose digest is right, is here: is it of the media type that was told?

        Who told another one is named, and no more: it may have been told so, or have it from an index that is wrong.
        """
        media_type = media_type_of(body, found.media_type)
        if media_type is None:
            self.doubt(locator, found.ref)
            return
        if media_type != found.media_type:
            teller = self._table.told_by(str(locator), reference) or "nobody that is remembered"
            log.warning("%s is of type %s; %s told %s", found.ref.digest, media_type, teller, found.media_type)
        self._types[found.ref.digest] = media_type

    def known(self, locator: Locator, reference: str) -> Resolved | None:
        """What this node remembers, however old."""
        return self._table.get(str(locator), reference)

    def images(self) -> list[tuple[str, str, Resolved]]:
        return self._table.images()

    def tags(self, pattern: str) -> list[tuple[KnownTag, TagPolicy, TagState]]:
        """The tags that this node knows, whose `upstream/repository:tag` fits the pattern."""
        found = []
        for one in self._table.tags(pattern):
            policy = self.policies.of(one.locator, one.tag)
            found.append((one, policy, self._state(one, policy)))
        return found

    def _state(self, one: KnownTag, policy: TagPolicy) -> TagState:
        age_s = one.resolved.age_s
        if age_s < policy.ttl_s:
            return "fresh"
        if (str(one.locator), one.tag) not in self._site_asked:
            return "due"
        return "stale" if age_s < policy.max_age_s else "too old"

    def _fresh(self, locator: Locator, reference: str) -> Resolved | None:
        found = self.known(locator, reference)
        if found is None or self._is_doubted(locator, found):
            return None
        return found if found.age_s < self._ttl_s(locator, reference) else None

    def doubt(self, locator: Locator, ref: ObjectRef) -> None:
        """What was told cannot be read: a member may have told a wrong size. The registry is asked itself then."""
        self._doubted[str(locator), ref] = True

    def _is_doubted(self, locator: Locator, found: Resolved) -> bool:
        return (str(locator), found.ref) in self._doubted

    def _ttl_s(self, locator: Locator, reference: str) -> float:
        """A digest stands for the same for ever."""
        return math.inf if is_digest(reference) else self.policies.of(locator, reference).ttl_s

    def _usable(self, locator: Locator, reference: str) -> Resolved | None:
        """Stale, but within the age limit or pinned here: for when nobody knows better."""
        found = self.known(locator, reference)
        if found and (found.age_s < self._max_age_s(locator, reference) or self._pinned(str(locator), reference)):
            return found
        return None

    def _max_age_s(self, locator: Locator, reference: str) -> float:
        return math.inf if is_digest(reference) else self.policies.of(locator, reference).max_age_s

    def _note(self, locator: Locator, reference: str, found: Resolved, told_by: str) -> Resolved:
        """The younger of what was told and what is known: a late answer must not bring back what a tag was before."""
        known = self.known(locator, reference)
        if known is not None and known.age_s < found.age_s and not self._is_doubted(locator, known):
            return known
        self._table.put(str(locator), reference, found, told_by)
        return found

    def _forget(self, locator: Locator, reference: str) -> None:
        """The registry has it no more: this must not come back when that is out of reach, unless it is pinned here."""
        if not self._pinned(str(locator), reference):
            self._table.drop(str(locator), reference)

    async def _ask_site(self, locator: Locator, reference: str) -> Resolved:
        site, now = self._site, trio.current_time()
        # Without the client's grant, which stays here, no other node is told what the name stands for.
        homes = site.placement().name_homes(f"{locator}@{reference}") if locator.grant is None else ()
        for home in homes:
            if home == site.own:
                break
            if site.health.avoided(home, now):
                continue
            began = trio.current_time()
            try:
                found = await self._ask_member(home, locator, reference, reach=1)
            except UnavailableError:
                break
            except NotFoundError:
                self._forget(locator, reference)
                raise
            except DeniedError:
                raise
            except ShoalError as error:
                log.debug("name home %s: %s", home, error)
                continue
            if self._is_doubted(locator, found):
                break
            limit_s = max(trio.current_time() - began + JOINED_S, self._ttl_s(locator, reference))
            if found.age_s < limit_s or self._out_of_reach_lately(locator, reference):
                return found
            break  # its registry is out of reach, but this node's may not be
        return await self._ask_origin(locator, reference)

    async def _ask_member(self, peer: PeerId, locator: Locator, reference: str, reach: int) -> Resolved:
        """What a member tells, or what is known here if that is younger."""
        question = messages.Resolve(str(locator), reference, reach)
        asked = trio.current_time()
        answer = await self._questions.ask(peer, question, Lane.CONTROL, ASK_S)
        message = answer.message
        if not isinstance(message, messages.Resolved):
            raise UnavailableError(f"{peer} does not tell what {reference} is")
        digest = Digest.parse(message.digest)
        if is_digest(reference) and str(digest) != reference:
            raise UnavailableError(f"{peer} tells another digest than {reference}")
        # Part of the time may be in the told age already. Too old asks again too soon; too young would be wrong.
        age_s = max(0.0, message.age_s) + trio.current_time() - asked
        return self._note(
            locator, reference, Resolved(ObjectRef(digest, message.size), message.media_type, age_s), peer
        )

    async def public_age_s(self, locator: Locator, reference: str) -> float | None:
        """For when the registry is out of reach: how long ago a member saw that anybody may read the repository."""
        ages: list[float] = []

        async def ask(peer: PeerId) -> None:
            question = messages.Resolve(str(locator), reference, 0)
            answer = await self._questions.ask(peer, question, Lane.CONTROL, ASK_S)
            if isinstance(answer.message, messages.Resolved) and answer.message.public_age_s >= 0:
                ages.append(answer.message.public_age_s)

        await self._for_others(locator, reference, ask)
        return min(ages, default=None)

    async def _ask_everybody(self, locator: Locator, reference: str) -> None:
        """Notes the youngest answer of those who know. One may have imported it."""

        async def ask(peer: PeerId) -> None:
            await self._ask_member(peer, locator, reference, reach=0)

        await self._for_others(locator, reference, ask)

    async def _for_others(self, locator: Locator, reference: str, ask: Callable[[PeerId], Awaitable[None]]) -> None:
        """Some of the other members at once, the name's homes first; from whom nothing comes is passed over."""

        async def one(peer: PeerId) -> None:
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
                nursery.start_soon(one, peer)

    async def _ask_origin(self, locator: Locator, reference: str) -> Resolved:
        return await self._origin.do((locator, reference), lambda: self._revalidate(locator, reference))

    async def _revalidate(self, locator: Locator, reference: str) -> Resolved:
        key, known, asked = (str(locator), reference), self.known(locator, reference), trio.current_time()
        if known is not None and self._is_doubted(locator, known):
            known = None
        try:
            found, body = await self._upstreams.resolve(locator, reference, known)
        except UnavailableError as error:
            return await self._out_of_reach(locator, reference, error)
        except NotFoundError:
            self._forget(locator, reference)
            raise
        self._site_asked.pop(key, None)
        self._doubted.pop((str(locator), found.ref), None)
        # The registry may have answered what was true when it was asked.
        found = replace(found, age_s=trio.current_time() - asked)
        if locator.kind == "manifests":
            self._table.put(str(locator), str(found.ref.digest), found)
        if body is not None:
            self._types[found.ref.digest] = found.media_type
            await self._home.admit(locator, found.ref, body)
            self.learn(locator, body)
        return self._note(locator, reference, found, REGISTRY)

    async def _out_of_reach(self, locator: Locator, reference: str, error: UnavailableError) -> Resolved:
        """The youngest that the site knows, asked for once in a time to live: so its nodes go on agreeing.

        What is read with a client's grant no other node is asked for.
        """
        stale = self._usable(locator, reference)
        if locator.grant is None and (stale is None or not self._out_of_reach_lately(locator, reference)):
            if not is_digest(reference):
                self._site_asked[str(locator), reference] = trio.current_time()
            if self._max_age_s(locator, reference):
                await self._ask_everybody(locator, reference)
            stale = self._usable(locator, reference)
        if stale is None:
            raise error
        if not is_digest(reference):
            log.warning("%s@%s is served %.0f s old: %s", locator, reference, stale.age_s, error)
        return stale

    def _out_of_reach_lately(self, locator: Locator, reference: str) -> bool:
        asked = self._site_asked.get((str(locator), reference), -math.inf)
        return trio.current_time() < asked + self._ttl_s(locator, reference)
