"""What names stand for: tags and digests to descriptors, for the whole site, through one node that asks the registry.

The first alive of a name's three homes asks the origin and remembers; the others ask it. A tag is as old as the
registry's last word on it, wherever that was heard, so that two nodes never disagree for longer than its time to live.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import trio
from cachetools import LRUCache, TTLCache

from node.database import Database
from node.exchange import Answer, Lane
from node.locator import Locator, is_digest
from node.objects import Resolved
from node.seeder import Seeder, Site
from node.single_flight import SingleFlight
from node.upstream import MEDIA_TYPE, Upstreams
from protocol import messages
from protocol.errors import BadInputError, DeniedError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import Digest, ObjectRef, PeerId

log = logging.getLogger(__name__)

ASK_S = 2.0
"""A home says `Waiting` while it asks the registry; silence this long is a home that is gone."""
ASK_AGAIN_S = 5.0
"""How long what the members said of a name counts while the registry is out of reach."""
LAST_RESORT_MEMBERS = 64
"""Asked for what they know when the registry does not answer."""
MAX_MANIFEST_ENTRIES = 1024
UNTYPED = "application/octet-stream"
_MAX_ROWS = 100_000
_MAX_RECENT = 4096
"""Names that are answered without SQLite."""
_COLUMNS = "digest, size, media_type, confirmed"
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS name (source TEXT, reference TEXT, digest TEXT NOT NULL, size INTEGER NOT NULL,"
    " media_type TEXT NOT NULL, confirmed REAL NOT NULL, PRIMARY KEY (source, reference)) WITHOUT ROWID;"
)


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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Manifest()


def descriptors(manifest: Manifest, kind: str) -> Iterator[Resolved]:
    """The well-formed descriptors of one kind, bounded."""
    found = manifest.manifests if kind == "manifests" else (*filter(None, (manifest.config,)), *manifest.layers)
    for one in found[:MAX_MANIFEST_ENTRIES]:
        try:
            media_type = one.media_type if MEDIA_TYPE.fullmatch(one.media_type) else UNTYPED
            yield Resolved(ObjectRef(Digest.parse(one.digest), one.size), media_type)
        except BadInputError as error:
            log.debug("descriptor left out: %s", error)


class NameTable:
    """Names that this node learnt, in SQLite: they outlive a restart, and a registry that is gone."""

    def __init__(self, path: Path) -> None:
        self._recent: LRUCache[tuple[str, str], tuple[Resolved, float]] = LRUCache(_MAX_RECENT)
        """With the wall-clock time at which the registry confirmed it."""
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def get(self, source: str, reference: str) -> Resolved | None:
        known = self._recent.get((source, reference))
        if known is None:
            rows = self._database.run(
                f"SELECT {_COLUMNS} FROM name WHERE source = ? AND reference = ?", (source, reference)
            )
            if not rows:
                return None
            known = self._recent[source, reference] = _resolved(*rows[0]), rows[0][3]
        return replace(known[0], age_s=_age(known[1]))

    def put(self, source: str, reference: str, resolved: Resolved) -> None:
        self._recent[source, reference] = resolved, time.time() - resolved.age_s
        self._database.run("INSERT OR REPLACE INTO name VALUES (?, ?, ?, ?, ?, ?)", _row(source, reference, resolved))

    def put_many(self, source: str, found: list[Resolved]) -> None:
        """Digests stand for themselves; known ones are kept as they are."""
        rows = [_row(source, str(one.ref.digest), one) for one in found]
        self._database.run("INSERT OR IGNORE INTO name VALUES (?, ?, ?, ?, ?, ?)", *rows)

    def images(self) -> list[tuple[str, str, Resolved]]:
        """(source, reference, what it stands for) of manifests, the newest first."""
        rows = self._database.run(
            f"SELECT source, reference, {_COLUMNS} FROM name"
            " WHERE source LIKE '%#manifests' ORDER BY confirmed DESC LIMIT 1000",
            (),
        )
        return [(row[0], row[1], _resolved(*row[2:])) for row in rows]

    def trim(self) -> None:
        """Forget the names that were confirmed longest ago."""
        self._database.run(
            "DELETE FROM name WHERE confirmed < (SELECT confirmed FROM name ORDER BY confirmed DESC LIMIT 1 OFFSET ?)",
            (_MAX_ROWS,),
        )


def _row(source: str, reference: str, one: Resolved) -> tuple[object, ...]:
    return source, reference, str(one.ref.digest), one.ref.size, one.media_type, time.time() - one.age_s


def _resolved(digest: str, size: int, media_type: str, confirmed: float) -> Resolved:
    return Resolved(ObjectRef(Digest.parse(digest), size), media_type, _age(confirmed))


def _age(confirmed: float) -> float:
    # A clock that was set back makes the age unknown: the name is asked for again as soon as can be.
    age = time.time() - confirmed
    return age if age >= 0 else 1e9


class Names:
    def __init__(
        self,
        site: Site,
        table: NameTable,
        upstreams: Upstreams,
        seeder: Seeder,
        nursery: trio.Nursery,
        ttl_s: float,
        max_age_s: float,
        served: Callable[[float], None],
        public_age: Callable[[Locator], float | None] = lambda _: None,
        pinned: Callable[[str, str], bool] = lambda source, reference: False,
    ) -> None:
        self._site, self._table, self._upstreams, self._seeder = site, table, upstreams, seeder
        self._ttl_s, self._max_age_s, self._served = ttl_s, max_age_s, served
        self._public_age, self._pinned = public_age, pinned
        self._asked: TTLCache[tuple[str, str], bool] = TTLCache(_MAX_RECENT, ASK_AGAIN_S, timer=trio.current_time)
        self._asking: SingleFlight[tuple[Locator, str], Resolved] = SingleFlight(nursery)
        self._origin: SingleFlight[tuple[Locator, str], Resolved] = SingleFlight(nursery)

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

    def known(self, locator: Locator, reference: str) -> Resolved | None:
        """What this node remembers, however old."""
        return self._table.get(str(locator), reference)

    def images(self) -> list[tuple[str, str, Resolved]]:
        return self._table.images()

    def _fresh(self, locator: Locator, reference: str) -> Resolved | None:
        found = self.known(locator, reference)
        return found if found and (is_digest(reference) or found.age_s < self._ttl_s) else None

    def _usable(self, locator: Locator, reference: str) -> Resolved | None:
        """Stale, but within the age limit or pinned here: for when nobody knows better."""
        found = self.known(locator, reference)
        if found and (is_digest(reference) or found.age_s < self._max_age_s or self._pinned(str(locator), reference)):
            return found
        return None

    async def _ask_site(self, locator: Locator, reference: str) -> Resolved:
        site, now = self._site, trio.current_time()
        # Without the client's grant, which stays here, no other node is told what the name stands for.
        homes = site.placement().name_homes(f"{locator}@{reference}") if locator.grant is None else ()
        for home in homes:
            if home == site.own:
                break
            if site.health.avoided(home, now):
                continue
            try:
                return await self._ask_member(home, locator, reference, reach=1)
            except UnavailableError:
                break
            except (NotFoundError, DeniedError):
                raise
            except ShoalError as error:
                log.debug("name home %s: %s", home, error)
        return await self._ask_origin(locator, reference)

    async def _ask_member(self, peer: str, locator: Locator, reference: str, reach: int) -> Resolved:
        found = await self._hear(peer, locator, reference, reach)
        own = self._usable(locator, reference)
        if own is not None and own.age_s < found.age_s:  # an import, and a home that cannot ask the registry
            return own
        self._table.put(str(locator), reference, found)
        return found

    async def _hear(self, peer: str, locator: Locator, reference: str, reach: int) -> Resolved:
        question = messages.Resolve(str(locator), reference, reach)
        answer = await self._seeder.ask(peer, question, Lane.CONTROL, ASK_S)  # type: ignore[arg-type] # a peer id
        message = answer.message
        if not isinstance(message, messages.Resolved):
            raise UnavailableError(f"{peer} does not tell what {reference} is")
        digest = Digest.parse(message.digest)
        if is_digest(reference) and str(digest) != reference:
            raise UnavailableError(f"{peer} tells another digest than {reference}")
        return Resolved(ObjectRef(digest, message.size), message.media_type, max(0.0, message.age_s))

    async def public_age_s(self, locator: Locator, reference: str) -> float | None:
        """For when the registry is out of reach: how long ago a member saw that anybody may read the repository."""
        ages: list[float] = []

        async def ask(peer: PeerId) -> None:
            question = messages.Resolve(str(locator), reference, 0)
            answer = await self._seeder.ask(peer, question, Lane.CONTROL, ASK_S)
            if isinstance(answer.message, messages.Resolved) and answer.message.public_age_s >= 0:
                ages.append(answer.message.public_age_s)

        await self._for_others(ask)
        return min(ages, default=None)

    async def _ask_everybody(self, locator: Locator, reference: str) -> Resolved | None:
        """The last resort, without the registry: the youngest answer of those who know. One may have imported it."""
        own = self._usable(locator, reference)
        if own is not None and self._asked.get((str(locator), reference)):
            return own
        self._asked[str(locator), reference] = True
        answers = [own] if own else []

        async def ask(peer: PeerId) -> None:
            answers.append(await self._hear(peer, locator, reference, reach=0))

        await self._for_others(ask)
        if not answers:
            return None
        youngest = min(answers, key=lambda found: found.age_s)
        self._table.put(str(locator), reference, youngest)
        return youngest

    async def _for_others(self, ask: Callable[[PeerId], Awaitable[None]]) -> None:
        """Some of the other members at once; from whom nothing comes is passed over."""

        async def one(peer: PeerId) -> None:
            try:
                await ask(peer)
            except ShoalError as error:
                log.debug("%s: %s", peer, error)

        others = [member.peer_id for member in self._site.view.site if member.peer_id != self._site.own]
        async with trio.open_nursery() as nursery:
            for peer in others[:LAST_RESORT_MEMBERS]:
                nursery.start_soon(one, peer)

    async def _ask_origin(self, locator: Locator, reference: str) -> Resolved:
        return await self._origin.do((locator, reference), lambda: self._revalidate(locator, reference))

    async def _revalidate(self, locator: Locator, reference: str) -> Resolved:
        known = self.known(locator, reference)
        try:
            found, body = await self._upstreams.resolve(locator, reference, known)
        except UnavailableError as error:
            stale = await self._ask_everybody(locator, reference)
            if stale is None:
                raise
            log.warning("%s@%s is served %.0f s old: %s", locator, reference, stale.age_s, error)
            return stale
        self._table.put(str(locator), reference, found)
        if locator.kind == "manifests":
            self._table.put(str(locator), str(found.ref.digest), found)
        if body is not None:
            await self._seeder.admit(locator, found.ref, body)
            self.learn(locator, body)
        return found
