"""Access control of the mirror: a client may read a repository if the registry itself allows it.

With `access = "relay"` a repository is public if the registry serves it without credentials. For the others the mirror
relays the registry's challenge, and asks the registry whether the credentials that the client then sends may read the
repository, before it serves anything. A verdict holds for a short time, and within bounds for longer while the registry
is out of reach. Credentials are kept as hashes only, and are sent only to the registry of their repository.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import trio
from cachetools import LRUCache

from node.blocks.object_facts import ObjectFacts
from node.mirror import object_access
from node.mirror.object_access import FRESH_S, REFUSED_S, Key, ObjectAccess, key_of
from node.oci.references import Grant, Locator, canonical
from node.runtime.single_flight import SingleFlight
from node.runtime.sqlite import Database
from protocol.errors import DeniedError, NotFoundError, UnavailableError
from protocol.ids import Digest

log = logging.getLogger(__name__)

MAX_VERDICTS = 4096
"""Rights of clients, and as many refusals."""
MAX_PUBLIC = 4096
"""Public repositories in memory."""
MAX_PUBLIC_ROWS = 1 << 16
"""Public repositories on disk, 100 bytes each. A client that reads others makes the registry answer for each."""
MAX_AUTHORIZATION = 16 << 10

_SCHEMA = "CREATE TABLE IF NOT EXISTS public (repository TEXT PRIMARY KEY, seen REAL NOT NULL) WITHOUT ROWID;"
_INDEX = "CREATE INDEX IF NOT EXISTS public_by_age ON public (seen);"

SiteSays = Callable[[Locator, str], Awaitable[float | None]]
"""Seconds since a member of the site saw that the locator's repository is public; None if none has."""


class ChallengedError(DeniedError):
    """The registry asks for credentials. `challenge` is the value of a WWW-Authenticate header."""

    def __init__(self, message: str, challenge: str) -> None:
        super().__init__(message, challenge)
        self.challenge = challenge

    def __str__(self) -> str:
        return str(self.args[0])


class Registries(object_access.Registries, Protocol):
    """The part of node/registry/upstreams.py that is used here."""

    async def admits(self, locator: Locator, reference: str) -> bool:
        """Whether a client may read with the locator's grant, or without one. `reference` may be "", for any."""

    def challenge(self, locator: Locator, *, basic: bool) -> str:
        """The registry's challenge for this repository; "" for one that a client cannot answer."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """The registry's answer at time `at`; the registry is asked again from `until` on."""

    allowed: bool
    at: float
    until: float


class _Verdicts:
    """The latest verdicts. Refusals have a table of their own: a client may invent credentials."""

    def __init__(self) -> None:
        self._allowed: LRUCache[Key, _Verdict] = LRUCache(MAX_VERDICTS)
        self._refused: LRUCache[Key, _Verdict] = LRUCache(MAX_VERDICTS)

    def __len__(self) -> int:
        return len(self._allowed) + len(self._refused)

    def __setitem__(self, key: Key, verdict: _Verdict) -> None:
        self.pop(key)
        (self._allowed if verdict.allowed else self._refused)[key] = verdict

    def get(self, key: Key) -> _Verdict | None:
        return self._allowed.get(key) or self._refused.get(key)

    def pop(self, key: Key) -> None:
        self._allowed.pop(key, None)
        self._refused.pop(key, None)

    def items(self) -> list[tuple[Key, _Verdict]]:
        return [*self._allowed.items(), *self._refused.items()]


class PublicTable:
    """The public repositories and when each was last seen to be public, in SQLite.

    With it, a node that starts while its uplink is down can serve public images. If the disk fails, the table is in
    memory only. A repository that is `pinned` stays public, however long ago it was seen to be public.
    """

    def __init__(self, path: Path, pinned: Callable[[Locator], bool] = lambda locator: False) -> None:
        self._pinned = pinned
        self._seen: LRUCache[str, float] = LRUCache(MAX_PUBLIC)
        self._database = Database(path, _SCHEMA + _INDEX)
        self._trim()

    def close(self) -> None:
        self._database.close()

    def age(self, locator: Locator) -> float | None:
        """Seconds since the repository was seen to be public; None if unknown, also after the clock was set back."""
        seen = self._last_seen(_repository(locator))
        age = -1.0 if seen is None else 0.0 if self._pinned(locator) else time.time() - seen
        return age if age >= 0 else None

    def note(self, locator: Locator, age_s: float = 0.0) -> None:
        repository, seen = _repository(locator), time.time() - age_s
        if abs(seen - self._seen.get(repository, 0.0)) < FRESH_S:
            return
        self._seen[repository] = seen
        self._database.run("INSERT OR REPLACE INTO public VALUES (?, ?)", (repository, seen))
        self._trim()

    def drop(self, locator: Locator) -> None:
        repository = _repository(locator)
        if self._last_seen(repository) is not None:
            del self._seen[repository]
            self._database.run("DELETE FROM public WHERE repository = ?", (repository,))

    def _last_seen(self, repository: str) -> float | None:
        seen = self._seen.get(repository)
        if seen is None:
            for row in self._database.run("SELECT seen FROM public WHERE repository = ?", (repository,)):
                seen = self._seen[repository] = row[0]
        return seen

    def _trim(self) -> None:
        self._database.run(
            "DELETE FROM public WHERE seen < (SELECT seen FROM public ORDER BY seen DESC LIMIT 1 OFFSET ?)",
            (MAX_PUBLIC_ROWS,),
        )


