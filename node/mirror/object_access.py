"""Access to single objects: a private object is served through another repository only if the registry itself says so.

A node that holds an object knows its origin (node/blocks/object_facts.py). A client that may read a repository gets the
objects that came through it, and open ones. For all others the registry is asked for exactly this repository and
object, with the client's own way to it, because manifests are written by whoever may push, and prove nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import trio
from cachetools import LRUCache

from node.blocks.object_facts import OPEN, UNKNOWN, ObjectFacts, origin_of
from node.oci.references import Locator, canonical
from node.runtime.single_flight import SingleFlight
from protocol.errors import DeniedError, NotFoundError, UnavailableError
from protocol.ids import Digest

log = logging.getLogger(__name__)

FRESH_S = 60.0
"""Lifetime of a positive verdict: a withdrawn right takes effect after at most this time."""
REFUSED_S = 10.0
"""Lifetime of a negative verdict: short, because a client may be waiting for a right that was just granted."""
MAX_VERDICTS = 4096

Key = tuple[str, str, bytes]
"""Canonical upstream, repository, and the hash of the grant, or b""."""


def key_of(locator: Locator) -> Key:
    shown = locator.grant.authorization.encode() if locator.grant else b""
    return canonical(locator.upstream), locator.repository, sha256(shown).digest() if shown else b""


class Registries(Protocol):
    """The part of node/registry/upstreams.py that is used here."""

    async def gives(self, locator: Locator, digest: Digest) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Verdict:
    """`refusal` is the error's type and text; None for yes."""

    until: float
    refusal: tuple[type[DeniedError | NotFoundError], str] | None = None


class ObjectAccess:
    def __init__(self, registries: Registries, facts: ObjectFacts, nursery: trio.Nursery) -> None:
        self._registries, self._facts = registries, facts
        self._verdicts: LRUCache[tuple[Key, str, Digest], _Verdict] = LRUCache(MAX_VERDICTS)
        self._asking: SingleFlight[tuple[Key, str, Digest], _Verdict] = SingleFlight(nursery)

    def is_settled(self, way: Locator, digest: Digest) -> bool:
        """Whether the object's origin allows it to every client that may read the repository."""
        return self._facts.origin(digest) in (OPEN, origin_of(way))

    async def check(self, way: Locator, digest: Digest, grace_s: float) -> None:
        """Raises DeniedError or NotFoundError if the registry refuses the object through the way's repository, and
        UnavailableError if it cannot be asked and did not confirm it in the last `grace_s` seconds."""
        if self.is_settled(way, digest):
            return
        key = (key_of(way), way.kind, digest)
        verdict = self._verdicts.get(key)
        if verdict is None or trio.current_time() >= verdict.until:
            verdict = await self._asking.do(key, lambda: self._ask(way, digest, grace_s))
            self._verdicts[key] = verdict
        if verdict.refusal is not None:
            kind, text = verdict.refusal
            raise kind(text)

    async def _ask(self, way: Locator, digest: Digest, grace_s: float) -> _Verdict:
        try:
            allowed = await self._registries.gives(way, digest)
        except NotFoundError as error:
            return _Verdict(trio.current_time() + REFUSED_S, (NotFoundError, str(error)))
        except UnavailableError as error:
            age_s = self._facts.confirmed_age_s(digest, way)
            # Objects of unknown origin were held before origins were noted, or came past the mirror.
            if self._facts.origin(digest) != UNKNOWN and (age_s is None or age_s > grace_s):
                raise
            log.info("%s@%s is served as it was before: %s", way, digest, error)
            return _Verdict(trio.current_time() + FRESH_S)
        if not allowed:
            return _Verdict(trio.current_time() + REFUSED_S, (DeniedError, f"{way.upstream}/{way.repository}: denied"))
        self._facts.confirmed(digest, way)
        return _Verdict(trio.current_time() + FRESH_S)
