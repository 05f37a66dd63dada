"""The policy for known names: how long an answer is used, and which of two answers counts.

A digest stands for the same object for ever. A tag is *fresh* until its time to live has passed since the registry
confirmed it to this node, and *usable* up to its maximum age while the registry is out of reach
(node/config/tag_policy.py), or without limit if its image is pinned on this node. An answer that cannot be read is
*doubted*: then the registry is asked for the bytes. A manifest's media type is taken from its own bytes.

What members say while the registry is out of reach is kept apart, in memory, and only until the registry answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

import trio
from cachetools import LRUCache, TTLCache

from node.api.documents import TagState
from node.config.tag_policy import TagPolicies, TagPolicy
from node.content.agreement import Agreement
from node.content.name_table import MAX_RECENT, Key, KnownTag, NameTable
from node.oci.manifests import UNTYPED, Resolved, descriptors, media_type_of, parse_manifest
from node.oci.references import Locator, is_digest
from protocol.errors import UnavailableError
from protocol.ids import MAX_OBJECT_SIZE, Digest, ObjectRef

log = logging.getLogger(__name__)

DOUBTED_S = 60.0
"""Time for which a doubted answer is not used again without its bytes."""


class KnownNames:
    def __init__(
        self,
        table: NameTable,
        policies: TagPolicies,
        pinned: Callable[[str, str], bool] = lambda source, ref: False,
        max_object: int = MAX_OBJECT_SIZE,
    ) -> None:
        self.max_object = max_object
        self._table, self.policies, self._pinned, self.trim = table, policies, pinned, table.trim
        self._unanswered: LRUCache[Key, bool] = LRUCache(MAX_RECENT)
        """The names for which the registry did not answer when it was last asked."""
        self._heard: LRUCache[tuple[Key, bool], tuple[Agreement, float]] = LRUCache(MAX_RECENT)
        """What members agreed on, and when they were asked; True in the key for an answer whose signature decided."""
        self._types: LRUCache[Digest, str] = LRUCache(MAX_RECENT)
        """Media types of manifests, by the registry's answer or their own bytes."""
        self._doubted: TTLCache[tuple[str, ObjectRef], bool] = TTLCache(MAX_RECENT, DOUBTED_S, timer=trio.current_time)

    # This node's own answers

    def get(self, locator: Locator, reference: str) -> Resolved | None:
        return self._table.get(str(locator), reference)

    def fresh(self, locator: Locator, reference: str) -> Resolved | None:
        resolved = self.get(locator, reference)
        if resolved is None or self.is_doubted(locator, resolved.ref):
            return None
        return resolved if resolved.age_s < self.ttl_s(locator, reference) else None

    def usable(self, locator: Locator, reference: str) -> Resolved | None:
        resolved = self.get(locator, reference)
        if resolved is None or resolved.age_s < self.max_age_s(locator, reference):
            return resolved
        return resolved if self._pinned(str(locator), reference) else None

    def told(self, locator: Locator, reference: str) -> Resolved | None:
        """The answer for other members. One that this node pins does not age: its operator keeps it on purpose."""
        resolved = self.usable(locator, reference)
        if resolved is not None and self._pinned(str(locator), reference):
            resolved = replace(resolved, age_s=0.0)
        if resolved is None or locator.kind == "blobs":
            return resolved
        return self.typed(resolved) or resolved

    def ttl_s(self, locator: Locator, reference: str) -> float:
        return math.inf if is_digest(reference) else self.policies.of(locator, reference).ttl_s

    def max_age_s(self, locator: Locator, reference: str) -> float:
        return math.inf if is_digest(reference) else self.policies.of(locator, reference).max_age_s

    def confirm(self, locator: Locator, reference: str, resolved: Resolved, body: bytes | None) -> Resolved:
        """Note the registry's answer, with a manifest's bytes if they came with it. Returns the younger of this and the
        known answer: a late answer must not bring back an earlier state of a tag."""
        source = str(locator)
        self._forget_outage(locator, reference)
        if body is not None or locator.kind == "blobs":
            self._doubted.pop((source, resolved.ref), None)
        if body is not None:
            self._types[resolved.ref.digest] = resolved.media_type
            self.learn(locator, body)
        if locator.kind == "manifests":
            self._table.put(source, str(resolved.ref.digest), resolved)
        last = self.get(locator, reference)
        if last is not None and last.age_s < resolved.age_s and not self.is_doubted(locator, last.ref):
            return last
        self._table.put(source, reference, resolved)
        return resolved

    def is_by_registry(self, locator: Locator, ref: ObjectRef) -> bool:
        """Whether the registry told this node that the object has this size."""
        resolved, source = self.get(locator, str(ref.digest)), str(locator)
        return (
            resolved is not None and resolved.ref == ref and self._table.origin(source, str(ref.digest)) == "registry"
        )

    def forget(self, locator: Locator, reference: str) -> None:
        """The registry no longer has the name: do not serve it if the registry is later out of reach, unless pinned."""
        self._forget_outage(locator, reference)
        if not self._pinned(str(locator), reference):
            self._table.drop(str(locator), reference)

    def doubt(self, locator: Locator, ref: ObjectRef) -> None:
        """The object cannot be read: its size may be a false claim."""
        self._doubted[str(locator), ref] = True

    def is_doubted(self, locator: Locator, ref: ObjectRef) -> bool:
        return (str(locator), ref) in self._doubted

    # While the registry is out of reach

    def unanswered(self, locator: Locator, reference: str) -> None:
        """The registry did not answer."""
        self._unanswered[str(locator), reference] = True

    def hear(self, locator: Locator, reference: str, agreement: Agreement, *, signed: bool) -> Resolved | None:
        """Note what the members say now. Returns it, or None if that is too old to be used."""
        self._heard[(str(locator), reference), signed] = agreement, trio.current_time()
        return agreement.resolved if agreement.resolved.age_s < self.max_age_s(locator, reference) else None

    def heard(self, locator: Locator, reference: str, *, signed: bool) -> Resolved | None:
        """What the members said when they were asked last, within the name's time to live."""
        agreement, at = self._heard.get(((str(locator), reference), signed), (None, -math.inf))
        since_s = trio.current_time() - at
        if agreement is None or since_s >= self.ttl_s(locator, reference):
            return None
        resolved = replace(agreement.resolved, age_s=agreement.resolved.age_s + since_s)
        too_old = resolved.age_s >= self.max_age_s(locator, reference)
        return None if too_old or self.is_doubted(locator, resolved.ref) else resolved

    def doubted(self, locator: Locator) -> set[ObjectRef]:
        return {ref for source, ref in self._doubted if source == str(locator)}

    def _forget_outage(self, locator: Locator, reference: str) -> None:
        key = str(locator), reference
        self._unanswered.pop(key, None)
        for signed in (False, True):
            self._heard.pop((key, signed), None)

    # Manifests

    def learn(self, locator: Locator, body: bytes) -> None:
        """Note the sizes and types of the objects that a manifest names, so that nothing is asked about them."""
        manifest = parse_manifest(body)
        blobs, manifests = (list(descriptors(manifest, kind, self.max_object)) for kind in ("blobs", "manifests"))
        self._table.put_many(str(locator.of_kind("blobs")), blobs)
        # Clients act on a manifest's media type: if the index has none, the registry is asked for it.
        typed = [inner for inner in manifests if inner.media_type != UNTYPED]
        self._table.put_many(str(locator.of_kind("manifests")), typed)

    def typed(self, resolved: Resolved) -> Resolved | None:
        """`resolved` with the manifest's own media type; None if that was not determined yet."""
        media_type = self._types.get(resolved.ref.digest)
        return None if media_type is None else replace(resolved, media_type=media_type)

    def has_read(self, ref: ObjectRef) -> bool:
        """Whether a manifest's bytes were read, and are no others to some clients."""
        return ref.digest in self._types

    def check_type(self, resolved: Resolved, body: bytes) -> None:
        """Compare the media type of an answer with a manifest's verified bytes: it may come from a member or from a
        wrong index. Raises as `type_of`."""
        media_type = type_of(resolved.ref, body, resolved.media_type)
        if media_type != resolved.media_type:
            log.warning("%s is of type %s, and not of %s", resolved.ref.digest, media_type, resolved.media_type)
        self._types[resolved.ref.digest] = media_type

    # For the operator

    def images(self) -> list[tuple[str, str, Resolved]]:
        return self._table.images()

    def tags(self, pattern: str) -> list[tuple[KnownTag, TagPolicy, TagState]]:
        """The tags that fit the pattern: this node's own answers, then those of members."""
        rows = [*self._table.tags(pattern), *self._heard_tags(pattern)]
        policies = [self.policies.of(row.locator, row.tag) for row in rows]
        return [(row, policy, self._state(row, policy)) for row, policy in zip(rows, policies, strict=True)]

    def _heard_tags(self, pattern: str) -> Iterable[KnownTag]:
        for ((source, tag), signed), (agreement, _) in self._heard.items():
            if is_digest(tag) or not fnmatchcase(f"{source.removesuffix('#manifests')}:{tag}", pattern):
                continue
            locator = Locator.parse(source)
            resolved = self.heard(locator, tag, signed=signed) or agreement.resolved
            yield KnownTag(locator, tag, resolved, "members", agreement.peers)

    def _state(self, tag: KnownTag, policy: TagPolicy) -> TagState:
        age_s = tag.resolved.age_s
        if tag.origin != "members" and age_s < policy.ttl_s:
            return "fresh"
        if tag.origin != "members" and (str(tag.locator), tag.tag) not in self._unanswered:
            return "due"
        return "stale" if age_s < policy.max_age_s else "too old"


def type_of(ref: ObjectRef, body: bytes, claimed: str = "") -> str:
    """A manifest's media type, as `media_type_of`. Raises UnavailableError if the bytes are no manifest, or could be
    read in two ways."""
    media_type = media_type_of(body, claimed)
    if media_type is None:
        raise UnavailableError(f"{ref.digest} is no manifest that all clients read alike")
    return media_type
