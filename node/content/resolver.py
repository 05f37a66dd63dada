"""What names stand for: tags and digests to descriptors, for the whole site, through one node that asks the registry.

The first alive of a name's three homes asks the origin and remembers; the others ask it. A tag is as old as the
question that the registry answered last, wherever that was heard, so that two nodes never disagree for longer than its
time to live (node/config/tag_policy.py). While the registry is out of reach all take the youngest answer that the
site has.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio
from cachetools import LRUCache, TTLCache

from node.api.documents import TagState
from node.blocks.keeper import Seeder, Site
from node.config.tag_policy import TagPolicies, TagPolicy
from node.content.contract import Resolved
from node.exchange.contract import Answer, Lane
from node.oci.references import Locator, is_digest
from node.registry.upstreams import MEDIA_TYPE
from node.runtime.single_flight import SingleFlight
from node.runtime.sqlite import Database
from protocol import messages
from protocol.errors import UNDECODABLE, BadInputError, DeniedError, NotFoundError, ShoalError, UnavailableError
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
REGISTRY = "registry"
MAX_MANIFEST_ENTRIES = 1024
UNTYPED = "application/octet-stream"
_TYPES = {
    "manifests": (
        "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
    ),
    "layers": ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"),
    "schema 1": (
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "application/vnd.docker.distribution.manifest.v1+json",
    ),
}  # fmt: skip
"""By what a manifest that does not name its own type has in it."""
_MAX_ROWS = 100_000
_MAX_RECENT = 4096
"""Names that are answered without SQLite."""
_COLUMNS = "digest, size, media_type, confirmed"
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS name (source TEXT, reference TEXT, digest TEXT NOT NULL, size INTEGER NOT NULL,"
    " media_type TEXT NOT NULL, confirmed REAL NOT NULL, PRIMARY KEY (source, reference)) WITHOUT ROWID;"
)
_Key = tuple[str, str]
"""A locator as text, and a reference."""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True):
    """The part of a manifest or an index that names other objects."""

    config: _Descriptor | None = None
    layers: tuple[_Descriptor, ...] = ()
    manifests: tuple[_Descriptor, ...] = ()


def parse_manifest(body: bytes) -> Manifest:
    """Empty for what is no manifest of the two families; what it names is checked by whoever uses it."""
    try:
        return msgspec.json.decode(body, type=Manifest)
    except UNDECODABLE:
        return Manifest()


def media_type_of(body: bytes, told: str) -> str | None:
    """A manifest's, by its own word, else by its shape, which the `told` one has to fit; None where neither tells."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except UNDECODABLE:
        return None
    own = fields.get("mediaType")
    if isinstance(own, str) and MEDIA_TYPE.fullmatch(own):
        return own
    shape = "schema 1" if fields.get("schemaVersion") == 1 else next((key for key in _TYPES if key in fields), "")
    fitting = _TYPES.get(shape, ())
    return told if told in fitting else next(iter(fitting), None)


def descriptors(manifest: Manifest, kind: str) -> Iterator[Resolved]:
    """The well-formed descriptors of one kind, bounded."""
    found = manifest.manifests if kind == "manifests" else (*filter(None, (manifest.config,)), *manifest.layers)
    for one in found[:MAX_MANIFEST_ENTRIES]:
        try:
            media_type = one.media_type if MEDIA_TYPE.fullmatch(one.media_type) else UNTYPED
            yield Resolved(ObjectRef(Digest.parse(one.digest), one.size), media_type)
        except BadInputError as error:
            log.debug("descriptor left out: %s", error)


@dataclass(frozen=True, slots=True)
class KnownTag:
    """`told_by` is REGISTRY, a member's peer id, or "" for what was only remembered on disk."""

    locator: Locator
    tag: str
    resolved: Resolved
    told_by: str


