"""Who may read what the node holds: whoever the registry itself lets read the repository.

With `access = "relay"` a repository is public if the registry gives it to anybody. For all others its own challenge is
handed on, and what the client then sends is shown to the registry, for that repository, before anything is served.
Verdicts hold for a short time; while the registry is out of reach they hold longer, within bounds. Whatever a client
sent is remembered by its hash only, and goes nowhere but to the registry of its repository.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import trio
from cachetools import LRUCache

from node.oci.references import Grant, Locator, canonical
from node.runtime.single_flight import SingleFlight
from node.runtime.sqlite import Database
from protocol.errors import DeniedError, NotFoundError, UnavailableError

log = logging.getLogger(__name__)

FRESH_S = 60.0
"""How long after the registry said yes it is not asked again: a withdrawn right is seen that late."""
REFUSED_S = 10.0
"""The same for a no: short, since somebody may be waiting for the right that was just given."""
MAX_VERDICTS = 4096
MAX_PUBLIC = 4096
MAX_AUTHORIZATION = 16 << 10

_SCHEMA = "CREATE TABLE IF NOT EXISTS public (repository TEXT PRIMARY KEY, seen REAL NOT NULL) WITHOUT ROWID;"

SiteSays = Callable[[Locator, str], Awaitable[float | None]]
"""How many seconds ago a member saw that anybody may read the locator's repository; None where nobody knows."""
_Key = tuple[str, str, bytes]


class ChallengedError(DeniedError):
    """The registry wants to know who reads. `challenge` is the value of a WWW-Authenticate header."""

    def __init__(self, message: str, challenge: str) -> None:
        super().__init__(message, challenge)
        self.challenge = challenge

    def __str__(self) -> str:
        return str(self.args[0])


