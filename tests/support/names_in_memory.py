"""Nodes that resolve the moving tags of one registry, in virtual time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio
import trio.testing

from node.config.tag_policy import TagPolicies, TagPolicy
from node.content.known_names import KnownNames
from node.content.name_table import NameTable
from node.content.resolver import Resolver
from node.exchange.contract import Answer
from node.exchange.memory import MemoryNetwork
from node.oci.manifests import Resolved
from node.oci.references import Locator
from protocol import messages
from protocol.errors import NotFoundError, UnavailableError
from protocol.ids import Digest, ObjectRef, PeerId
from tests.support import site_in_memory

APP = Locator("origin.test", "app", "manifests")
TTL_S, MAX_AGE_S = 60.0, 86400.0
EPOCH = 1.7e9
POLICIES = TagPolicies(
    TagPolicy("", TTL_S, MAX_AGE_S), [TagPolicy("*:edge", 0.0, 0.0), TagPolicy("*:quick", 5.0, MAX_AGE_S)]
)


def manifest(version: int) -> bytes:
    return json.dumps({"schemaVersion": 2, "layers": [], "version": version}).encode()


class Registry:
    """All tags have the same version, which changed at the times in `moved`. Nodes in `cut` cannot reach it."""

    def __init__(self) -> None:
        self.moved = [(0.0, 1)]
        self.answer_s = 0.02
        self.deleted = False
        self.asked = 0
        self.asked_by: Counter[PeerId] = Counter()
        self.cut: set[PeerId] = set()

    def move(self) -> None:
        self.moved.append((trio.current_time(), self.moved[-1][1] + 1))


class Reached:
    """The registry as one node reaches it."""

    def __init__(self, registry: Registry, peer: PeerId) -> None:
        self._registry, self._peer = registry, peer

    def connections(self, upstream: str) -> int:
        return 5

    def blocks(self, *_: object) -> None:
        raise AssertionError("these tests resolve only names")

    async def resolve(self, locator: Locator, reference: str, *, whole: bool = False) -> tuple[Resolved, bytes | None]:
        registry = self._registry
        registry.asked += 1
        registry.asked_by[self._peer] += 1
        body = manifest(registry.moved[-1][1])  # the version at the time of the question
        await trio.sleep(registry.answer_s)
        if self._peer in registry.cut:
            raise UnavailableError("out of reach")
        if reference == "none" or registry.deleted:
            raise NotFoundError("no such tag")
        ref = ObjectRef(Digest("sha256", sha256(body).hexdigest()), len(body))
        return Resolved(ref, "a/b"), body if whole else None


class Node(site_in_memory.Node):
    def __init__(self, folder: Path, *site: Any, nursery: trio.Nursery) -> None:
        super().__init__(*site, nursery=nursery)
        self.reached = self.registry.target = Reached(self.registry.target, self.own)
        self.table = NameTable(folder / f"{self.own}.sqlite", lambda: EPOCH + trio.current_time())
        self.pinned: set[str] = set()
        self.ages: list[float] = []
        self.heard: list[messages.Resolve] = []
        self.names = Resolver(
            self.site,
            KnownNames(self.table, POLICIES, lambda source, reference: reference in self.pinned),
            self.reached,
            questions=self.blocks.questions,
            home=self.blocks.home,
            nursery=nursery,
            served=self.ages.append,
        )

    async def handle(self, peer: PeerId, request: messages.Request) -> Answer:
        assert isinstance(request, messages.Resolve)
        self.heard.append(request)
        return await self.names.handle(peer, request)

    async def version(self, tag: str = "latest") -> int:
        digest = (await self.names.resolve(APP, tag)).ref.digest
        return next(version for version in range(1, 99) if sha256(manifest(version)).hexdigest() == digest.hex)

    def row(self, tag: str) -> tuple[str, str, str]:
        """State, source of the answer, and the pattern of the policy."""
        ((row, policy, state),) = self.names.known.tags(f"origin.test/app:{tag}")
        return state, row.origin, policy.match


def play(folder: Path, count: int, scenario: Callable[[list[Node], Registry, MemoryNetwork], Awaitable[None]]) -> None:
    async def closing(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        network.latency_s = 0.005
        await scenario(nodes, registry, network)
        for node in nodes:
            node.table.close()

    site_in_memory.play(count, closing, make=partial(Node, folder), registry=Registry(), limit_s=math.inf)