def _repository(locator: Locator) -> str:
    return f"{canonical(locator.upstream)}/{locator.repository}"


class Access:
    """`grace_s` names the upstreams with `access = "relay"`, and how long a verdict holds while they are out of reach.

    `loopback`: only clients on this machine can reach the mirror, so they may send a password.
    """

    def __init__(
        self,
        grace_s: Mapping[str, float],
        registries: Registries,
        public: PublicTable,
        facts: ObjectFacts,
        *,
        site_says: SiteSays,
        nursery: trio.Nursery,
        public_grace_s: float,
        loopback: bool,
    ) -> None:
        self.change(grace_s, public_grace_s)
        self._registries, self._public, self._site_says = registries, public, site_says
        self._loopback = loopback
        self._objects = ObjectAccess(registries, facts, nursery)
        self.verdicts = _Verdicts()
        self._asking: SingleFlight[tuple[Key, str], bool] = SingleFlight(nursery)

    def change(self, grace_s: Mapping[str, float], public_grace_s: float) -> None:
        self._grace_s = {canonical(name): seconds for name, seconds in grace_s.items()}
        self._public_grace_s = public_grace_s

    async def admit(self, locator: Locator, reference: str, authorization: str) -> Locator:
        """The locator for reading on behalf of a client with this Authorization header, "" for none.

        `reference` is "" for the repository itself. Raises ChallengedError or DeniedError if the client may not read,
        NotFoundError, or UnavailableError if there is no verdict.
        """
        if canonical(locator.upstream) not in self._grace_s:
            return locator
        ways = [locator]
        if self._may_be_shown(authorization):
            granted = replace(locator, grant=Grant(authorization))
            public = self.verdicts.get(key_of(locator))
            ways = [granted] if public and not public.allowed else [locator, granted]
        missing: NotFoundError | None = None
        for way in ways:
            try:
                if await self._allowed(way, reference):
                    return way
            except NotFoundError as error:  # some registries answer 404 for a private repository
                missing = error
        raise missing or self._challenged(locator)

    async def check(self, locator: Locator, digest: Digest) -> None:
        """Check that a client which was admitted with this locator may read the object through its repository. Raises
        as `admit`. It must be called before the client learns anything of the object, and again when a part of it has
        arrived: the origin of the object may have come with it."""
        grace_s = self._grace_s.get(canonical(locator.upstream))
        if grace_s is None:
            return
        try:
            await self._objects.check(locator, digest, grace_s if locator.grant else self._public_grace_s)
        except DeniedError as error:
            raise self._challenged(locator) from error

    def refused(self, locator: Locator) -> DeniedError:
        """The error for a client whose grant the registry withdrew, or whose grant expired."""
        self.verdicts.pop(key_of(locator))
        return self._challenged(locator)

    def _may_be_shown(self, authorization: str) -> bool:
        scheme = authorization[:7].lower()
        usable = len(authorization) <= MAX_AUTHORIZATION and authorization.isascii() and authorization.isprintable()
        return usable and (scheme == "bearer " or (scheme.startswith("basic ") and self._loopback))

    async def _allowed(self, way: Locator, reference: str) -> bool:
        key, now = key_of(way), trio.current_time()
        last = self.verdicts.get(key)
        if last is not None and now < last.until:
            return last.allowed
        try:
            allowed = await self._asking.do((key, reference), lambda: self._registries.admits(way, reference))
        except UnavailableError as error:
            verdict = await self._extended(way, reference, last)
            if verdict is None:
                raise
            log.info("%s: the last verdict on access still holds: %s", _repository(way), error)
            self.verdicts[key] = verdict
            return verdict.allowed
        self.verdicts[key] = _Verdict(allowed, now, now + (FRESH_S if allowed else REFUSED_S))
        if way.grant is None:
            (self._public.note if allowed else self._public.drop)(way)
        return allowed

    async def _extended(self, way: Locator, reference: str, last: _Verdict | None) -> _Verdict | None:
        """A verdict for the next FRESH_S while the registry is out of reach; None if no earlier one is recent."""
        now = trio.current_time()
        if last is not None and now < last.at + self._grace_s[canonical(way.upstream)]:
            return replace(last, until=now + FRESH_S)
        if way.grant is not None:
            return None
        age = self._public.age(way)
        if (age is None or age > self._public_grace_s) and reference:
            age = await self._site_says(way, reference)
        if age is None or age > self._public_grace_s:
            return None
        self._public.note(way, age)
        return _Verdict(True, now - age, now + FRESH_S)

    def _challenged(self, locator: Locator) -> DeniedError:
        message = f"{_repository(locator)} is not public"
        challenge = self._registries.challenge(locator, basic=self._loopback)
        return ChallengedError(message, challenge) if challenge else DeniedError(message)