class NameTable:
    """Names that this node learnt, in SQLite: they outlive a restart, and a registry that is gone."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix time: what is remembered is older than this process."""
        self._clock = clock
        self._recent: LRUCache[_Key, tuple[Resolved, float, str]] = LRUCache(_MAX_RECENT)
        """With the time at which the registry confirmed it, and who told."""
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def get(self, source: str, reference: str) -> Resolved | None:
        known = self._recent.get((source, reference))
        if known is None:
            rows = self._database.run(
                f"SELECT {_COLUMNS} FROM name WHERE source = ? AND reference = ?", (source, reference)
            )
            found = self._resolved(*rows[0]) if rows else None
            if found is None:
                return None
            known = self._recent[source, reference] = found, rows[0][3], ""
        return replace(known[0], age_s=self._age(known[1]))

    def put(self, source: str, reference: str, resolved: Resolved, told_by: str = "") -> None:
        self._recent[source, reference] = resolved, self._clock() - resolved.age_s, told_by
        row = self._row(source, reference, resolved)
        self._database.run("INSERT OR REPLACE INTO name VALUES (?, ?, ?, ?, ?, ?)", row)

    def drop(self, source: str, reference: str) -> None:
        self._recent.pop((source, reference), None)
        self._database.run("DELETE FROM name WHERE source = ? AND reference = ?", (source, reference))

    def put_many(self, source: str, found: list[Resolved]) -> None:
        """Digests stand for themselves; known ones are kept as they are."""
        rows = [self._row(source, str(one.ref.digest), one) for one in found]
        self._database.run("INSERT OR IGNORE INTO name VALUES (?, ?, ?, ?, ?, ?)", *rows)

    def images(self) -> list[tuple[str, str, Resolved]]:
        """(source, reference, what it stands for) of manifests, the newest first."""
        rows = self._database.run(
            f"SELECT source, reference, {_COLUMNS} FROM name"
            " WHERE source LIKE '%#manifests' ORDER BY confirmed DESC LIMIT 1000",
            (),
        )
        found = ((row[0], row[1], self._resolved(*row[2:])) for row in rows)
        return [(source, reference, one) for source, reference, one in found if one is not None]

    def tags(self, pattern: str) -> list[KnownTag]:
        """Those that an SQLite GLOB over `upstream/repository:tag` fits, the latest confirmed first."""
        rows = self._database.run(
            f"SELECT source, reference, {_COLUMNS} FROM name"
            " WHERE source LIKE '%#manifests' AND instr(reference, ':') = 0"
            " AND replace(source, '#manifests', ':') || reference GLOB ? ORDER BY confirmed DESC LIMIT 1000",
            (pattern,),
        )
        found = ((source, tag, self._resolved(*columns)) for source, tag, *columns in rows)
        return [
            KnownTag(Locator.parse(source), tag, one, self.told_by(source, tag))
            for source, tag, one in found
            if one is not None
        ]

    def told_by(self, source: str, reference: str) -> str:
        """As in KnownTag."""
        known = self._recent.get((source, reference))
        return known[2] if known else ""

    def trim(self) -> None:
        """Forget the names that were confirmed longest ago."""
        self._database.run(
            "DELETE FROM name WHERE confirmed < (SELECT confirmed FROM name ORDER BY confirmed DESC LIMIT 1 OFFSET ?)",
            (_MAX_ROWS,),
        )

    def _row(self, source: str, reference: str, one: Resolved) -> tuple[object, ...]:
        return source, reference, str(one.ref.digest), one.ref.size, one.media_type, self._clock() - one.age_s

    def _resolved(self, digest: str, size: int, media_type: str, confirmed: float) -> Resolved | None:
        """None where the disk altered it: what is unknown is asked for."""
        try:
            return Resolved(ObjectRef(Digest.parse(digest), size), media_type, self._age(confirmed))
        except BadInputError as error:
            log.warning("a remembered name is damaged: %s", error)
            return None

    def _age(self, confirmed: float) -> float:
        # A clock that was set back makes the age unknown: the name is asked for again as soon as can be.
        age = self._clock() - confirmed
        return age if age >= 0 else 1e9


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
        seeder: Seeder,
        nursery: trio.Nursery,
        policies: TagPolicies,
        served: Callable[[float], None],
        public_age: Callable[[Locator], float | None] = lambda _: None,
        pinned: Callable[[str, str], bool] = lambda source, reference: False,
    ) -> None:
        self._site, self._table, self._upstreams, self._seeder = site, table, upstreams, seeder
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

    async def handle(self, request: messages.Resolve) -> Answer:
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
        answer = await self._seeder.ask(peer, question, Lane.CONTROL, ASK_S)
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
            answer = await self._seeder.ask(peer, question, Lane.CONTROL, ASK_S)
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
            await self._seeder.admit(locator, found.ref, body)
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
