"""The policy for known names: how long an answer is used, and which of two answers counts.

A digest stands for the same object for ever. A tag is *fresh* until its time to live has passed since the registry last
confirmed it, and *usable* up to its maximum age while the registry is out of reach (node/config/tag_policy.py), or
without limit if its image is pinned on this node. An answer that cannot be read is *doubted*: then only the registry's
own answer counts. A manifest's media type is taken from its own bytes if they show it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import trio
from cachetools import LRUCache, TTLCache

from node.api.documents import TagState
from node.config.tag_policy import TagPolicies, TagPolicy
from node.content.name_table import MAX_RECENT, REGISTRY, Key, KnownTag, NameTable
from node.oci.manifests import UNTYPED, Resolved, descriptors, media_type_of, parse_manifest
from node.oci.references import Locator, is_digest
from protocol.ids import MAX_OBJECT_SIZE, Digest, ObjectRef

log = logging.getLogger(__name__)

DOUBTED_S = 60.0
"""Time until members are asked again for a name with a doubted answer."""


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
        self._site_asked: LRUCache[Key, float] = LRUCache(MAX_RECENT)
        """When the members were last asked for a tag, since the registry last answered for it."""
        self._types: LRUCache[Digest, str] = LRUCache(MAX_RECENT)
        """Media types of manifests, by the registry's answer or their own bytes."""
        self._doubted: TTLCache[tuple[str, ObjectRef], bool] = TTLCache(MAX_RECENT, DOUBTED_S, timer=trio.current_time)

    def get(self, locator: Locator, reference: str) -> Resolved | None:
        return self._table.get(str(locator), reference)

    def fresh(self, locator: Locator, reference: str) -> Resolved | None:
        resolved = self.get(locator, reference)
        if resolved is None or self.is_doubted(locator, resolved):
            return None
        return resolved if resolved.age_s < self.ttl_s(locator, reference) else None

    def usable(self, locator: Locator, reference: str) -> Resolved | None:
        resolved = self.get(locator, reference)
        if resolved is None or resolved.age_s < self.max_age_s(locator, reference):
            return resolved
        return resolved if self._pinned(str(locator), reference) else None

    def ttl_s(self, locator: Locator, reference: str) -> float:
        return math.inf if is_digest(reference) else self.policies.of(locator, reference).ttl_s

    def max_age_s(self, locator: Locator, reference: str) -> float:
        return math.inf if is_digest(reference) else self.policies.of(locator, reference).max_age_s

    def note(self, locator: Locator, reference: str, resolved: Resolved, told_by: str) -> Resolved:
        """The younger of the new and the known answer: a late answer must not bring back an earlier state of a tag."""
        last = self.get(locator, reference)
        if last is not None and last.age_s < resolved.age_s and not self.is_doubted(locator, last):
            return last
        self._table.put(str(locator), reference, resolved, told_by)
        return resolved

    def confirm(self, locator: Locator, reference: str, resolved: Resolved, body: bytes | None) -> Resolved:
        """Note the registry's answer, with a manifest's bytes if they came with it."""
        self._site_asked.pop((str(locator), reference), None)
        self._doubted.pop((str(locator), resolved.ref), None)
        if locator.kind == "manifests":
            self._table.put(str(locator), str(resolved.ref.digest), resolved, REGISTRY)
        if body is not None:
            self._types[resolved.ref.digest] = resolved.media_type
            self.learn(locator, body)
        return self.note(locator, reference, resolved, REGISTRY)

    def is_by_registry(self, locator: Locator, ref: ObjectRef) -> bool:
        """Whether the registry told this node, since its start, that the object has this size."""
        resolved, source = self.get(locator, str(ref.digest)), str(locator)
        return resolved is not None and resolved.ref == ref and self._table.told_by(source, str(ref.digest)) == REGISTRY

    def forget(self, locator: Locator, reference: str) -> None:
        """The registry no longer has the name: do not serve it if the registry is later out of reach, unless pinned."""
        if not self._pinned(str(locator), reference):
            self._table.drop(str(locator), reference)

    def doubt(self, locator: Locator, ref: ObjectRef) -> None:
        """The object cannot be read: a member may have sent a wrong size. The registry is asked next."""
        self._doubted[str(locator), ref] = True

    def is_doubted(self, locator: Locator, resolved: Resolved) -> bool:
        return (str(locator), resolved.ref) in self._doubted

    def asking_site(self, locator: Locator, reference: str) -> None:
        if not is_digest(reference):
            self._site_asked[str(locator), reference] = trio.current_time()

    def site_was_asked(self, locator: Locator, reference: str) -> bool:
        """Whether the members were asked within the tag's time to live, and the registry did not answer since."""
        asked = self._site_asked.get((str(locator), reference), -math.inf)
        return trio.current_time() < asked + self.ttl_s(locator, reference)

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

    def check_type(self, locator: Locator, reference: str, resolved: Resolved, body: bytes) -> None:
        """Compare the media type of an answer with a manifest's verified bytes. A member that sent another type is only
        named in the log: it may have it from another member, or from a wrong index."""
        media_type = media_type_of(body, resolved.media_type)
        if media_type is None:
            self.doubt(locator, resolved.ref)
            return
        if media_type != resolved.media_type:
            teller = self._table.told_by(str(locator), reference) or "an unknown source"
            answer = f"{teller} sent {resolved.media_type}"
            log.warning("%s is of type %s; %s", resolved.ref.digest, media_type, answer)
        self._types[resolved.ref.digest] = media_type

    def images(self) -> list[tuple[str, str, Resolved]]:
        return self._table.images()

    def tags(self, pattern: str) -> list[tuple[KnownTag, TagPolicy, TagState]]:
        rows = [(row, self.policies.of(row.locator, row.tag)) for row in self._table.tags(pattern)]
        return [(row, policy, self._state(row, policy)) for row, policy in rows]

    def _state(self, tag: KnownTag, policy: TagPolicy) -> TagState:
        age_s = tag.resolved.age_s
        if age_s < policy.ttl_s:
            return "fresh"
        if (str(tag.locator), tag.tag) not in self._site_asked:
            return "due"
        return "stale" if age_s < policy.max_age_s else "too old"
