"""How long a node trusts its last answer about a tag. The first pattern of the configuration that matches decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate

from cachetools import LRUCache

from node.oci.references import Locator, canonical

_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class TagPolicy:
    """`match` is the pattern, "" for the defaults. The registry is asked again `ttl_s` after its last answer, which is
    served until it is `max_age_s` old while the registry is out of reach. Both are 0 for a tag that is not cached.
    `verify`: paths of public keys; an image of the tag needs a signature by one of them."""

    match: str
    ttl_s: float
    max_age_s: float
    verify: tuple[str, ...] = ()

    @property
    def cached(self) -> bool:
        return self.ttl_s > 0 or self.max_age_s > 0


class TagPolicies:
    """`witnesses`: hosts whose members must agree on a tag while the registry is out of reach."""

    def __init__(self, default: TagPolicy, rules: Sequence[TagPolicy] = (), witnesses: int = 2) -> None:
        self._default, self.witnesses = default, witnesses
        self._rules = [(re.compile(translate(rule.match)), rule) for rule in rules]
        self._remembered: LRUCache[tuple[Locator, str], TagPolicy] = LRUCache(_REMEMBERED)

    def of(self, locator: Locator, tag: str) -> TagPolicy:
        policy = self._remembered.get((locator, tag))
        if policy is None:
            name = f"{canonical(locator.upstream)}/{locator.repository}:{tag}"
            policy = next((rule for pattern, rule in self._rules if pattern.match(name)), self._default)
            self._remembered[locator, tag] = policy
        return policy