class Registries(Protocol):
    """What is needed of node/registry/upstreams.py here."""

    async def admits(self, locator: Locator, reference: str) -> bool:
        """Whether the locator's grant, or without one anybody, may read. `reference` may be "": any."""
        ...

    def challenge(self, locator: Locator, *, basic: bool) -> str:
        """What the registry asked of those whom it refused, for this repository; "" where a client can't meet it."""
        ...


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Given by the registry `at`, to be asked for again from `until` on."""

    allowed: bool
    at: float
    until: float


class PublicTable:
    """The repositories that anybody could read, and when that was last seen, in SQLite: a node that starts while its
    uplink is down serves public images. Without the disk it remembers until it stops."""

    def __init__(self, path: Path, pinned: Callable[[Locator], bool] = lambda locator: False) -> None:
        """What is `pinned` stays as it was last seen, however long ago that is."""
        self._pinned = pinned
        self._seen: LRUCache[str, float] = LRUCache(MAX_PUBLIC)
        self._database = Database(path, _SCHEMA)
        rows = self._database.run("SELECT repository, seen FROM public ORDER BY seen DESC LIMIT ?", (MAX_PUBLIC,))
        self._seen.update(reversed(rows))
        self._database.run("DELETE FROM public WHERE seen < ?", (rows[-1][1] if len(rows) == MAX_PUBLIC else 0,))

    def close(self) -> None:
        self._database.close()

    def age(self, locator: Locator) -> float | None:
        """Seconds since it was seen to be public. A clock that was set back makes it unknown."""
        seen = self._seen.get(_repository(locator))
        age = -1.0 if seen is None else 0.0 if self._pinned(locator) else time.time() - seen
        return age if age >= 0 else None

    def note(self, locator: Locator, age_s: float = 0.0) -> None:
        repository, seen = _repository(locator), time.time() - age_s
        if abs(seen - self._seen.get(repository, 0.0)) < FRESH_S:
            return
        self._seen[repository] = seen
        self._database.run("INSERT OR REPLACE INTO public VALUES (?, ?)", (repository, seen))

    def drop(self, locator: Locator) -> None:
        if self._seen.pop(_repository(locator), None) is not None:
            self._database.run("DELETE FROM public WHERE repository = ?", (_repository(locator),))


def _repository(locator: Locator) -> str:
    return f"{canonical(locator.upstream)}/{locator.repository}"


class Access:
    """`grace_s`: the upstreams that relay, and for how long a client's verdict holds while they are out of reach."""

    def __init__(
        self, grace_s: Mapping[str, float], registries: Registries, public: PublicTable, site_says: SiteSays,
        nursery: trio.Nursery, *, public_grace_s: float, loopback: bool,
    ) -> None:  # fmt: skip
        """`loopback`: only clients of this machine reach the mirror, so that they may send a password."""
        self.change(grace_s, public_grace_s)
        self._registries, self._public, self._site_says = registries, public, site_says
        self._loopback = loopback
        self._verdicts: LRUCache[_Key, _Verdict] = LRUCache(MAX_VERDICTS)
        self._asking: SingleFlight[tuple[_Key, str], bool] = SingleFlight(nursery)

    def change(self, grace_s: Mapping[str, float], public_grace_s: float) -> None:
        """From the next request on."""
        self._grace_s = {canonical(name): seconds for name, seconds in grace_s.items()}
        self._public_grace_s = public_grace_s

    async def admit(self, locator: Locator, reference: str, authorization: str) -> Locator:
        """The locator to read with for a client that sent this Authorization header, "" for none.

        Raises ChallengedError or DeniedError for who may not read, NotFoundError, or UnavailableError where nobody can
        tell. `reference` is "" for the repository itself.
        """
        if canonical(locator.upstream) not in self._grace_s:
            return locator
        ways = [locator]
        if self._may_be_shown(authorization):
            granted = replace(locator, grant=Grant(authorization))
            known = self._verdicts.get(_key(locator))
            ways = [granted] if known and not known.allowed else [locator, granted]
        missing: NotFoundError | None = None
        for way in ways:
            try:
                if await self._allowed(way, reference):
                    return way
            except NotFoundError as error:  # some registries say so of what is private
                missing = error
        raise missing or self._challenged(locator)

    def refused(self, locator: Locator) -> DeniedError:
        """The registry took the locator's grant back, or its time is over. What the client is to be told."""
        self._verdicts.pop(_key(locator), None)
        return self._challenged(locator)

    def _may_be_shown(self, authorization: str) -> bool:
        scheme = authorization[:7].lower()
        usable = len(authorization) <= MAX_AUTHORIZATION and authorization.isascii() and authorization.isprintable()
        return usable and (scheme == "bearer " or (scheme.startswith("basic ") and self._loopback))

    async def _allowed(self, way: Locator, reference: str) -> bool:
        key, now = _key(way), trio.current_time()
        known = self._verdicts.get(key)
        if known is not None and now < known.until:
            return known.allowed
        try:
            allowed = await self._asking.do((key, reference), lambda: self._registries.admits(way, reference))
        except UnavailableError as error:
            verdict = await self._held_on_to(way, reference, known)
            if verdict is None:
                raise
            log.info("%s: what was known of who may read it still holds: %s", _repository(way), error)
            self._verdicts[key] = verdict
            return verdict.allowed
        self._verdicts[key] = _Verdict(allowed, now, now + (FRESH_S if allowed else REFUSED_S))
        if way.grant is None:
            (self._public.note if allowed else self._public.drop)(way)
        return allowed

    async def _held_on_to(self, way: Locator, reference: str, known: _Verdict | None) -> _Verdict | None:
        """What still holds while the registry is out of reach, for a minute at a time."""
        now = trio.current_time()
        if known is not None and now < known.at + self._grace_s[canonical(way.upstream)]:
            return replace(known, until=now + FRESH_S)
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
        message = f"{_repository(locator)} is not for everybody"
        challenge = self._registries.challenge(locator, basic=self._loopback)
        return ChallengedError(message, challenge) if challenge else DeniedError(message)


def _key(locator: Locator) -> _Key:
    shown = locator.grant.authorization.encode() if locator.grant else b""
    return canonical(locator.upstream), locator.repository, sha256(shown).digest() if shown else b""
